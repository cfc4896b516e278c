"""LU composition in Triton: ``W = P (L + I) (U + diag(s))``, its inverse and the sum of ``log|s|``, in float64.

A program holds a tile of columns (or rows) of one matrix in registers and goes through the rows of the factors one by
one: outer products for W and the gradients, substitution for the inverse, where row k of the tile is taken out by a
masked sum. Above ``LARGEST`` channels, where a tile would not fit, PyTorch's own routines serve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import lu_compose as reference
from ..reference.lu_compose import Diagonal
from . import _tiles as tiles

LARGEST = 128
TILE = 16  # columns of a program


@triton.jit
def _row(p_permutation, o_i, m_i, C):
    """Rows that a permutation names; an index outside would be somebody else's memory."""
    return tl.minimum(tl.maximum(tl.load(p_permutation + o_i, mask=m_i, other=0), 0), C - 1).to(tl.int32)


@triton.jit
def _diagonal(p_log_s, p_sign, offsets, mask, SOFTPLUS: tl.constexpr, EPS: tl.constexpr):
    """``s`` of the raw parameter, without and with its sign."""
    b_raw = tl.load(p_log_s + offsets, mask=mask, other=0.0).to(tl.float64)
    if SOFTPLUS:
        b_tail = tl.exp(-tl.abs(b_raw))
        b_more = 1.0 + b_tail  # log1p(tail): what the sum rounds away is made up for by the quotient
        b_lost = b_more - 1.0
        b_log1p = tl.where(b_lost == 0.0, b_tail, tl.log(b_more) * (b_tail / tl.where(b_lost == 0.0, 1.0, b_lost)))
        b_s = tl.maximum(b_raw, 0.0) + b_log1p + EPS
    else:
        b_s = tl.exp(b_raw)
        if p_sign is not None:
            b_s *= tl.load(p_sign + offsets, mask=mask, other=1.0).to(tl.float64)
    return b_raw, b_s


