"""Channel mix (invertible 1x1 convolution) in plain PyTorch: ``y[b, :, p] = W x[b, :, p] + bias``.

An fp32 matrix product and not ``conv2d``, which autocasts and takes TF32 under cuDNN: at 1e-3 relative error a flow
stops being invertible. Glow (Kingma & Dhariwal 2018, section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine_coupling import compute_dtype
from .lu_compose import no_autocast


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` in x's dtype; the product in float32 (float64 for float64 data), autocast off."""
    dtype = compute_dtype(x)
    with no_autocast(x.device.type):
        if row_major(x):
            return F.linear(x.movedim(1, -1).to(dtype), weight, bias).movedim(-1, 1).to(x.dtype)
        y = torch.matmul(weight, x.flatten(2).to(dtype))
        if bias is not None:
            y = y + bias[:, None]
    return y.reshape(x.shape).to(x.dtype)


def backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias)``; differentiable itself."""
    dtype = compute_dtype(x)
    with no_autocast(x.device.type):
        dx = forward(dy, weight.t(), None)
        if row_major(x):
            rows_dy, rows_x = (t.to(dtype).movedim(1, -1).reshape(-1, t.shape[1]) for t in (dy, x))
            return dx.to(x.dtype), rows_dy.t() @ rows_x, rows_dy.sum(0)
        rows_dy, rows_x = (t.to(dtype).transpose(0, 1).flatten(1) for t in (dy, x))
        return dx.to(x.dtype), rows_dy @ rows_x.t(), rows_dy.sum(1)


def rebuild(y: Tensor, inverse: Tensor, bias: Tensor | None) -> Tensor:
    """The mix's input from its output, ``W^-1 (y - bias)``, in y's dtype."""
    shifted = y if bias is None else y - bias.reshape(1, -1, *[1] * (y.dim() - 2))
    return forward(shifted, inverse, None).to(y.dtype)


def row_major(x: Tensor) -> bool:
    """Whether a position's channels lie side by side (tables, channels-last): the mix is then one plain product."""
    return x.dim() == 2 or (x.stride(1) == 1 and x.shape[1] > 1)
