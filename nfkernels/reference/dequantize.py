"""Dequantisation in plain PyTorch: whole grey levels to ``[0, 1)``, and to the whole line by a logit.

``v = (x + u) / levels`` with u uniform in ``[0, 1)`` (Theis et al. 2016, section 3.1), then, where an ``alpha`` is
given, ``w = alpha + (1 - 2 alpha) v`` and ``y = log w - log(1 - w)`` (RealNVP, Dinh et al. 2017, section 4.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import philox

# The largest v below 1 of each dtype of y.
_LARGEST = {
    torch.float32: 1 - 2.0**-24,
    torch.float64: 1 - 2.0**-53,
    torch.bfloat16: 1 - 2.0**-8,
    torch.float16: 1 - 2.0**-11,
}


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic, and of the log-determinant, for y of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(x, key, logdet, levels: float, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``; alpha < 0 means no logit, and a logdet that is the running one or zero."""
    compute = arithmetic(dtype)
    v = _unit(x.to(compute), philox.uniform(x.shape, key, compute), levels, _LARGEST[compute if alpha >= 0 else dtype])
    if alpha < 0:
        return v.to(dtype), x.new_zeros(x.shape[0], dtype=compute) if logdet is None else logdet.clone()
    span = 1 - 2 * alpha
    # 1 - w from 1 - v, which is exact where w is near 1: log1p(-w) would have lost its digits.
    a, b = torch.log(alpha + span * v), torch.log(alpha + span * (1 - v))
    total = (math.log(span) - a - b).flatten(1).sum(1)
    return (a - b).to(dtype), total if logdet is None else logdet + total


def backward(y, dy, dlogdet, levels: float, alpha: float) -> Tensor:
    """``dx`` from the output alone, in y's dtype; differentiable itself."""
    compute = arithmetic(y.dtype)
    dy = torch.zeros_like(y) if dy is None else dy
    if alpha < 0:
        return (dy.to(compute) * (1 / levels)).to(y.dtype)
    wide = y.to(compute)
    # dw/dx (dy + dlogdet (2w - 1)) / (w (1 - w)), with 2w - 1 = tanh(y / 2) and 1 / (w (1 - w)) = 4 cosh(y / 2)^2
    grad = dy.to(compute)
    if dlogdet is not None:
        grad = grad + dlogdet.to(compute).reshape(-1, *[1] * (y.dim() - 1)) * torch.tanh(wide / 2)
    return ((1 - 2 * alpha) / levels * grad * (2 * torch.cosh(wide / 2)).square()).to(y.dtype)


def _unit(x: Tensor, u: Tensor, levels: float, largest: float) -> Tensor:
    """``(x + u) / levels``, kept by a unit in the last place or two from rounding into a neighbour's grey level."""
    v = (x + u) * (1 / levels)
    kept, back = v.detach(), (v * levels).detach()
    up, down = torch.full_like(kept, math.inf), torch.full_like(kept, -math.inf)
    low, high = back < x, back >= x + 1
    kept = torch.where(low, torch.nextafter(kept, up), kept)
    kept = torch.where(high, torch.nextafter(torch.nextafter(kept, down), down), kept)
    return kept.clamp(max=largest) + (v - v.detach())  # the value of the one, the gradient of the other