@triton.jit
def _weight_tile(
    p_lower, p_upper, p_log_s, p_sign, p_permutation, p_weight, i_tile, C,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of W; the pointers are one matrix's."""
    o_c = tl.arange(0, BLOCK_C)
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < C, o_n < C
    if p_permutation is not None:
        o_c_from = _row(p_permutation, o_c, m_c, C)
    else:
        o_c_from = o_c
    _, b_s = _diagonal(p_log_s, p_sign, o_n, m_n, SOFTPLUS, EPS)
    b_w = tl.zeros([BLOCK_C, BLOCK_N], tl.float64)
    for k in range(C):
        b_l = tl.load(p_lower + o_c_from * C + k, mask=m_c & (k < o_c_from), other=0.0).to(tl.float64)
        b_l = tl.where(o_c_from == k, 1.0, b_l)
        b_u = tl.load(p_upper + k * C + o_n, mask=m_n & (o_n > k), other=0.0).to(tl.float64)
        b_u = tl.where(o_n == k, b_s, b_u)
        b_w += b_l[:, None] * b_u[None, :]
    tl.store(
        p_weight + o_c[:, None] * C + o_n[None, :], b_w.to(p_weight.dtype.element_ty), mask=m_c[:, None] & m_n[None, :]
    )


@triton.jit
def _inverse_tile(
    p_lower, p_upper, p_log_s, p_sign, p_permutation, p_inverse, i_tile, C,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of W^-1 = U^-1 (L + I)^-1 P^T."""
    o_c = tl.arange(0, BLOCK_C)
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < C, o_n < C
    if p_permutation is not None:
        o_one = _row(p_permutation, o_n, m_n, C)
    else:
        o_one = o_n
    b_x = tl.where(o_c[:, None] == o_one[None, :], 1.0, 0.0).to(tl.float64)
    for k in range(C):
        b_l = tl.load(p_lower + o_c * C + k, mask=m_c & (o_c > k), other=0.0).to(tl.float64)
        b_row = tl.sum(tl.where((o_c == k)[:, None], b_x, 0.0), 0)
        b_x -= b_l[:, None] * b_row[None, :]
    for i in range(C):
        k = C - 1 - i
        b_u = tl.load(p_upper + o_c * C + k, mask=o_c < k, other=0.0).to(tl.float64)
        _, b_s = _diagonal(p_log_s, p_sign, k, True, SOFTPLUS, EPS)
        b_row = tl.sum(tl.where((o_c == k)[:, None], b_x, 0.0), 0) / b_s
        b_x = tl.where((o_c == k)[:, None], b_row[None, :], b_x - b_u[:, None] * b_row[None, :])
    tl.store(
        p_inverse + o_c[:, None] * C + o_n[None, :], b_x.to(p_inverse.dtype.element_ty),
        mask=m_c[:, None] & m_n[None, :],
    )  # fmt: skip


@triton.jit
def forward_kernel(
    p_lower, p_upper, p_log_s, p_sign, p_permutation, p_weight, p_inverse, p_logdet, C, n_all, n_tiles, n_programs,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_LOG: tl.constexpr,
):  # fmt: skip
    """Programs of a matrix: tiles of W, then of W^-1. The last program of all sums log|s|."""
    i_program = tl.program_id(0)
    if i_program == n_programs:
        b_sum = tl.zeros([BLOCK_LOG], tl.float64)
        for i_log in range(0, n_all, BLOCK_LOG):
            o_log = i_log + tl.arange(0, BLOCK_LOG)
            b_raw, b_s = _diagonal(p_log_s, None, o_log, o_log < n_all, SOFTPLUS, EPS)
            if SOFTPLUS:
                b_raw = tl.log(b_s)
            b_sum += tl.where(o_log < n_all, b_raw, 0.0)
        tl.store(p_logdet, tl.sum(b_sum, 0).to(p_logdet.dtype.element_ty))
    elif p_weight is not None or p_inverse is not None:
        BOTH: tl.constexpr = p_weight is not None and p_inverse is not None
        n_parts = 2 * n_tiles if BOTH else n_tiles
        i_k = (i_program // n_parts).to(tl.int64)
        i_part = i_program % n_parts
        o_square, o_row = i_k * C * C, i_k * C
        p_l, p_u, p_s = p_lower + o_square, p_upper + o_square, p_log_s + o_row
        p_g = None if p_sign is None else p_sign + o_row
        p_p = None if p_permutation is None else p_permutation + o_row
        if p_inverse is None:
            _weight_tile(p_l, p_u, p_s, p_g, p_p, p_weight + o_square, i_part, C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N)
        elif p_weight is None:
            _inverse_tile(p_l, p_u, p_s, p_g, p_p, p_inverse + o_square, i_part, C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N)
        elif i_part < n_tiles:
            _weight_tile(p_l, p_u, p_s, p_g, p_p, p_weight + o_square, i_part, C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N)
        else:
            _inverse_tile(
                p_l, p_u, p_s, p_g, p_p, p_inverse + o_square, i_part - n_tiles, C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N
            )


@triton.jit
def _lower_tile(
    p_grad, p_upper, p_log_s, p_sign, p_permutation, p_dlower, i_tile, C,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of dL = tril(G U^T) from the rows of P G."""
    o_i = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    m_i, m_c = o_i < C, o_c < C
    if p_permutation is not None:
        o_to = _row(p_permutation, o_i, m_i, C)
    else:
        o_to = o_i
    b_d = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    if p_grad is not None:
        _, b_s = _diagonal(p_log_s, p_sign, o_c, m_c, SOFTPLUS, EPS)
        for k in range(C):
            b_g = tl.load(p_grad + o_i * C + k, mask=m_i, other=0.0).to(tl.float64)
            b_u = tl.load(p_upper + o_c * C + k, mask=o_c < k, other=0.0).to(tl.float64)
            b_u = tl.where(o_c == k, b_s, b_u)
            b_d += b_g[:, None] * b_u[None, :]
    b_d = tl.where(o_c[None, :] < o_to[:, None], b_d, 0.0)
    tl.store(
        p_dlower + o_to[:, None] * C + o_c[None, :], b_d.to(p_dlower.dtype.element_ty), mask=m_i[:, None] & m_c[None, :]
    )


@triton.jit
def _upper_tile(
    p_grad, p_lower, p_log_s, p_sign, p_permutation, p_dlogdet, p_dupper, p_dlog_s, i_tile, C,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of dU = triu((L + I)^T G), and of dlog_s."""
    o_c = tl.arange(0, BLOCK_C)
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < C, o_n < C
    b_d = tl.zeros([BLOCK_C, BLOCK_N], tl.float64)
    if p_grad is not None:
        for i in range(C):
            if p_permutation is not None:
                i_row = tl.minimum(tl.maximum(tl.load(p_permutation + i), 0), C - 1).to(tl.int32)
            else:
                i_row = i
            b_g = tl.load(p_grad + i * C + o_n, mask=m_n, other=0.0).to(tl.float64)
            b_l = tl.load(p_lower + i_row * C + o_c, mask=o_c < i_row, other=0.0).to(tl.float64)
            b_l = tl.where(o_c == i_row, 1.0, b_l)
            b_d += b_l[:, None] * b_g[None, :]
    b_raw, b_s = _diagonal(p_log_s, p_sign, o_n, m_n, SOFTPLUS, EPS)
    b_slope = 1.0 / (1.0 + tl.exp(-b_raw)) if SOFTPLUS else b_s
    b_ds = tl.sum(tl.where(o_c[:, None] == o_n[None, :], b_d, 0.0), 0) * b_slope
    if p_dlogdet is not None:
        b_dlogdet = tl.load(p_dlogdet).to(tl.float64)
        b_ds += b_dlogdet * (b_slope / b_s) if SOFTPLUS else b_dlogdet
    tl.store(p_dlog_s + o_n, b_ds.to(p_dlog_s.dtype.element_ty), mask=m_n)
    b_d = tl.where(o_c[:, None] < o_n[None, :], b_d, 0.0)
    tl.store(
        p_dupper + o_c[:, None] * C + o_n[None, :], b_d.to(p_dupper.dtype.element_ty), mask=m_c[:, None] & m_n[None, :]
    )


@triton.jit
def backward_kernel(
    p_grad, p_lower, p_upper, p_log_s, p_sign, p_permutation, p_dlogdet, p_dlower, p_dupper, p_dlog_s, C, n_tiles,
    SOFTPLUS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Programs of a matrix: tiles of dL, then of dU and dlog_s. ``grad`` is that of W, whole."""
    i_program = tl.program_id(0)
    i_k = (i_program // (2 * n_tiles)).to(tl.int64)
    i_part = i_program % (2 * n_tiles)
    o_square, o_row = i_k * C * C, i_k * C
    p_s = p_log_s + o_row
    p_g = None if p_grad is None else p_grad + o_square
    p_f = None if p_sign is None else p_sign + o_row
    p_p = None if p_permutation is None else p_permutation + o_row
    if i_part < n_tiles:
        _lower_tile(
            p_g, p_upper + o_square, p_s, p_f, p_p, p_dlower + o_square, i_part, C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N
        )
    else:
        _upper_tile(
            p_g, p_lower + o_square, p_s, p_f, p_p, p_dlogdet, p_dupper + o_square, p_dlog_s + o_row, i_part - n_tiles,
            C, SOFTPLUS, EPS, BLOCK_C, BLOCK_N,
        )  # fmt: skip


# --- launchers: the raw ops ------------------------------------------------------------------------------------------


def _blocks(channels: int) -> tuple[int, int, int]:
    """``(BLOCK_C, BLOCK_N, warps)``: up to 16 float64 numbers of a tile to a thread."""
    block_c = tiles.power_of_2(channels)
    block_n = min(block_c, TILE)
    return block_c, block_n, min(max(block_c * block_n // 256, 1), 4)


def forward(
    lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None,
    diagonal: int, eps: float, need_weight: bool, need_inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(weight, inverse, logdet)``, empty where not needed; the raw op ``_lu_compose_forward``."""
    count, channels = log_s.shape
    if channels > LARGEST:
        made = reference.forward(
            lower, upper, log_s, sign, permutation, diagonal, eps, need_weight, need_inverse
        )  # fmt: skip
        weight, inverse = (lower.new_empty(0) if t is None else t.contiguous() for t in made[:2])
        return weight, inverse, made[2]
    weight, inverse = (torch.empty_like(lower) if need else None for need in (need_weight, need_inverse))
    logdet = lower.new_empty(())
    block_c, block_n, warps = _blocks(channels)
    n_tiles = tiles.divide_up(channels, block_n)
    n_programs = count * n_tiles * (need_weight + need_inverse)
    with tiles.on_device_of(lower):
        forward_kernel[(n_programs + 1,)](
            lower, upper, log_s, sign, permutation, weight, inverse, logdet,
            channels, count * channels, n_tiles, n_programs,
            SOFTPLUS=diagonal == Diagonal.softplus, EPS=eps, BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_LOG=256,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    weight, inverse = (lower.new_empty(0) if t is None else t for t in (weight, inverse))
    return weight, inverse, logdet


def backward(
    lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None,
    inverse: Tensor | None, dweight: Tensor | None, dinverse: Tensor | None, dlogdet: Tensor | None,
    diagonal: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dlower, dupper, dlog_s)``; the raw op ``_lu_compose_backward``."""
    count, channels = log_s.shape
    if channels > LARGEST:
        grads = reference.backward(
            lower, upper, log_s, sign, permutation, inverse, dweight, dinverse, dlogdet, diagonal, eps
        )  # fmt: skip
        return tuple(t.contiguous() for t in grads)
    dlower, dupper, dlog_s = torch.empty_like(lower), torch.empty_like(upper), torch.empty_like(log_s)
    if log_s.numel() == 0:
        return dlower, dupper, dlog_s
    grad = dweight
    if dinverse is not None:
        # Two plain batched products, which PyTorch's library does: only training on inverses comes here.
        v = inverse.double().mT
        through = torch.bmm(v, dinverse.double())
        given = through.new_zeros(()).expand_as(through) if dweight is None else dweight.double()
        grad = torch.baddbmm(given, through, v, alpha=-1.0)
    block_c, block_n, warps = _blocks(channels)
    n_tiles = tiles.divide_up(channels, block_n)
    with tiles.on_device_of(lower), reference.no_autocast(lower.device.type):
        backward_kernel[(2 * count * n_tiles,)](
            grad, lower, upper, log_s, sign, permutation, dlogdet, dlower, dupper, dlog_s, channels, n_tiles,
            SOFTPLUS=diagonal == Diagonal.softplus, EPS=eps, BLOCK_C=block_c, BLOCK_N=block_n,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dlower, dupper, dlog_s
