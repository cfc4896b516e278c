"""Channel mix (invertible 1x1 convolution) in plain PyTorch: ``y[b, :, p] = W x[b, :, p] + bias``.

An fp32 matrix product and not ``conv2d``, which autocasts and takes TF32 under cuDNN: at 1e-3 relative error a flow
stops being invertible. Glow (Kingma & Dhariwal 2018, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine_coupling import compute_dtype


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` in x's dtype; the product in float32 (float64 for float64 data), autocast off."""
    with torch.autocast(x.device.type, enabled=False):
        y = torch.matmul(
            weight, x.flatten(2).to(compute_dtype(x)) if x.dim() > 2 else x.to(compute_dtype(x))[..., None]
        )
        if bias is not None:
            y = y + bias[:, None]
    return y.reshape(x.shape[0], weight.shape[0], *x.shape[2:]).to(x.dtype)


def backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias)``; differentiable itself."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        dx = forward(dy, weight.t(), None)
        rows_dy = dy.to(dtype).transpose(0, 1).flatten(1)
        rows_x = x.to(dtype).transpose(0, 1).flatten(1)
        return dx.to(x.dtype), rows_dy @ rows_x.t(), rows_dy.sum(1)
