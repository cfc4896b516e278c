"""LU-parametrised matrices in plain PyTorch: ``W = P (L + I) (U + diag(s))``, its inverse, and the sum of ``log|s|``.

Everything is computed in float64 where the device has it and rounded once, so that W and W^-1 fit to the last digit.
Glow (Kingma & Dhariwal 2018, eq. 10-11); the softplus diagonal: nflows (Durkan et al. 2019, section 3.2).
"""

from __future__ import annotations

import contextlib
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Diagonal(IntEnum):
    """What makes s of its raw parameter r: ``sign exp(r)``, or ``softplus(r) + eps``. As in csrc/include/lu.h."""

    exp = 0
    softplus = 1


def exact_dtype(w: Tensor) -> torch.dtype:
    """float64 where the device has it: no TF32, and an inverse that matches its matrix to float32's last digit."""
    return torch.float32 if w.device.type == "mps" else torch.float64


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Data maths keeps its precision; meta tensors, which only carry shapes, have no autocast to turn off."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def diagonal_of(log_s: Tensor, sign: Tensor | None, diagonal: int, eps: float) -> tuple[Tensor, Tensor]:
    """``(s, log|s|)``, both like log_s."""
    if diagonal == Diagonal.exp:
        s = torch.exp(log_s)
        return s if sign is None else sign.to(s.dtype) * s, log_s
    s = F.softplus(log_s, threshold=50.0) + eps
    return s, torch.log(s)


def _factors(lower, upper, log_s, sign, diagonal, eps):
    """``(L, U, log|s|)`` in :func:`exact_dtype`: L strict, U with its diagonal."""
    dtype = exact_dtype(lower)
    s, log_abs = diagonal_of(log_s.to(dtype), sign, diagonal, eps)
    return lower.to(dtype).tril(-1), upper.to(dtype).triu(1) + torch.diag_embed(s), log_abs


def forward(
    lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None,
    diagonal: int, eps: float, need_weight: bool, need_inverse: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """``(weight, inverse, logdet)`` in lower's dtype, None where not needed; every argument already checked."""
    weight = inverse = None
    with no_autocast(lower.device.type):
        small, large, log_abs = _factors(lower, upper, log_s, sign, diagonal, eps)
        if need_weight:
            weight = torch.baddbmm(large, small, large)
            if permutation is not None:
                weight = torch.take_along_dim(weight, permutation[:, :, None], 1)
        if need_inverse:
            half = torch.eye(lower.shape[-1], dtype=small.dtype, device=small.device).expand_as(small)
            half = torch.linalg.solve_triangular(small, half, upper=False, unitriangular=True)
            inverse = torch.linalg.solve_triangular(large, half, upper=True)
            if permutation is not None:
                inverse = torch.take_along_dim(inverse, permutation[:, None, :], 2)
    weight, inverse = (None if t is None else t.to(lower.dtype) for t in (weight, inverse))
    return weight, inverse, log_abs.sum().to(lower.dtype)


def backward(
    lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None,
    inverse: Tensor | None, dweight: Tensor | None, dinverse: Tensor | None, dlogdet: Tensor | None,
    diagonal: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dlower, dupper, dlog_s)`` from the gradients of the outputs, of which each may be None; differentiable itself.

    ``inverse`` is the forward's own, needed where there is a ``dinverse``: no matrix is inverted again.
    """
    with no_autocast(lower.device.type):
        small, large, log_abs = _factors(lower, upper, log_s, sign, diagonal, eps)
        dtype = small.dtype
        dlower, dupper, dlog_s = torch.zeros_like(small), torch.zeros_like(small), torch.zeros_like(log_abs)
        grad = None if dweight is None else dweight.to(dtype)
        if dinverse is not None:
            v = inverse.to(dtype).mT
            through = torch.matmul(torch.matmul(v, dinverse.to(dtype)), v)
            grad = -through if grad is None else grad - through
        s = large.diagonal(dim1=-2, dim2=-1)
        slope = s if diagonal == Diagonal.exp else torch.sigmoid(log_s.to(dtype))
        if grad is not None:
            if permutation is not None:
                grad = torch.take_along_dim(grad, torch.argsort(permutation, -1)[:, :, None], 1)
            dlower = torch.matmul(grad, large.mT).tril(-1)
            both = grad + torch.matmul(small.mT, grad)
            dupper, dlog_s = both.triu(1), both.diagonal(dim1=-2, dim2=-1) * slope
        if dlogdet is not None:
            dlog_s = dlog_s + dlogdet.to(dtype) * (1.0 if diagonal == Diagonal.exp else slope / s)
    return dlower.to(lower.dtype), dupper.to(lower.dtype), dlog_s.to(lower.dtype)
