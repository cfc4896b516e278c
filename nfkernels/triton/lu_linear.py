"""LU-factored linear map in Triton: ``y = P (L + I) (U + diag s) x + b`` at every position, or x from y.

Positions of all samples form one axis of M = B P. A program holds a tile [D, M] in registers and goes through the
triangles a row at a time: the row is taken out by a masked sum and its multiples go to the rows beside it, in plain
fp32. The order of the rows is that in which each is taken out before it changes (a product) or once it is done (a
solve), so one tile is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import Diagonal
from . import _tiles as tiles
from . import channel_mix, lu_compose
from .channel_mix import _positions
from .lu_compose import _diagonal

TILE = 4096  # elements that 4 warps hold; half as many in float64


@triton.jit
def _sweep(b_x, p_matrix, s_row, s_col, b_diagonal, o_d, D, LOWER: tl.constexpr, UNIT: tl.constexpr,
           SOLVE: tl.constexpr):  # fmt: skip
    """A triangle of ``A[row, col]`` times the tile, or its inverse; ``b_diagonal`` is then that of 1 / s."""
    for i_step in range(D):
        if LOWER == SOLVE:
            i_row = i_step
        else:
            i_row = D - 1 - i_step
        m_row = o_d == i_row
        m_beside = (o_d > i_row) & (o_d < D) if LOWER else o_d < i_row
        b_column = tl.load(p_matrix + o_d * s_row + i_row * s_col, mask=m_beside, other=0.0)
        b_row = tl.sum(tl.where(m_row[:, None], b_x, 0.0), 0)
        if UNIT:
            b_own = b_row
        else:
            b_own = b_row * tl.sum(tl.where(m_row, b_diagonal, 0.0), 0)
        if SOLVE:
            b_x = tl.where(m_row[:, None], b_own[None, :], b_x) - b_column[:, None] * b_own[None, :]
        else:
            b_x = tl.where(m_row[:, None], b_own[None, :], b_x) + b_column[:, None] * b_row[None, :]
    return b_x


@triton.jit
def sweep_kernel(
    p_x, p_lower, p_upper, p_log_s, p_sign, p_bias, p_place, p_y, M, D, P,
    s_xb, s_xc, s_xp, s_yb, s_yc, s_yp,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr, SOLVE: tl.constexpr,
    ONE_POSITION: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile [D, M]. Row d of a permuted tile is channel ``place[d]``: at the output of products and of transposed
    solves, else at the input."""
    i_m = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_place = o_d
    if p_place is not None:
        o_place = tl.load(p_place + o_d, mask=m_d, other=0).to(tl.int32)
    o_in = o_d if SOLVE == TRANSPOSED else o_place
    o_out = o_place if SOLVE == TRANSPOSED else o_d
    o_xm, m_m = _positions(i_m, M, P, s_xb, s_xp, ONE_POSITION, WIDE, BLOCK_M)
    o_xd = o_in.to(tl.int64) * s_xc if WIDE else o_in * s_xc
    b_x = tl.load(p_x + o_xm[None, :] + o_xd[:, None], mask=m_d[:, None] & m_m[None, :], other=0.0).to(DTYPE)
    _, b_s = _diagonal(p_log_s, p_sign, o_d, m_d, SOFTPLUS, EPS)
    b_diagonal = (1.0 / b_s if SOLVE else b_s).to(DTYPE)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_place, mask=m_d, other=0.0)
        if SOLVE:
            b_x -= b_bias[:, None]
    # The transposed factors change sides: U^T is the lower one and has the diagonal.
    if TRANSPOSED:
        if SOLVE:
            b_x = _sweep(b_x, p_upper, 1, D, b_diagonal, o_d, D, True, False, SOLVE)
            b_x = _sweep(b_x, p_lower, 1, D, b_diagonal, o_d, D, False, True, SOLVE)
        else:
            b_x = _sweep(b_x, p_lower, 1, D, b_diagonal, o_d, D, False, True, SOLVE)
            b_x = _sweep(b_x, p_upper, 1, D, b_diagonal, o_d, D, True, False, SOLVE)
    else:
        if SOLVE:
            b_x = _sweep(b_x, p_lower, D, 1, b_diagonal, o_d, D, True, True, SOLVE)
            b_x = _sweep(b_x, p_upper, D, 1, b_diagonal, o_d, D, False, False, SOLVE)
        else:
            b_x = _sweep(b_x, p_upper, D, 1, b_diagonal, o_d, D, False, False, SOLVE)
            b_x = _sweep(b_x, p_lower, D, 1, b_diagonal, o_d, D, True, True, SOLVE)
    if p_bias is not None and not SOLVE:
        b_x += b_bias[:, None]
    o_ym, m_m = _positions(i_m, M, P, s_yb, s_yp, ONE_POSITION, WIDE, BLOCK_M)
    o_yd = o_out.to(tl.int64) * s_yc if WIDE else o_out * s_yc
    tl.store(p_y + o_ym[None, :] + o_yd[:, None], b_x.to(p_y.dtype.element_ty), mask=m_d[:, None] & m_m[None, :])


