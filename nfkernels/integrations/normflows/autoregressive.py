"""normflows' masked autoregressive layers: ``flows.affine.autoregressive`` and ``flows.neural_spline.autoregressive``.

The affine one's ``forward`` (z -> x) is the direction of one pass, so that its density takes D; the spline's wrappers
turn theirs round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling, autoregressive_inverse, rational_quadratic_spline
from ..constants import Constant
from ..registry import class_of, register
from .made import Network, network_of
from .splines import Planned, Reading, Unsupported, reading_of, unit

_MASKED = "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive"
_WRAPPERS = "normflows.flows.neural_spline.wrapper"
_AFFINE = ScaleMap.nflows()
_LAYOUT = "scale_shift_interleaved"


@dataclass(frozen=True)
class Plan:
    """How the params are read (None: a scale and a shift), all features' bounds where they differ, those beyond which
    the original gives 0, and the network where the op knows it."""

    reading: Reading | None
    scale: Constant | None
    inside: Constant | None
    network: Network | None


def _takes(layer: nn.Module, x: Tensor) -> bool:
    return x.dim() == 2 and x.shape[1] == layer.autoregressive_net.initial_layer.in_features


def _run(layer: nn.Module, plan: Plan, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    net = layer.autoregressive_net
    if not inverse:
        return _elementwise(plan, x, net(x, context), False)
    if plan.network is not None and context is None and _exact(net, x):
        if plan.reading is None:
            return autoregressive_inverse(x, transform=_AFFINE, layout="scale_shift", **plan.network.arguments(net))
        return autoregressive_inverse(x, transform=plan.reading.spline, **plan.network.arguments(net))
    found = torch.zeros_like(x)
    for _ in range(x.shape[1]):
        found, log_det = _elementwise(plan, x, net(found, context), True)
    return found, log_det


def _exact(net: nn.Module, x: Tensor) -> bool:
    """Whether one evaluation of the network is like another: no dropout, and in the data's type."""
    dropout = net.training and any(b.dropout.p > 0 for b in net.blocks)
    same = net.final_layer.weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
    return same and not dropout and not torch.is_autocast_enabled(x.device.type)


def _elementwise(plan: Plan, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if plan.reading is None:
        return affine_coupling(x, raw, scale_map=_AFFINE, layout=_LAYOUT, inverse=inverse)
    scale = None if plan.scale is None else plan.scale.on(x.device, x.dtype)
    y, log_det = rational_quadratic_spline(
        x if scale is None else x / scale, plan.reading.params(raw), spline=plan.reading.spline, inverse=inverse
    )
    y = y if scale is None else y * scale
    if plan.inside is not None:
        y = torch.where(x.abs() <= plan.inside.on(x.device, x.dtype), y, 0.0)
    return y, log_det


class _Masked(Planned):
    """What is proved runs the kernel of all passes, which a hook on the network would turn off: the params are spread
    by the last layer's bias instead, and little: an inverse of D splines multiplies what it is given."""

    def network(self, module: nn.Module) -> nn.Module:
        return module.autoregressive_net

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        super().disturb(module, generator)
        bias = self.network(module).final_layer.bias
        with torch.no_grad():
            bias.add_((torch.rand(bias.shape, generator=generator) * 2 - 1).to(bias))


@register("normflows.flows.affine.autoregressive.MaskedAffineAutoregressive")
class MaskedAffineAutoregressive(_Masked):
    """``x (sigmoid(s + 2) + 1e-3) + t``, a feature's params side by side."""

    def plan(self, module: nn.Module) -> Plan:
        _check(module)
        return Plan(None, None, None, network_of(module.autoregressive_net))

    class Layer:
        def forward(self, inputs, context=None):
            if not _takes(self, inputs):
                return super().forward(inputs, context)
            return _run(self, self._plan, inputs, context, False)

        def inverse(self, inputs, context=None):
            if not _takes(self, inputs):
                return super().inverse(inputs, context)
            return _run(self, self._plan, inputs, context, True)


@register(_MASKED)
class MaskedSpline(_Masked):
    """A spline of every feature by those before it."""

    def plan(self, module: nn.Module) -> Plan:
        return _spline_plan(module)

    Layer = MaskedAffineAutoregressive.Layer


@register(
    f"{_WRAPPERS}.AutoregressiveRationalQuadraticSpline", f"{_WRAPPERS}.CircularAutoregressiveRationalQuadraticSpline"
)
class WrappedMaskedSpline(_Masked):
    """The masked spline the other way round."""

    def plan(self, module: nn.Module) -> Plan:
        if class_of(module.mprqat) != _MASKED:
            raise Unsupported(f"a {type(module.mprqat).__name__} inside")
        return _spline_plan(module.mprqat)

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.mprqat]

    def network(self, module: nn.Module) -> nn.Module:
        return module.mprqat.autoregressive_net

    class Layer:
        def forward(self, z, context=None):
            if not _takes(self.mprqat, z):
                return super().forward(z, context)
            return _run(self.mprqat, self._plan, z, context, True)

        def inverse(self, z, context=None):
            if not _takes(self.mprqat, z):
                return super().inverse(z, context)
            return _run(self.mprqat, self._plan, z, context, False)


def _check(layer: nn.Module) -> None:
    net = layer.autoregressive_net
    if class_of(net) != "normflows.nets.made.MADE":
        raise Unsupported(f"a {type(net).__name__} for its network")


def _spline_plan(layer: nn.Module) -> Plan:
    _check(layer)
    net = layer.autoregressive_net
    features = net.initial_layer.in_features
    reading = reading_of(layer, features, layer.num_bins, getattr(net, "hidden_features", 1))
    scale, inside = (
        None if v is None else Constant(v, torch.float64, (1, -1)) for v in (reading.scale, reading.inside)
    )
    plain = scale is None and inside is None
    return Plan(reading if scale is None else unit(reading), scale, inside, network_of(net) if plain else None)
