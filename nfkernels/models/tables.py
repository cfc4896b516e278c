"""What flows over the columns of a table are made of: networks, masks, mixing layers, and checks of their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..nn import masks
from ..nn.bases import Base, StandardNormal
from ..nn.bijection import Bijection
from ..nn.conditioners import MLP, Activation, ResidualNet
from ..nn.lu_linear import LULinear
from ..nn.permutation import Permutation

Network = Literal["mlp", "residual"]
Linear = Literal["lu", "permutation", "none"]
Mask = Literal["alternating", "halves", "random"]


def check_choice(name: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(map(repr, known))}")


def check_table(features: int, layers: int, hidden: int, context: int, embed: nn.Module | None, who: str) -> None:
    if not isinstance(features, int) or features < 1:
        raise ValueError(f"{who} takes the number of features, at least 1, got {features!r}")
    if layers < 1:
        raise ValueError(f"{who} needs at least 1 layer, got {layers}")
    if hidden < 1:
        raise ValueError(f"{who} needs networks of hidden width at least 1, got hidden={hidden}")
    if context < 0:
        raise ValueError(f"context is the width of what the networks are given, at least 0, got {context}")
    if embed is not None and not context:
        raise ValueError(f"{who} has an embed= network but context=0: give the width of what that network returns")


def base_over(features: int, base: Base | None, default: Callable[[int], Base] = StandardNormal) -> Base:
    if base is None:
        return default(features)
    if tuple(base.shape) != (features,):
        raise ValueError(f"the base of a flow over {features} features has that shape, got {tuple(base.shape)}")
    return base


def make_network(
    kind: Network,
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    depth: int,
    context: int,
    activation: Activation,
    dropout: float,
) -> MLP | ResidualNet:
    """``depth`` counts an MLP's hidden layers, a residual network's blocks."""
    check_choice("network", kind, Network)
    options: dict[str, Any] = {"context_channels": context, "activation": activation, "dropout": dropout}
    if kind == "mlp":
        return MLP(inputs, hidden, outputs, layers=depth, **options)
    return ResidualNet(inputs, hidden, outputs, blocks=depth, **options)


def coupling_masks(kind: Mask, features: int, layers: int, angles: Tensor | None = None) -> list[Tensor | None]:
    """One for each layer; layers 2 i and 2 i + 1 transform every column between them. None for one column.

    Random ones transform half of the ``angles`` and half of the others, so that every draw makes the same networks.
    """
    check_choice("mask", kind, Mask)
    made: list[Tensor | None] = []
    for i in range(layers):
        if features == 1:
            made.append(None)
        elif i % 2 == 1:
            made.append(~made[-1])
        elif kind == "random":
            made.append(_random_mask(torch.zeros(features, dtype=torch.bool) if angles is None else angles))
        else:
            made.append(masks.alternating(features) if kind == "alternating" else masks.halves(features))
    return made


def _random_mask(angles: Tensor) -> Tensor:
    found = []
    for kind, up in ((~angles, 1), (angles, 0)):  # rounded up and down: of one column each, one is transformed
        columns = kind.nonzero()[:, 0]
        found += columns[torch.randperm(len(columns))[: (len(columns) + up) // 2]].tolist()
    return masks.channels(len(angles), found)


def mixing(kind: Linear, features: int) -> list[Bijection]:
    """What stands before a coupling: nothing, or a layer. Of two columns the masks take turns, and none is permuted."""
    check_choice("linear", kind, Linear)
    if kind == "lu":
        return [LULinear(features, permutation="random" if features > 2 else "none")]
    if kind == "permutation" and features > 1:
        order = torch.randperm(features) if features > 2 else torch.tensor([1, 0])
        return [Permutation(features, permutation=order)]
    return []
