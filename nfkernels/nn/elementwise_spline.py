"""Splines that act on every channel by itself: learned, or given by the context; on a line, and on a circle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import Spline, rational_quadratic_spline
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_channels, check_width, per_channel, valid_mask
from .circle import wrap
from .conditioning import ContextError
from .conv_net import check_precision
from .transforms import identity_params


class ElementwiseSpline(Bijection):
    """``y_c = f_c(x_c)``: every channel of ``x [B, C, *spatial]`` by a monotonic rational-quadratic spline of its own.

    Args:
        features: C.
        spline: a :class:`nfkernels.Spline` or a preset's name.
        conditioner: None for learned splines, which start as the identity (on an interval that maps to itself); or a
            module ``context -> params [B, C * P]`` with ``P = spline.params_per_element``: the context decides.

    The one-dimensional flow, where a coupling has nothing to condition on. Cost: one pass over x. Raises ``ValueError``
    for a conditioner that returns another number of params, and for a context that is missing.
    Reference: Durkan et al. 2019 (Neural Spline Flows), section 3.1.
    """

    def __init__(
        self,
        features: int,
        *,
        spline: Spline | str = Spline(),  # noqa: B008
        conditioner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_width(features, name, "feature")
        self.features, self.spline, self.conditioner = features, Spline.parse(spline), conditioner
        wanted = features * self.spline.params_per_element
        given = getattr(conditioner, "out_channels", wanted)
        if given != wanted:
            raise ValueError(f"a conditioner of this {name} returns {wanted} parameters, got one that returns {given}")
        self.params = None if conditioner is not None else nn.Parameter(identity_params(self.spline, features))

    @property
    def uses_context(self) -> bool:
        return self.conditioner is not None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(x, context, lengths, False)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(z, context, lengths, True)

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        check_channels(x, self.features, name, own=self.params)
        mask = valid_mask(x, lengths)
        if self.conditioner is None:
            params = self.params[None]
        elif context is None:
            raise ContextError(f"this {name} is made by a network of the context: give it a context")
        else:
            params = self.conditioner(context)
        params = params.reshape(*params.shape, *[1] * (x.dim() - 2)).expand(x.shape[0], -1, *x.shape[2:])
        check_precision(params, x, name)
        return rational_quadratic_spline(x, params, spline=self.spline, inverse=inverse, mask=mask)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.spline}"


class CircularSpline(ElementwiseSpline):
    """Angles to angles: every channel of ``x [B, C, *spatial]``, taken modulo ``high - low``, by a learned rotation and
    then a smooth monotonic spline of the circle, whose slope is the same at both ends.

    Args:
        features: C. bins, low, high: of the spline; data and latents lie in ``[low, high)``, by default an angle's
            ``[-pi, pi)``, and any other number stands for the angle that it is.
        conditioner: as for :class:`ElementwiseSpline`; the rotation is learned either way.

    Coupled circular splines are ``SplineCoupling(..., spline=Spline.circular(bins, low, high))``, between
    :class:`PhaseShift` layers and with :class:`PeriodicFeatures` around the conditioner.
    Reference: Rezende et al. 2020 (Normalizing Flows on Tori and Spheres), section 2.1.2.
    """

    def __init__(
        self,
        features: int,
        *,
        bins: int = 8,
        low: float = -math.pi,
        high: float = math.pi,
        conditioner: nn.Module | None = None,
    ) -> None:
        super().__init__(features, spline=Spline.circular(bins, low, high), conditioner=conditioner)
        self.phase = nn.Parameter(torch.zeros(features))

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_channels(x, self.features, "CircularSpline", own=self.phase)
        low, high = self.spline.low, self.spline.high
        wide = x.to(compute_dtype(x))
        phase = per_channel(self.phase, x)
        wide = wrap(wide if inverse else wide + phase, low, high)
        y, logdet = super()._run(wide.to(x.dtype), context, lengths, inverse)
        # What the last bin rounds to `high` is `low`.
        y = wrap(y.to(wide.dtype) - phase if inverse else y.to(wide.dtype), low, high).to(x.dtype)
        mask = valid_mask(x, lengths)
        return y if mask is None else torch.where(mask, y, 0.0), logdet