# --- launchers: the raw ops ------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    lower: Tensor
    upper: Tensor
    log_s: Tensor
    sign: Tensor | None
    permutation: Tensor | None
    diagonal: int
    eps: float


def _launch(x: Tensor, y: Tensor, f: Factors, bias: Tensor | None, transposed: bool, solve: bool) -> None:
    dtype = f.lower.dtype
    place = None if f.permutation is None else torch.argsort(f.permutation)
    width, size = x.shape[1], tiles.positions(x)
    count = x.shape[0] * size
    block_d = tiles.power_of_2(width)
    block_m = max(16, min(256, (TILE if dtype == torch.float32 else TILE // 2) // block_d))
    sweep_kernel[(tiles.divide_up(count, block_m),)](
        x, f.lower, f.upper, f.log_s, f.sign, bias, place, y, count, width, size, *tiles.strides(x), *tiles.strides(y),
        SOFTPLUS=f.diagonal == Diagonal.softplus, EPS=f.eps, TRANSPOSED=transposed, SOLVE=solve,
        ONE_POSITION=size == 1, WIDE=count >= 2**30 or tiles.is_wide(x, y),
        DTYPE=tiles.TRITON_DTYPE[dtype], BLOCK_D=block_d, BLOCK_M=block_m,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def forward(
    x: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, diagonal: int, eps: float, inverse: bool,
) -> Tensor:  # fmt: skip
    """``y``, or with ``inverse`` x; the raw op ``_lu_linear_forward``, every argument already checked."""
    y = torch.empty_like(x)
    if y.numel():
        with tiles.on_device_of(x):
            _launch(x, y, Factors(lower, upper, log_s, sign, permutation, diagonal, eps), bias, False, inverse)
    return y


def backward(
    dy: Tensor, saved: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None,
    permutation: Tensor | None, diagonal: int, eps: float, inverse: bool,
    need_dx: bool, need_dparams: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dlower, dupper, dlog_s, dbias)``, empty where not needed; the raw op ``_lu_linear_backward``."""
    factors = Factors(lower, upper, log_s, sign, permutation, diagonal, eps)
    sums = need_dparams or need_dbias
    dx, grad, x = saved.new_empty(0), dy, saved
    if need_dx or (inverse and sums):
        # Inverted, the gradient of W is made of dx: before it is rounded.
        dx = torch.empty_like(saved, dtype=compute_dtype(saved) if inverse and sums else saved.dtype)
        if dx.numel():
            with tiles.on_device_of(dy):
                _launch(dy, dx, factors, None, True, inverse)
        if inverse and sums:
            grad, x = dx, saved.to(dx.dtype)
            dx = dx.to(saved.dtype) if need_dx else saved.new_empty(0)
    dparams = [lower.new_empty(0)] * 3
    dbias = lower.new_empty(0)
    if sums:
        _, dweight, dbias, _ = channel_mix.backward(x, lower, grad, None, None, False, need_dparams, need_dbias)
        if inverse:
            dweight, dbias = -dweight, -dbias
        if need_dparams:
            stacked = [None if t is None else t[None] for t in factors[:5]]
            made = lu_compose.backward(*stacked, None, dweight[None], None, None, diagonal, eps)
            dparams = [t[0] for t in made]
    return dx, *dparams, dbias
