"""nflows' conditioner networks: ``nflows.nn.nets``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import nn

from ...nn.dense import run_at_once
from ...nn.hooks import hooked
from ...ops.dense_net import MOST_LAYERS, WIDEST, ActivationName
from ..activations import activation_of
from ..adapter import Adapter
from ..registry import qualified, register

_BLOCK = "nflows.nn.nets.resnet.ResidualBlock"


def _activation(function: Any) -> str | None:
    return activation_of(function, get_args(ActivationName))


def _too_big(hidden: int, layers: int) -> str | None:
    if hidden > WIDEST:
        return f"{hidden} hidden features: from {WIDEST} on, separate products are as fast"
    return f"{layers} layers" if layers > MOST_LAYERS else None


@register("nflows.nn.nets.resnet.ResidualNet")
class ResidualNet(Adapter):
    """All layers of a pre-activation residual network in one call, gated by the context where there is one."""

    bypassed = ("initial_layer", "blocks", "final_layer")

    def refuse(self, module: nn.Module) -> str | None:
        blocks = list(module.blocks)
        if any(qualified(type(b)) != _BLOCK for b in blocks) or not blocks:
            return "blocks of another kind" if blocks else "a network without blocks"
        if any(b.use_batch_norm for b in blocks):
            return "batch normalization"
        names = {_activation(b.activation) for b in blocks}
        if len(names) > 1 or None in names:
            return f"activation {getattr(blocks[0].activation, '__name__', blocks[0].activation)!r}"
        return _too_big(module.hidden_features, 2 + 2 * len(blocks))

    class Layer:
        def forward(self, inputs, context=None):
            blocks = self._modules["blocks"]._modules.values()
            for block in blocks:
                if hooked(block) or (self.training and block._modules["dropout"].p):
                    return super().forward(inputs, context)
            shares, given = None, inputs
            if context is not None:
                if not _meets(context, inputs):
                    return super().forward(inputs, context)
                given = torch.cat((inputs, context), dim=1)
                shares = torch.cat([block.context_layer(context) for block in blocks], dim=1)
            out = run_at_once(
                given, _layers(self), residual=True, activation=_activation(block.activation), shares=shares,
                share="none" if shares is None else "gate",
            )  # fmt: skip
            return super().forward(inputs, context) if out is None else out


def _meets(context: torch.Tensor, inputs: torch.Tensor) -> bool:
    small = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
    return small and context.dim() == inputs.dim() == 2 and context.dtype is inputs.dtype


def _layers(net: nn.Module) -> Iterator[nn.Module]:
    parts = net._modules
    yield parts["initial_layer"]
    for block in parts["blocks"]._modules.values():
        yield from block._modules["linear_layers"]._modules.values()
    yield parts["final_layer"]


@register("nflows.nn.nets.mlp.MLP")
class MLP(Adapter):
    """All layers of a multilayer perceptron in one call."""

    bypassed = ("_input_layer", "_hidden_layers", "_output_layer")

    def refuse(self, module: nn.Module) -> str | None:
        if module._activate_output:
            return "an activation of its output"
        if _activation(module._activation) is None:
            return f"activation {getattr(module._activation, '__name__', module._activation)!r}"
        if len(set(module._hidden_sizes)) > 1:
            return "hidden layers of several widths"
        if len(module._in_shape) != 1 or len(module._out_shape) != 1:
            return "inputs or outputs that are not vectors"
        return _too_big(module._hidden_sizes[0], 2 + len(module._hidden_layers))

    class Layer:
        def forward(self, inputs):
            if inputs.shape[1:] != self._in_shape:
                return super().forward(inputs)
            parts = self._modules
            layers = (parts["_input_layer"], *parts["_hidden_layers"]._modules.values(), parts["_output_layer"])
            out = run_at_once(inputs, layers, residual=False, activation=_activation(self._activation))
            return super().forward(inputs) if out is None else out
