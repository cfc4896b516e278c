"""normflows' spline couplings: ``normflows.flows.neural_spline``, their tails, their bounds, and their wrappers.

The wrappers turn the layer inside them round: their ``inverse`` (x -> z) is its ``forward``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.hooks import hooked
from ...ops import Spline, rational_quadratic_spline
from ..adapter import Adapter
from ..constants import Constant, specialised
from ..indices import Split
from ..registry import class_of, register

_SPLINES = "normflows.flows.neural_spline"
COUPLING = f"{_SPLINES}.coupling.PiecewiseRationalQuadraticCoupling"
CDF = f"{_SPLINES}.coupling.PiecewiseRationalQuadraticCDF"


class Unsupported(Exception):
    """Why a layer cannot be fused."""


@dataclass(frozen=True)
class Reading:
    """How the raw values of some features become the op's params: the spline, which of K widths, K heights and K + 1
    slopes of each feature it reads where tails differ from feature to feature, and which of them are the constant whose
    slope is 1. ``scale`` is None, or the features' bounds where those differ: the spline is then that of [-1, 1].
    ``inside`` is None, or the bounds beyond which tails that are listed feature by feature give 0, in the original."""

    spline: Spline
    columns: Constant | None = None
    ends: Constant | None = None
    constant: float = 0.0
    scale: tuple[float, ...] | None = None
    inside: tuple[float, ...] | None = None

    def params(self, raw: Tensor) -> Tensor:
        """``[B, features * P, ...]`` from what the network gave."""
        if self.columns is None:
            return raw
        raw = raw.index_select(1, self.columns.on(raw.device))
        return raw if self.ends is None else raw.masked_fill(self.ends.on(raw.device), self.constant)

    def shared(self, cdf: nn.Module, rows: int) -> Tensor:
        """The same of parameters that all rows share."""
        raw = torch.cat((cdf.unnormalized_widths, cdf.unnormalized_heights, cdf.unnormalized_derivatives), -1)
        return self.params(raw.view(1, -1)).expand(rows, -1)


def reading_of(module: nn.Module, features: int, bins: int, hidden: float = 1.0) -> Reading:
    """Of a module with ``tails``, ``tail_bound`` and three minima. Raises Unsupported."""
    tails = list(module.tails) if isinstance(module.tails, (list, tuple)) else module.tails
    kinds = set(tails) if isinstance(tails, list) else {tails}
    if kinds - {"linear", "circular"}:
        raise Unsupported(f"tails={module.tails!r} (linear and circular ones are fused)")
    if not features or (isinstance(tails, list) and len(tails) != features):
        raise Unsupported("no features" if not features else "not one kind of tails for each feature")
    bounds = _bounds(module.tail_bound, features)
    bound, scale = (bounds[0], None) if len(set(bounds)) == 1 else (1.0, tuple(bounds))
    mixed = len(kinds) > 1
    try:
        spline = Spline(
            bins=bins, tails="linear" if mixed else kinds.pop(), low=-bound, high=bound,
            derivatives="all" if mixed else None, min_width=module.min_bin_width, min_height=module.min_bin_height,
            min_derivative=module.min_derivative, prescale=1 / math.sqrt(hidden),
        )  # fmt: skip
    except ValueError as error:
        raise Unsupported(str(error)) from None
    if not isinstance(tails, list):
        return Reading(spline, scale=scale)
    columns, ends = _columns(tails, bins, spline)
    constant = math.log(math.exp(1 - module.min_derivative) - 1)
    ends = Constant(ends, torch.bool) if mixed else None
    return Reading(spline, Constant(columns, torch.int64), ends, constant, scale, tuple(bounds))


def _bounds(bound: Any, features: int) -> list[float]:
    if not isinstance(bound, Tensor):
        return [float(bound)] * features
    if bound.dim() > 1 or bound.numel() not in (1, features):
        raise Unsupported(f"a tail_bound of shape {tuple(bound.shape)}")
    return bound.detach().double().expand(features).tolist()


def _columns(tails: list[str], bins: int, spline: Spline) -> tuple[list[int], list[bool]]:
    """A feature's raw slopes are those of all knots. Of linear tails the ends do not count, of circular ones the last
    knot is the first."""
    slopes = {"inner": range(1, bins), "periodic": range(bins), "all": range(bins + 1)}[spline.derivatives]
    columns, ends = [], []
    for feature, kind in enumerate(tails):
        start = feature * (3 * bins + 1)
        columns += range(start, start + 2 * bins)
        columns += [start + 2 * bins + (k % bins if kind == "circular" else k) for k in slopes]
        ends += [False] * 2 * bins + [kind == "linear" and k in (0, bins) for k in slopes]
    return columns, ends


# --- couplings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A coupling: its split, how the transformed half is read, and the identity half where that is transformed by
    itself. ``scale``: the bounds of all features, where they differ; ``inside``: where the original gives 0 beyond."""

    split: Split
    rest: Split
    main: Reading
    own: Reading | None
    scale: Constant | None = None
    inside: Constant | None = None


