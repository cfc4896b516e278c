"""Gaussian log-density in plain PyTorch: the specification of the kernels, their fallback, and their double backward.

``out[b] = sum_i log N(x[b, i]; mean[b, i], exp(log_scale[b, i])^2)``, standard normal without params.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .affine_coupling import Layout, compute_dtype

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def forward(x, params, logdet, layout: Layout) -> Tensor:
    """``[B]``: see :func:`nfkernels.ops.gaussian_log_density`; every argument already checked."""
    eps, _, log_scale = _standardised(x, params, layout)
    total = eps.square().flatten(1).sum(1).mul(-0.5) - HALF_LOG_2PI * x.shape[1:].numel()
    if log_scale is not None:
        total = total - log_scale.flatten(1).sum(1)
    return total if logdet is None else logdet + total


def backward(x, params, dout, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """``(dx, dparams)``, dparams None without params; differentiable itself."""
    eps, precision, _ = _standardised(x, params, layout)
    d = dout.to(eps.dtype).reshape(-1, *[1] * (x.dim() - 1))
    if params is None:
        return (-d * eps).to(x.dtype), None
    dmean = d * (eps * precision)
    dlog_scale = d * (eps.square() - 1)
    return (-dmean).to(x.dtype), _join(dmean, dlog_scale, layout).to(params.dtype)


def _standardised(x, params, layout: Layout) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(x - mean) / sigma``, ``1 / sigma`` and ``log sigma`` in the arithmetic's type."""
    dtype = compute_dtype(x)
    if params is None:
        return x.to(dtype), None, None
    if layout in (Layout.shift_scale, Layout.scale_shift):
        half = params.shape[1] // 2
        parts = [params.narrow(1, 0, half), params.narrow(1, half, half)]
    else:
        parts = [params[:, 0::2], params[:, 1::2]]
    if layout in (Layout.scale_shift, Layout.scale_shift_interleaved):
        parts.reverse()
    mean, log_scale = (v.to(dtype) for v in parts)
    precision = torch.exp(-log_scale)
    return (x.to(dtype) - mean) * precision, precision, log_scale


def _join(dmean: Tensor, dlog_scale: Tensor, layout: Layout) -> Tensor:
    pair = [dmean, dlog_scale]
    if layout in (Layout.scale_shift, Layout.scale_shift_interleaved):
        pair.reverse()
    if layout in (Layout.shift_scale, Layout.scale_shift):
        return torch.cat(pair, 1)
    return torch.stack(pair, 2).flatten(1, 2)
