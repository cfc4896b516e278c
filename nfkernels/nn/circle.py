"""Angles among the columns of a table: their rotation, what a network sees of them, and their base distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gaussian_log_density
from ..reference.affine_coupling import compute_dtype
from .bases import Base, check_temperature
from .bijection import Bijection, check_channels, check_width, per_channel, valid_mask, zero_logdet
from .conditioning import call_conditioner, takes_context
from .config import Recorded
from .masked_mlp import MaskedMLP

_LOG_2PI = math.log(2 * math.pi)


def wrap(x: Tensor, low: float, high: float) -> Tensor:
    """x modulo ``high - low``, in ``[low, high)``."""
    y = torch.remainder(x - low, high - low) + low
    return torch.where(y >= high, low, y)  # the remainder of -1e-9 rounds to the period itself


def circular_mask(features: int, circular: Sequence[int], who: str) -> Tensor:
    """bool ``[features]``, True at the columns that are angles."""
    check_width(features, who, "feature")
    numbers = [int(c) for c in circular]
    wrong = [c for c in numbers if not 0 <= c < features]
    if wrong:
        raise ValueError(f"circular names columns 0 to {features - 1}, got {wrong[0]}")
    mask = torch.zeros(features, dtype=torch.bool)
    mask[numbers] = True
    return mask


def check_interval(low: float, high: float, who: str) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{who} needs a period from low to a higher high, got {low} and {high}")


class PhaseShift(Bijection):
    """A learned rotation of the columns that are angles: ``x + phase`` modulo ``high - low``, in ``[low, high)``.

    Args:
        features: C of ``x [B, C, *spatial]``.
        circular: numbers of the columns that are angles, all by default; the others pass through.
        low, high: where angles lie.

    logdet 0. What a spline on the circle leaves in place, its ends, is another angle in every layer. Raises
    ``ValueError`` for an empty period, for columns that are not there, and for data of another number of channels.
    """

    circular: Tensor
    uses_context = False

    def __init__(
        self,
        features: int,
        circular: Sequence[int] | None = None,
        *,
        low: float = -math.pi,
        high: float = math.pi,
    ) -> None:
        super().__init__()
        check_interval(low, high, "PhaseShift")
        mask = circular_mask(features, range(features) if circular is None else circular, "PhaseShift")
        self.features, self.low, self.high = features, float(low), float(high)
        self.everywhere = bool(mask.all())
        self.phase = nn.Parameter(torch.zeros(features))
        self.register_buffer("circular", mask)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._turned(x, lengths, 1.0), zero_logdet(x)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._turned(z, lengths, -1.0), zero_logdet(z)

    def _turned(self, x: Tensor, lengths: Tensor | None, sign: float) -> Tensor:
        check_channels(x, self.features, "PhaseShift", own=self.phase)
        y = torch.add(x.to(compute_dtype(x)), per_channel(self.phase, x), alpha=sign)
        y = wrap(y, self.low, self.high).to(x.dtype)
        if not self.everywhere:
            y = torch.where(self.circular.reshape(-1, *[1] * (x.dim() - 2)), y, x)
        mask = valid_mask(x, lengths)
        return y if mask is None else torch.where(mask, y, 0.0)

    def extra_repr(self) -> str:
        return f"{self.features}, [{self.low:.4g}, {self.high:.4g})"


class PeriodicFeatures(Recorded, nn.Module):
    """A conditioner that sees angles by their cosine and sine, so that it is periodic too.

    Args:
        conditioner: of ``[B, n + a]``: a conditioner of a coupling whose n inputs have a angles among them. It is given
            the inputs with the cosine in an angle's place, and then the sines.
        features: n. circular: the numbers of the angles among the inputs.
        low, high: an angle's period.

    Raises ``ValueError`` for an empty period, for columns that are not there, and for a conditioner that says it takes
    another number of inputs.
    """

    source: Tensor
    turning: Tensor
    offset: Tensor

    def __init__(
        self,
        conditioner: nn.Module,
        features: int,
        circular: Sequence[int],
        *,
        low: float = -math.pi,
        high: float = math.pi,
    ) -> None:
        super().__init__()
        check_interval(low, high, "PeriodicFeatures")
        angles = circular_mask(features, circular, "PeriodicFeatures")
        count = int(angles.sum())
        given = getattr(conditioner, "in_channels", features + count)
        if given != features + count:
            raise ValueError(
                f"{features} inputs with {count} angles are {features + count} features, but the conditioner has "
                f"in_channels={given}"
            )
        self.conditioner, self._with_context = conditioner, takes_context(conditioner)
        self.in_channels, self.out_channels = features, getattr(conditioner, "out_channels", None)
        self.context_channels = 0 if self._with_context is None else getattr(conditioner, "context_channels", None)
        numbers = angles.nonzero()[:, 0]
        self.register_buffer("source", torch.cat([torch.arange(features), numbers]))
        turning = torch.cat([angles, angles.new_ones(count)])
        self.register_buffer("turning", turning)
        self.rate = 2 * math.pi / (high - low)
        # cos(a) = sin(a + pi / 2): one pass for both.
        offset = torch.zeros(features + count)
        offset[:features][angles] = math.pi / 2
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the conditioner makes of ``x [B, n]``."""
        dtype = compute_dtype(x)
        wide = x.to(dtype).index_select(1, self.source)
        turned = torch.sin(torch.add(self.offset.to(dtype), wide, alpha=self.rate))
        features = torch.where(self.turning, turned, wide)
        return call_conditioner(self.conditioner, features, context, None, self._with_context)


