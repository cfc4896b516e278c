"""Transforms: what a coupling does to an element, given its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, Spline, affine_coupling, rational_quadratic_spline
from ..ops.affine_coupling import IdentityName, LayoutName, OrderName, _choice
from ..reference.affine_coupling import Layout, Order
from .config import Recorded


class AffineTransform(Recorded, nn.Module):
    """``x * s + t`` for :class:`Coupling`; params ``[B, 2 Ct, *spatial]``, options as in ``affine_coupling``.

    A transform is any object with ``forward(x, params, *, mask, channel_map) -> (y, logdet)`` and an ``inverse`` of the
    same form; what mask and channel_map leave out passes through and adds nothing to logdet ``[B]``.

    Raises ``ValueError`` for options that are none, and for params that do not fit the data.
    """

    def __init__(
        self,
        scale_map: ScaleMap | str = "glow",
        *,
        order: OrderName = "scale_first",
        layout: LayoutName = "shift_scale",
    ) -> None:
        super().__init__()
        self.scale_map = ScaleMap.parse(scale_map)
        _choice(Order, order, "order"), _choice(Layout, layout, "layout")
        self.order, self.layout = order, layout

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`nfkernels.affine_coupling` is called with."""
        return {"scale_map": self.scale_map, "order": self.order, "layout": self.layout}

    def forward(
        self,
        x: Tensor,
        params: Tensor,
        *,
        mask: Tensor | None = None,
        channel_map: Tensor | None = None,
        identity: IdentityName = "none",
        gain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(y, logdet [B])`` of ``x [B, C, *spatial]``."""
        return self._run(x, params, mask, channel_map, identity, gain, False)

    def inverse(
        self,
        x: Tensor,
        params: Tensor,
        *,
        mask: Tensor | None = None,
        channel_map: Tensor | None = None,
        identity: IdentityName = "none",
        gain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(x, logdet [B])`` of y, which goes by the name x here too."""
        return self._run(x, params, mask, channel_map, identity, gain, True)

    def _run(
        self,
        x: Tensor,
        params: Tensor,
        mask: Tensor | None,
        channel_map: Tensor | None,
        identity: IdentityName,
        gain: Tensor | None,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        return affine_coupling(
            x, params, scale_map=self.scale_map, order=self.order, layout=self.layout, inverse=inverse, mask=mask,
            channel_map=channel_map, identity=identity, gain=gain,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"scale_map={self.scale_map}, order={self.order!r}, layout={self.layout!r}"


class AdditiveTransform(AffineTransform):
    """``x + t``: volume preserving, params ``[B, Ct, *spatial]`` (NICE, Dinh et al. 2014)."""

    def __init__(self) -> None:
        super().__init__("additive")


class SplineTransform(Recorded, nn.Module):
    """A monotonic rational-quadratic spline for :class:`Coupling`; params ``[B, Ct * P, *spatial]``, per channel
    ``P = spline.params_per_element`` raw values: widths, heights, derivatives. See ``rational_quadratic_spline``.

    Raises ``ValueError`` for an unknown spline, and for params that do not fit the data.
    """

    def __init__(self, spline: Spline | str = Spline()) -> None:  # noqa: B008
        super().__init__()
        self.spline = Spline.parse(spline)

    def forward(
        self, x: Tensor, params: Tensor, *, mask: Tensor | None = None, channel_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y, logdet [B])`` of ``x [B, C, *spatial]``."""
        return rational_quadratic_spline(x, params, spline=self.spline, mask=mask, channel_map=channel_map)

    def inverse(
        self, x: Tensor, params: Tensor, *, mask: Tensor | None = None, channel_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, logdet [B])`` of y, which goes by the name x here too."""
        return rational_quadratic_spline(
            x, params, spline=self.spline, inverse=True, mask=mask, channel_map=channel_map
        )

    def extra_repr(self) -> str:
        return str(self.spline)


class MixedSplineTransform(SplineTransform):
    """Splines for columns of which some are angles, by one op: :class:`SplineTransform` with periodic slopes for those,
    with slope 1 at both ends for the others.

    Args:
        spline: with ``tails="circular"``; its interval is that of both kinds of column.
        circular: bool ``[Ct]``, which of the transformed columns are angles.

    params ``[B, Ct * P]``, P alike for both kinds: of a column that is no angle the first derivative is not used.
    Raises ``ValueError`` for a spline whose tails are not circular, and for a ``circular`` that is not bool ``[Ct]``.
    """

    fixed: Tensor

    def __init__(self, spline: Spline | str, circular: Tensor) -> None:
        super().__init__(spline)
        if self.spline.tails != "circular":
            raise ValueError(f"angles need a spline with circular tails, got tails={self.spline.tails!r}")
        if circular.dtype != torch.bool or circular.dim() != 1:
            raise ValueError(f"circular must be bool [Ct], got {circular.dtype} {tuple(circular.shape)}")
        first = torch.arange(self.spline.params_per_element) == 2 * self.spline.bins
        self.register_buffer("fixed", (~circular[:, None] & first).flatten())

    def forward(
        self, x: Tensor, params: Tensor, *, mask: Tensor | None = None, channel_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, self._fixed(params), mask=mask, channel_map=channel_map)

    def inverse(
        self, x: Tensor, params: Tensor, *, mask: Tensor | None = None, channel_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().inverse(x, self._fixed(params), mask=mask, channel_map=channel_map)

    def _fixed(self, params: Tensor) -> Tensor:
        fixed = self.fixed.reshape(-1, *[1] * (params.dim() - 2))
        return params.masked_fill(fixed, raw_slope_of_one(self.spline))


def raw_slope_of_one(spline: Spline) -> float:
    """The raw derivative that is a slope of 1."""
    if spline.sizes == "softclip":
        return 0.0
    return math.log(math.expm1(1 - spline.min_derivative))


def identity_params(spline: Spline, count: int) -> Tensor:
    """Raw parameters ``[count * P]`` of bins of equal size and slopes of 1: the identity, where ``spline`` maps its
    interval to itself."""
    params = torch.zeros(count, spline.params_per_element)
    params[:, 2 * spline.bins :] = raw_slope_of_one(spline)
    return params.flatten()
