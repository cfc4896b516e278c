"""zuko's univariate transforms that the ops know: what a layer applies to each feature."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributions import constraints

from ...ops import ScaleMap, Spline, affine_coupling, rational_quadratic_spline
from ..registry import qualified


@dataclass(frozen=True)
class Univariate:
    """A map of single features: its form for the ops, and how many params a feature has."""

    form: ScaleMap | Spline
    count: int

    def __call__(
        self, x: Tensor, params: Tensor, logdet: Tensor | None, inverse: bool, channel_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y, logdet)`` of ``x [N, D]`` and ``params [N, D P]``, feature by feature."""
        if params.dtype.itemsize > x.dtype.itemsize:  # a wider context decides, as in the original
            x, logdet = x.to(params.dtype), None if logdet is None else logdet.to(params.dtype)
        if isinstance(self.form, Spline):
            return rational_quadratic_spline(
                x, params, spline=self.form, inverse=inverse, channel_map=channel_map, logdet=logdet
            )
        return affine_coupling(
            x, params, scale_map=self.form, layout="shift_scale_interleaved", inverse=inverse,
            channel_map=channel_map, logdet=logdet,
        )  # fmt: skip

    @property
    def domain(self) -> constraints.Constraint:
        """Of the features together."""
        turned = isinstance(self.form, Spline) and self.form.half_turn
        each = constraints.interval(self.form.low, self.form.high) if turned else constraints.real
        return constraints.independent(each, 1)


def univariate_of(module: nn.Module) -> Univariate | str:
    """What ``module.univariate`` and ``module.shapes`` say, or why the ops do not know it."""
    function, given = module.univariate, {}
    if isinstance(function, functools.partial):
        if function.args:
            return "a univariate transform with positional options"
        function, given = function.func, dict(function.keywords)
    name = qualified(function) if hasattr(function, "__qualname__") else type(function).__name__
    if name not in _KNOWN:
        return f"univariate {name.rpartition('.')[2]}"
    options, make = _KNOWN[name]
    for option, value in given.items():
        if option not in options or isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"univariate option {option}={value!r}"
    shapes = tuple(tuple(s) for s in module.shapes)
    made = make(shapes, {**options, **given})
    return (
        made if made is not None else f"univariate {function.__name__} with shapes {shapes} and {given or 'defaults'}"
    )


def _additive(shapes: tuple, options: dict[str, Any]) -> Univariate | None:
    return Univariate(ScaleMap.additive(), 1) if shapes == ((),) else None


def _affine(shapes: tuple, options: dict[str, Any]) -> Univariate | None:
    slope = options["slope"]
    fits = shapes == ((), ()) and slope > 0 and slope != 1 and math.isfinite(slope)
    return Univariate(ScaleMap.zuko(float(slope)), 2) if fits else None


def _spline(shapes: tuple, options: dict[str, Any], circular: bool = False) -> Univariate | None:
    bins = shapes[0][0] if shapes and len(shapes[0]) == 1 else 0
    slope, bound = float(options["slope"]), float(options["bound"])
    fits = shapes == ((bins,), (bins,), (bins - 1,)) and 2 <= bins <= 64 and 0 < slope < 1
    if not fits or not (bound > 0 and math.isfinite(bound)):
        return None
    form = (Spline.zuko_circular if circular else Spline.zuko)(bins, bound, slope)
    return Univariate(form, form.params_per_element)


def _circular(shapes: tuple, options: dict[str, Any]) -> Univariate | None:
    return _spline(shapes, {**options, "bound": math.pi}, circular=True)


# Each with its options and their values where none are given.
_KNOWN = {
    "zuko.transforms.AdditiveTransform": ({}, _additive),
    "zuko.transforms.MonotonicAffineTransform": ({"slope": 1e-3}, _affine),
    "zuko.transforms.MonotonicRQSTransform": ({"bound": 5.0, "slope": 1e-3}, _spline),
    "zuko.flows.spline.CircularRQSTransform": ({"slope": 1e-3}, _circular),
}
