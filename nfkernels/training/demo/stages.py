"""What each layer of a flow does to points on their way from the base to the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...nn import ActNorm, Bijection, Chain, Flow, Permutation, Standardize
from ...nn.linear_bijection import ConstantJacobian

# These only rename or rescale the axes: every stage is shown as they will leave it, so that what moves is learned.
_FIXED = (Permutation, Standardize)
# These bend nothing: what they do is seen together with the layer before them.
_STRAIGHT = (*_FIXED, ConstantJacobian, ActNorm)


@torch.no_grad()
def stages(flow: Flow, z: Tensor) -> list[Tensor]:
    """Latents `[N, D]`, and what each layer that bends makes of them, in the data's coordinates: the last is the data
    that they become."""
    layers = flatten(flow.bijection)
    seen = [_to_data(layers, z)]
    while layers:
        layer = layers.pop()
        z = layer.inverse(z)[0]
        now = _to_data(layers, z)
        if not isinstance(layer, _STRAIGHT):
            seen.append(now)
        elif len(seen) > 1:
            seen[-1] = now
    return seen


def flatten(bijection: Bijection) -> list[Bijection]:
    """The layers in the order data meets them, chains in chains opened."""
    if isinstance(bijection, Chain):
        return [inner for layer in bijection for inner in flatten(layer)]
    return [bijection]


def _to_data(layers: list[Bijection], z: Tensor) -> Tensor:
    for layer in reversed(layers):
        if isinstance(layer, _FIXED):
            z = layer.inverse(z)[0]
    return z