def plan_of(coupling: nn.Module) -> Plan:
    """Raises Unsupported."""
    split = Split.of(coupling.transform_features, coupling.identity_features)
    if split is None:
        raise Unsupported("its features are not the two parts of one whole")
    net, cdf = coupling.transform_net, coupling.unconditional_transform
    hidden = next((getattr(net, n) for n in ("hidden_features", "hidden_channels") if hasattr(net, n)), 1)
    main = reading_of(coupling, len(split.transformed), coupling.num_bins, hidden)
    own = None
    if cdf is not None:
        if class_of(cdf) != CDF or hooked(cdf):
            raise Unsupported("an unconditional transform of its own")
        own = cdf_reading(cdf)
        if cdf.unnormalized_widths.shape[0] != len(split.identity):
            raise Unsupported("an unconditional transform of another width")
    inside = _inside(split, main, own)
    main, own, scale = _rescaled(split, main, own)
    return Plan(split, Split(split.identity, split.transformed), main, own, scale, inside)


def _inside(split: Split, main: Reading, own: Reading | None) -> Constant | None:
    bounds = [math.inf] * (len(split.transformed) + len(split.identity))
    for reading, channels in ((main, split.transformed), (own, split.identity)):
        if reading is not None and reading.inside is not None:
            for channel, bound in zip(channels, reading.inside):
                bounds[channel] = bound
    return None if set(bounds) == {math.inf} else Constant(bounds, torch.float64, (1, -1))


def cdf_reading(cdf: nn.Module) -> Reading:
    if cdf.unnormalized_widths.dim() != 2:
        raise Unsupported("a spline for every position of an image")
    return reading_of(cdf, *cdf.unnormalized_widths.shape)


def _rescaled(split: Split, main: Reading, own: Reading | None) -> tuple[Reading, Reading | None, Constant | None]:
    """Where bounds differ within a half, all of x is brought to [-1, 1]."""
    if main.scale is None and (own is None or own.scale is None):
        return main, own, None
    bounds = [1.0] * (len(split.transformed) + len(split.identity))
    made = []
    for reading, channels in ((main, split.transformed), (own, split.identity)):
        if reading is not None:
            scale = reading.scale or (reading.spline.high,) * len(channels)
            for channel, bound in zip(channels, scale):
                bounds[channel] = bound
            reading = unit(reading)
        made.append(reading)
    return made[0], made[1], Constant(bounds, torch.float64, (1, -1))


def unit(reading: Reading) -> Reading:
    """The same with the bound 1."""
    s = reading.spline
    spline = Spline(
        bins=s.bins, tails=s.tails, low=-1.0, high=1.0, derivatives=s.derivatives, min_width=s.min_width,
        min_height=s.min_height, min_derivative=s.min_derivative, prescale=s.prescale,
    )  # fmt: skip
    return Reading(spline, reading.columns, reading.ends, reading.constant)


def takes(coupling: nn.Module, plan: Plan, x: Tensor) -> bool:
    """Images only where all features are read alike and the identity half is left alone."""
    plain = plan.own is None and plan.main.columns is None and plan.scale is None
    return x.shape[1] == coupling.features if x.dim() == 2 else x.dim() == 4 and plain and takes_channels(coupling, x)


def takes_channels(coupling: nn.Module, x: Tensor) -> bool:
    return x.shape[1] == coupling.features


