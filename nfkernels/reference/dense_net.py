"""Fully connected conditioners in plain PyTorch: residual nets and multilayer perceptrons, and their gradients.

Residual: ``h = W0 x + b0``, blocks ``h + (W2 act(W1 act(h) + b1) + b2)``, ``y = Wl h + bl`` (Durkan et al. 2019,
appendix B.1). Otherwise ``y = Wl act(... act(W0 x + b0)) + bl``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(IntEnum):
    relu = 0
    leaky_relu = 1
    elu = 2
    tanh = 3
    silu = 4
    softplus = 5


class Share(IntEnum):
    """What a context's linear map does: a gate multiplies each block's output by its sigmoid; an addend is added to the
    first layer's output and to each block's."""

    none = 0
    gate = 1
    add = 2


def value(z: Tensor, activation: int) -> Tensor:
    return _VALUES[activation](z)


_VALUES = (F.relu, F.leaky_relu, F.elu, torch.tanh, F.silu, F.softplus)


def slope(z: Tensor, activation: int) -> Tensor:
    return _SLOPES[activation](z)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s + z * s * (1 - s)


_SLOPES = (
    lambda z: (z > 0).to(z.dtype),
    lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.01)),
    lambda z: torch.where(z > 0, torch.ones_like(z), torch.exp(-z.abs())),
    lambda z: 1 - torch.tanh(z) ** 2,
    _silu_slope,
    torch.sigmoid,
)


def stages(x, shares, weights, residual: bool, activation: int, share: int) -> tuple[list[Tensor], list[Tensor]]:
    """What a backward needs: the first layer's output and each hidden one's (of a block's second its sum), and where
    gated each block's before its gate."""
    hidden = weights[0].shape[0]
    parts: Sequence[Tensor] = shares.split(hidden, 1) if shares is not None else ()
    h = F.linear(x, weights[0], weights[1])
    if share == Share.add:
        h = h + parts[0]
    kept, ungated = [h], []
    for i in range(2, len(weights) - 2, 2):
        second = residual and i % 4 == 0
        before = kept[-2] if second else None
        t = F.linear(value(h, activation), weights[i], weights[i + 1])
        if second:
            block = i // 4 - 1
            if share == Share.gate:
                ungated.append(t)
                t = t * torch.sigmoid(parts[block])
            elif share == Share.add:
                t = t + parts[block + 1]
            t = before + t
        kept.append(t)
        h = t
    return kept, ungated


def forward(x, shares, weights, residual: bool, activation: int, share: int) -> Tensor:
    """``[B, out]``; ``weights``: each layer's weight and bias in turn."""
    h = stages(x, shares, weights, residual, activation, share)[0][-1]
    return F.linear(h if residual else value(h, activation), weights[-2], weights[-1])


def backward(
    dy, x, shares, weights, residual: bool, activation: int, share: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """``(dx, dshares, dweights)``. Differentiable itself."""
    kept, ungated = stages(x, shares, weights, residual, activation, share)
    grads: list[Tensor | None] = [None] * len(weights)
    parts = shares.split(weights[0].shape[0], 1) if shares is not None else ()
    dparts: list[Tensor | None] = [None] * len(parts)

    def through(i: int, up: Tensor, given: Tensor) -> Tensor:
        grads[i], grads[i + 1] = up.mT @ given, up.sum(0)
        return up @ weights[i]

    last = len(weights) - 2
    if residual:
        dh = through(last, dy, kept[-1])
    else:
        dh = through(last, dy, value(kept[-1], activation)) * slope(kept[-1], activation)
    layer = len(kept) - 1
    while layer > 0:
        if not residual:
            dh = through(2 * layer, dh, value(kept[layer - 1], activation)) * slope(kept[layer - 1], activation)
            layer -= 1
            continue
        block, up = layer // 2 - 1, dh
        if share == Share.gate:
            gate = torch.sigmoid(parts[block])
            up = dh * gate
            dparts[block] = up * ungated[block] * (1 - gate)
        elif share == Share.add:
            dparts[block + 1] = dh
        t, h = kept[layer - 1], kept[layer - 2]
        dt = through(2 * layer, up, value(t, activation)) * slope(t, activation)
        dh = dh + through(2 * layer - 2, dt, value(h, activation)) * slope(h, activation)
        layer -= 2
    if share == Share.add:
        dparts[0] = dh
    dx = through(0, dh, x)
    return dx, torch.cat(dparts, 1) if parts else None, grads


def padded(hidden: int, itemsize: int) -> int:
    """Saved rows are whole cache lines."""
    return math.ceil(hidden * itemsize / 64) * 64 // itemsize
