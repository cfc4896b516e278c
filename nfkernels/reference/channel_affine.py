"""Scale, shift and order of the channels in plain PyTorch: ``y[:, i] = x[:, order[i]] * scale[i] + shift[i]``."""

from __future__ import annotations

import torch
from torch import Tensor

from .affine_coupling import compute_dtype


def forward(x: Tensor, scale: Tensor, shift: Tensor, order: Tensor | None) -> Tensor:
    z = _ordered(x, order).to(compute_dtype(x))
    return (z * _per_channel(scale, x) + _per_channel(shift, x)).to(x.dtype)


def backward(x: Tensor, dy: Tensor, scale: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dscale, dshift)``; differentiable itself."""
    dtype, axes = compute_dtype(x), [0, *range(2, x.dim())]
    z, g = _ordered(x, order).to(dtype), dy.to(dtype)
    dx = (g * _per_channel(scale, x)).to(x.dtype)
    return _ordered(dx, None if order is None else torch.argsort(order)), (g * z).sum(axes), g.sum(axes)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(compute_dtype(x)).reshape(-1, *[1] * (x.dim() - 2))