def couple(coupling: nn.Module, plan: Plan, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """The op on the one half, and with a running log-determinant on the other. The network sees the identity half of
    x's side."""
    scale = None if plan.scale is None else plan.scale.on(x.device, x.dtype)
    y = x if scale is None else x / scale
    within = None if plan.inside is None else x.abs() <= plan.inside.on(x.device, x.dtype)
    log_det, kept = None, plan.split.kept(x)
    if inverse and plan.own is not None:
        y, log_det = _own(coupling, plan, y, None, True)
        kept = plan.split.kept(_whole(y, scale, within))
    params = plan.main.params(coupling.transform_net(kept, context))
    y, log_det = rational_quadratic_spline(
        y, params, spline=plan.main.spline, channel_map=plan.split.channel_map(x.device), logdet=log_det,
        inverse=inverse,
    )  # fmt: skip
    if not inverse and plan.own is not None:
        y, log_det = _own(coupling, plan, y, log_det, False)
    return _whole(y, scale, within), log_det


def _whole(y: Tensor, scale: Tensor | None, within: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if within is None else torch.where(within, y, 0.0)


def _own(coupling: nn.Module, plan: Plan, x: Tensor, log_det: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    params = plan.own.shared(coupling.unconditional_transform, x.shape[0])
    return rational_quadratic_spline(
        x, params, spline=plan.own.spline, channel_map=plan.rest.channel_map(x.device), logdet=log_det, inverse=inverse
    )


class Planned(Adapter):
    """A layer around ``inner(module)`` whose plan may not be possible."""

    def plan(self, module: nn.Module) -> Any:
        raise NotImplementedError

    def refuse(self, module: nn.Module) -> str | None:
        try:
            self.plan(module)
        except Unsupported as error:
            return str(error)
        return None

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _plan=self.plan(module))


@register(COUPLING)
class SplineCoupling(Planned):
    """A rational-quadratic spline of the transformed half, and one without a network of the other."""

    def plan(self, module: nn.Module) -> Plan:
        return plan_of(module)

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [m for m in (module.unconditional_transform,) if m is not None]

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.transform_net]

    class Layer:
        def forward(self, inputs, context=None):
            if not takes(self, self._plan, inputs):
                return super().forward(inputs, context)
            return couple(self, self._plan, inputs, context, False)

        def inverse(self, inputs, context=None):
            if not takes(self, self._plan, inputs):
                return super().inverse(inputs, context)
            return couple(self, self._plan, inputs, context, True)


@register(
    f"{_SPLINES}.wrapper.CoupledRationalQuadraticSpline", f"{_SPLINES}.wrapper.CircularCoupledRationalQuadraticSpline"
)
class WrappedSplineCoupling(Planned):
    """The coupling the other way round."""

    def plan(self, module: nn.Module) -> Plan:
        if class_of(module.prqct) != COUPLING:
            raise Unsupported(f"a {type(module.prqct).__name__} inside")
        return plan_of(module.prqct)

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.prqct, *SplineCoupling.parts(self, module.prqct)]

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.prqct.transform_net]

    class Layer:
        def forward(self, z, context=None):
            if not takes(self.prqct, self._plan, z):
                return super().forward(z, context)
            return couple(self.prqct, self._plan, z, context, True)

        def inverse(self, z, context=None):
            if not takes(self.prqct, self._plan, z):
                return super().inverse(z, context)
            return couple(self.prqct, self._plan, z, context, False)


@register(CDF)
class SplineCDF(Planned):
    """A spline of every feature, without a network."""

    def plan(self, module: nn.Module) -> Reading:
        reading = cdf_reading(module)
        if reading.scale is not None or reading.inside is not None:
            raise Unsupported("tails or bounds of its own for each feature, outside of a coupling")
        return reading

    class Layer:
        def forward(self, inputs, context=None):
            if inputs.dim() != 2:
                return super().forward(inputs, context)
            return _alone(self, inputs, False)

        def inverse(self, inputs, context=None):
            if inputs.dim() != 2:
                return super().inverse(inputs, context)
            return _alone(self, inputs, True)


def _alone(self: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    params = self._plan.shared(self, x.shape[0])
    return rational_quadratic_spline(x, params, spline=self._plan.spline, inverse=inverse)
