"""LU-factored linear map in plain PyTorch: ``y = P (L + I) (U + diag s) x + b`` at every position, and its inverse by
two triangular solves. L and U are the strict triangles of ``lower`` and ``upper``; the other halves are never read.

Glow (Kingma & Dhariwal 2018), section 3.2; nflows' ``LULinear`` has the softplus diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import channel_mix
from .affine_coupling import compute_dtype
from .lu_compose import Diagonal, diagonal_of, exact_dtype, no_autocast


def factors(lower, upper, log_s, sign, diagonal: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(L + I, U + diag s, ds / dlog_s)``; the diagonal in float64, rounded once."""
    wide = log_s.to(exact_dtype(log_s))
    s, _ = diagonal_of(wide, sign, diagonal, eps)
    slope = s if diagonal == Diagonal.exp else torch.sigmoid(wide)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return lower.tril(-1) + eye, upper.triu(1) + torch.diag(s.to(upper.dtype)), slope.to(log_s.dtype)


def forward(x, lower, upper, log_s, sign, permutation, bias, diagonal: int, eps: float, inverse: bool) -> Tensor:
    """y in x's dtype, or with ``inverse`` x from y; in float32 (float64 for float64 data), autocast off."""
    with no_autocast(x.device.type):
        z = x.to(compute_dtype(x))
        if not inverse:
            unit, u, _ = factors(lower, upper, log_s, sign, diagonal, eps)
            unit = unit if permutation is None else unit[permutation]
            return channel_mix.forward(channel_mix.forward(z, u, None), unit, bias).to(x.dtype)
        if bias is not None:
            z = z - bias.reshape(1, -1, *[1] * (x.dim() - 2))
        if permutation is not None:
            z = z[:, torch.argsort(permutation)]
        # A solve reads its triangle alone: assembling both would cost more than the solves.
        s, _ = diagonal_of(log_s.to(exact_dtype(log_s)), sign, diagonal, eps)
        z = _solve(lower, z, upper=False, unit=True)
        return _solve(torch.diagonal_scatter(upper, s.to(upper.dtype)), z, upper=True, unit=False).to(x.dtype)


def backward(
    dy, saved, lower, upper, log_s, sign, permutation, diagonal: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dlower, dupper, dlog_s, dbias)`` from the map's x: the input, or with ``inverse`` the output.

    With h = U x and dz = P^T dy: a = L^T dz, dx = U^T a, dL = dz h^T and dU = a x^T within their triangles. Inverted,
    dx comes first (``W^T dx = dy``, two solves) and takes dy's place in the rest, which is negated. Differentiable.
    """
    dtype = compute_dtype(saved)
    with no_autocast(saved.device.type):
        unit, u, slope = factors(lower, upper, log_s, sign, diagonal, eps)
        x, grad = saved.to(dtype), dy.to(dtype)
        if inverse:
            a = _solve(u.mT, grad, upper=False, unit=False)
            dz = _solve(unit.mT, a, upper=True, unit=True)
            dx = grad = dz if permutation is None else dz[:, permutation]
        else:
            dz = grad if permutation is None else grad[:, torch.argsort(permutation)]
            a = channel_mix.forward(dz, unit.mT, None)
            dx = channel_mix.forward(a, u.mT, None)
        h = channel_mix.forward(x, u, None)
        dlower = _outer(dz, h).tril(-1)
        da = _outer(a, x)
        dbias = grad.sum([0, *range(2, grad.dim())])
        if inverse:
            dlower, da, dbias = -dlower, -da, -dbias
        dlog_s = da.diagonal() * slope
    return dx.to(saved.dtype), dlower, da.triu(1), dlog_s, dbias


def _solve(a: Tensor, z: Tensor, *, upper: bool, unit: bool) -> Tensor:
    """``a^-1 z`` over axis 1 of z, shaped like it; all columns in one solve."""
    if channel_mix.row_major(z):
        rows = z.movedim(1, -1)
        # As columns of a transposed view, which LAPACK takes as it lies; from the right the rows would be copied.
        flat = rows.reshape(-1, rows.shape[-1]).t()
        made = torch.linalg.solve_triangular(a, flat, upper=upper, unitriangular=unit).t()
        return made.reshape(rows.shape).movedim(-1, 1)
    columns = z.transpose(0, 1)
    made = torch.linalg.solve_triangular(a, columns.reshape(columns.shape[0], -1), upper=upper, unitriangular=unit)
    return made.reshape(columns.shape).transpose(0, 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``sum a[:, i] b[:, j]`` over samples and positions."""
    if channel_mix.row_major(a):
        rows_a, rows_b = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (a, b))
        return rows_a.t() @ rows_b
    rows_a, rows_b = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (a, b))
    return rows_a @ rows_b.t()
