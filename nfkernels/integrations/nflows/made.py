"""nflows' MADE as :func:`nfkernels.ops.autoregressive_inverse` takes a masked network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...nn.hooks import hooked
from ...ops import Degrees
from ...ops.autoregressive_inverse import MOST_LAYERS, ActivationName
from ..activations import activation_of
from ..constants import Constant
from ..registry import class_of

_HOME = "nflows.transforms.made."


@dataclass(frozen=True)
class Plain:
    """What is fixed of a MADE without batch norm: the degrees, in order, and where each hidden unit went."""

    degrees: Degrees
    orders: tuple[Constant | None, ...]  # per hidden layer, None where the units lie in order already
    activation: str
    residual: bool

    def network(self, made: nn.Module, context: Tensor | None) -> dict[str, Any] | None:
        """The options of the op; None where this call needs the network itself: dropout, a hook on a part of it."""
        if not _untouched(made):
            return None
        layers = _layers(made)
        orders = [None, *(o if o is None else o.on(layers[0].weight.device) for o in self.orders), None]
        weights, biases = [], []
        for layer, before, after in zip(layers, orders, orders[1:]):
            weight, bias = layer.weight, layer.bias
            if after is not None:
                weight, bias = weight.index_select(0, after), bias.index_select(0, after)
            weights.append(weight if before is None else weight.index_select(1, before))
            biases.append(bias)
        contexts: list[Tensor | None] = [None] * len(self.orders)
        if context is not None:
            contexts[0] = made.activation(made.context_layer(context))
            if self.residual:
                contexts[1::2] = [block.context_layer(context) for block in made.blocks]
            contexts = [c if c is None or o is None else c.index_select(1, o) for c, o in zip(contexts, orders[1:-1])]
        return {
            "weights": weights,
            "biases": biases,
            "degrees": self.degrees,
            "context": contexts,
            "activation": self.activation,
            "residual": [-1, *(n for i in range(len(made.blocks)) for n in (-1, 2 * i))] if self.residual else None,
            "final_activation": not self.residual,
        }


def plain(made: nn.Module, features: int) -> Plain | None:
    """The network if it is nflows' own MADE of masked linear layers, its masks those of its degrees; else None."""
    if _name(made) != "MADE" or not _known_blocks(made):
        return None
    layers = _layers(made)
    activation = activation_of(made.activation, get_args(ActivationName))
    same = all(block.activation is made.activation for block in made.blocks)
    if activation is None or not same or len(layers) - 1 > MOST_LAYERS:
        return None
    if any(_name(layer) != "MaskedLinear" or layer.bias is None for layer in layers):
        return None
    hidden = [layer.degrees.tolist() for layer in layers[:-1]]
    orders = [sorted(range(len(d)), key=d.__getitem__) for d in hidden]
    degrees = Degrees(range(features), [[d[i] for i in o] for d, o in zip(hidden, orders)])
    count, left = divmod(layers[-1].weight.shape[0], features)
    if left or layers[0].weight.shape[1] != features:
        return None
    before = list(range(features))
    masks = degrees.masks(count)
    for layer, mask, after in zip(layers, masks, [*orders, list(range(features * count))]):
        if not torch.equal(layer.mask.cpu()[after][:, before] != 0, mask):
            return None
        before = after
    kept = tuple(None if o == list(range(len(o))) else Constant(o) for o in orders)
    return Plain(degrees, kept, activation, bool(made.use_residual_blocks))


def _name(module: nn.Module) -> str:
    return class_of(module).removeprefix(_HOME)


def _known_blocks(made: nn.Module) -> bool:
    kind = "MaskedResidualBlock" if made.use_residual_blocks else "MaskedFeedforwardBlock"
    for block in made.blocks:
        if _name(block) != kind or getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None):
            return False
    return True


def _layers(made: nn.Module) -> list[nn.Module]:
    between = [layer for b in made.blocks for layer in (b.linear_layers if made.use_residual_blocks else (b.linear,))]
    return [made.initial_layer, *between, made.final_layer]


def _untouched(made: nn.Module) -> bool:
    for part in made.modules():
        if hooked(part) or (part.training and isinstance(part, nn.Dropout) and part.p > 0):
            return False
    return True
