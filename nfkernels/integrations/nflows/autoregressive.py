"""nflows' masked autoregressive layers: ``nflows.transforms.autoregressive``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling, autoregressive_inverse, rational_quadratic_spline
from ..constants import specialised
from ..registry import register
from .made import Plain, plain
from .splines import outside, spline_of_module
from .steps import Step, StepAdapter, Total, added, joined


class _Autoregressive(StepAdapter):
    """Forward: the network as it is, then one op. Inverse: all passes in one op where the network is nflows' own, with
    the gradient of the solution in the place of one through every pass; else pass by pass, each with one op."""

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.autoregressive_net]


class _AutoregressiveStep(Step):
    _made: Plain | None

    def _fits(self, inputs: Tensor) -> bool:
        return inputs.dim() == 2

    def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
        if not self._fits(inputs):
            return self._original(inputs, context, inverse, total)
        net = self.autoregressive_net
        if not inverse:
            return joined(self._op, inputs, net(inputs, context), total, **self._options)
        # Under autocast the network's parts round: the way back is that of the forward if they do so again.
        low = self._made is None or torch.is_autocast_enabled(inputs.device.type)
        network = None if low else self._made.network(net, context)
        if network is not None:
            x, logdet = autoregressive_inverse(inputs, **network, transform=self._transform)
            return x, added(total, logdet)
        x = torch.zeros_like(inputs)
        for _ in range(inputs.shape[1] - 1):
            x, _ = self._op(inputs, net(x, context), inverse=True, **self._options)
        return joined(self._op, inputs, net(x, context), total, inverse=True, **self._options)


@register("nflows.transforms.autoregressive.MaskedAffineAutoregressiveTransform")
class MaskedAffineAutoregressive(_Autoregressive):
    """``x (softplus(r) + 1e-3) + t``, a scale and a shift for each feature side by side."""

    def layer(self, module: nn.Module) -> type:
        scale_map = ScaleMap("softplus", eps=module._epsilon)
        return specialised(self.Layer, _transform=scale_map, _made=plain(module.autoregressive_net, module.features))

    class Layer(_AutoregressiveStep):
        _op = staticmethod(affine_coupling)

        @property
        def _options(self) -> dict[str, Any]:
            return {"scale_map": self._transform, "layout": "scale_shift_interleaved"}

        def _fits(self, inputs: Tensor) -> bool:
            return inputs.dim() == 2 and inputs.shape[1] == self.features


@register("nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform")
class MaskedRationalQuadraticAutoregressive(_Autoregressive):
    """A rational-quadratic spline of each feature, linear tails or none."""

    def refuse(self, module: nn.Module) -> str | None:
        try:
            self.layer(module)
        except ValueError as error:
            return str(error)
        return None

    def layer(self, module: nn.Module) -> type:
        net = module.autoregressive_net
        spline = spline_of_module(module, net, module.num_bins, ("hidden_features",))
        made = plain(net, net.initial_layer.weight.shape[1]) if hasattr(net, "initial_layer") else None
        return specialised(self.Layer, _transform=spline, _made=made)

    class Layer(_AutoregressiveStep):
        _op = staticmethod(rational_quadratic_spline)

        @property
        def _options(self) -> dict[str, Any]:
            return {"spline": self._transform}

        def _fits(self, inputs: Tensor) -> bool:
            return inputs.dim() == 2 and not outside(self._transform, inputs)