class PeriodicMaskedMLP(Recorded, nn.Module):
    """A :class:`MaskedMLP` that sees angles by their cosine and sine, for a :class:`MaskedAutoregressive`.

    Args:
        features, hidden, params_per_feature: as of a MaskedMLP, whose options follow by name (``order``, ``passes``,
            ``seed`` aside: features in their natural order).
        circular: the numbers of the columns that are angles.
        low, high: an angle's period.

    ``[B, features] -> [B, features * params_per_feature]``, a feature's params side by side. Raises ``ValueError`` as
    :class:`PeriodicFeatures` and :class:`MaskedMLP` do.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        params_per_feature: int,
        circular: Sequence[int],
        *,
        low: float = -math.pi,
        high: float = math.pi,
        **options: Any,
    ) -> None:
        super().__init__()
        angles = circular_mask(features, circular, "PeriodicMaskedMLP").nonzero()[:, 0]
        # A sine has its angle's place in the order. What would be its own params is left out at the end.
        order = torch.cat([torch.arange(features), angles])
        network = MaskedMLP(len(order), hidden, params_per_feature, order=order, **options)
        self.periodic = PeriodicFeatures(network, features, angles.tolist(), low=low, high=high)
        self.features, self.in_channels, self.out_channels = features, features, features * params_per_feature
        self.context_channels = network.context_channels

    @property
    def network(self) -> MaskedMLP:
        """The network inside, whose inputs are the cosines and sines."""
        network = self.periodic.conditioner
        assert isinstance(network, MaskedMLP)
        return network

    @property
    def degrees(self) -> Tensor:
        """int64 ``[features]``, as of a :class:`MaskedMLP`."""
        return self.network.degrees[: self.features]

    @property
    def passes(self) -> int:
        """How many calls of the network an inverse takes."""
        return self.network.passes

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The params ``[B, features * params_per_feature]`` of ``x [B, features]``."""
        return self.periodic(x, context)[:, : self.out_channels]


class CircularNormal(Base):
    """N(0, 1) on the columns of a table, but uniform on the circle on those that are angles, all independent.

    Args:
        features: number of columns. circular: the numbers of those that are angles, all by default.
        low, high: where angles lie; ``log_prob`` takes any number for the angle that it is.

    Over ``[features]``. Temperature scales the normal columns' standard deviation alone. Raises ``ValueError`` for an
    empty period, for columns that are not there, and as every :class:`Base`.
    """

    circular: Tensor

    def __init__(
        self,
        features: int,
        circular: Sequence[int] | None = None,
        *,
        low: float = -math.pi,
        high: float = math.pi,
    ) -> None:
        super().__init__(features)
        check_interval(low, high, "CircularNormal")
        mask = circular_mask(features, range(features) if circular is None else circular, "CircularNormal")
        self.low, self.high = float(low), float(high)
        self.register_buffer("circular", mask)
        # A normal's log density at 0, which stands in for an angle's, is taken back.
        self._constant = int(mask.sum()) * (0.5 * _LOG_2PI - math.log(high - low))

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        self._mask(z, lengths)
        return gaussian_log_density(torch.where(self.circular, 0.0, z)) + self._constant

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        check_temperature(temperature)
        options: dict[str, Any] = {"generator": generator, "device": self.like.device, "dtype": self.like.dtype}
        z = torch.randn(n, *self.shape, **options) * temperature
        angles = self.low + (self.high - self.low) * torch.rand(n, *self.shape, **options)
        return torch.where(self.circular, wrap(angles, self.low, self.high), z)
