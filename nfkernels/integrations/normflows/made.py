"""normflows' MADE as the autoregressive inverse takes it: all passes in one kernel."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...nn.hooks import hooked
from ...ops import Degrees
from ...ops.autoregressive_inverse import MOST_LAYERS, ActivationName
from ..activations import activation_of
from ..constants import Constant
from ..registry import class_of

_MADE = "normflows.nets.made"


class Network:
    """A MADE whose degrees and activation the op knows. Its units are sorted by degree at every call: the weights are
    the module's own."""

    def __init__(self, degrees: Degrees, orders: tuple[Constant, ...], activation: str, residual: bool) -> None:
        self.degrees, self.activation, self.residual = degrees, activation, residual
        self._orders = orders
        self._key = degrees.features, degrees.hidden, orders, activation, residual

    def arguments(self, made: nn.Module) -> dict[str, Any]:
        """Weights, biases and the rest, as :func:`nfkernels.ops.autoregressive_inverse` takes them."""
        weights, biases, before = [], [], None
        for (weight, bias), order in zip(_layers(made, self.residual), self._orders):
            index = order.on(weight.device)
            weight = weight.index_select(0, index)
            weights.append(weight if before is None else weight.index_select(1, before))
            biases.append(bias.index_select(0, index))
            before = index
        last = made.final_layer
        n = len(weights)
        return {
            "weights": [*weights, last.weight.index_select(1, before)],
            "biases": [*biases, last.bias],
            "degrees": self.degrees,
            "activation": self.activation,
            "residual": [-1 if i % 2 or not i else i - 2 for i in range(n)] if self.residual else None,
            "final_activation": not self.residual,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _layers(made: nn.Module, residual: bool) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the hidden layers. Nothing stands between the first layer and a feedforward block's: they are
    one map."""
    linears = _linears(made)
    if residual:
        return [(m.weight, m.bias) for m in linears]
    first, second, *rest = linears
    inner, outer = first.weight * first.mask, second.weight * second.mask
    joined = outer @ inner, torch.addmv(second.bias, outer, first.bias)
    return [joined, *((m.weight, m.bias) for m in rest)]


def _linears(made: nn.Module) -> list[nn.Module]:
    inside = [m for b in made.blocks for m in (b.linear_layers if hasattr(b, "linear_layers") else [b.linear])]
    return [made.initial_layer, *inside]


def network_of(made: nn.Module) -> Network | None:
    """None for a network that the op does not know: another class, a hook, batch norm, its inputs changed first."""
    blocks = list(getattr(made, "blocks", ()))
    kinds = {class_of(b) for b in blocks}
    if class_of(made) != f"{_MADE}.MADE" or type(made.preprocessing) is not nn.Identity or len(kinds) != 1:
        return None
    if not kinds <= {f"{_MADE}.MaskedResidualBlock", f"{_MADE}.MaskedFeedforwardBlock"}:
        return None
    residual = kinds == {f"{_MADE}.MaskedResidualBlock"}
    linears = [*_linears(made), made.final_layer]
    if any(class_of(m) != f"{_MADE}.MaskedLinear" or m.bias is None for m in linears):
        return None
    norms = any(b.use_batch_norm if residual else b.batch_norm is not None for b in blocks)
    activations = {activation_of(b.activation, get_args(ActivationName)) for b in blocks}
    if norms or any(hooked(m) for m in made.modules()) or len(activations) != 1 or None in activations:
        return None
    hidden = linears[:-1] if residual else linears[1:-1]
    if len(hidden) > MOST_LAYERS:
        return None
    features = made.initial_layer.in_features
    orders = [torch.argsort(m.degrees, stable=True) for m in hidden]
    per_feature = made.final_layer.out_features // features
    try:
        degrees = Degrees(
            (made.final_layer.degrees[::per_feature] - 1).tolist(),
            [m.degrees[o].tolist() for m, o in zip(hidden, orders)],
        )
    except ValueError:
        return None
    if not _masked_alike(linears, hidden, degrees, orders, per_feature):
        return None
    return Network(degrees, tuple(Constant(o, torch.int64) for o in orders), activations.pop(), residual)


def _masked_alike(linears: list, hidden: list, degrees: Degrees, orders: list, per_feature: int) -> bool:
    """Whether the masks are those of the degrees. A first layer that is joined with the next one may only see less."""
    masks = [m.mask.bool().cpu() for m in linears]
    if len(hidden) < len(linears) - 1:
        masks = [(masks[1].double() @ masks[0].double()) > 0, *masks[2:]]
    wanted, before = degrees.masks(per_feature), None
    for i, (mask, want) in enumerate(zip(masks, wanted, strict=True)):
        mask = mask if i == len(orders) else mask[orders[i].cpu()]
        mask = mask if before is None else mask[:, before]
        joined = i == 0 and len(hidden) < len(linears) - 1
        if mask.shape != want.shape or bool((mask & ~want).any()) or (not joined and not torch.equal(mask, want)):
            return False
        before = orders[i].cpu() if i < len(orders) else None
    return True
