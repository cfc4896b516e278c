"""Channel mix (invertible 1x1 convolution) in Triton: ``y[b, :, p] = W x[b, :, p] + bias`` at fp32 accuracy.

Positions of all samples form one axis of M = B P, so every layout and any P fill the tiles. Up to 16 channels, every
thread multiplies whole columns in registers; above, tiles go through ``tl.dot``: IEEE, and 3xTF32 (fp32 accuracy from
tensor cores) from 32 channels on NVIDIA, where plain fp32 would be bound by arithmetic. Never plain TF32: a flow stops
being invertible. The weight's gradient comes from the pass that makes dx, as one partial per program.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from . import _tiles as tiles

REGISTER_CHANNELS = 16  # up to here products are register sums, above they are dots
TENSOR_CORE_CHANNELS = 32  # from here 3xTF32 on NVIDIA
MOST_TILES = 16  # of a program that keeps the weight in registers
FUSED_CHANNELS = 64  # up to here one program holds all of dW; above, dW is made in blocks and dx by itself


@triton.jit
def _positions(i_tile, M, P, s_b, s_p, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets of a tile's positions in ``[B, P]``, and which exist."""
    if WIDE:
        o_m = i_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if ONE_POSITION:
        o_bp = o_m.to(tl.int64) * s_b
    else:
        o_bp = (o_m // P).to(tl.int64) * s_b + (o_m % P) * s_p
    return o_bp, o_m < M


@triton.jit
def _weight(p_weight, o_j, o_k, s_wj, s_wk, C, IN_REGISTERS: tl.constexpr, DTYPE: tl.constexpr):
    """The matrix ``a[j, k]`` that ``_product`` takes: as [K, J] for register sums, as [J, K] for dots."""
    if IN_REGISTERS:
        b_w = tl.load(
            p_weight + (o_k[:, None] * s_wk + o_j[None, :] * s_wj),
            mask=(o_k < C)[:, None] & (o_j < C)[None, :], other=0.0,
        )  # fmt: skip
    else:
        b_w = tl.load(
            p_weight + (o_j[:, None] * s_wj + o_k[None, :] * s_wk),
            mask=(o_j < C)[:, None] & (o_k < C)[None, :], other=0.0,
        )  # fmt: skip
    return b_w.to(DTYPE)


@triton.jit
def _product(b_w, b_x, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``a [J, K] @ x [K, M]``. In registers K is the outermost axis, which Triton keeps inside a thread."""
    if IN_REGISTERS:
        b_y = tl.sum(b_w[:, :, None] * b_x[:, None, :], 0)
    else:
        b_y = tl.dot(b_w, b_x, input_precision=PRECISION, out_dtype=DTYPE)
    return b_y


@triton.jit
def _forward_tile(
    i_m, p_x, p_weight, p_y, b_w, b_bias, o_j, M, C, P,
    s_xb, s_xc, s_xp, s_wj, s_wk, s_yb, s_yc, s_yp,
    ONE_POSITION: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    o_xm, m_m = _positions(i_m, M, P, s_xb, s_xp, ONE_POSITION, WIDE, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    if IN_REGISTERS:
        o_kx = o_k.to(tl.int64) * s_xc if WIDE else o_k * s_xc
        b_x = tl.load(p_x + o_xm[None, :] + o_kx[:, None], mask=(o_k < C)[:, None] & m_m[None, :], other=0.0)
        b_y = _product(b_w, b_x.to(DTYPE), IN_REGISTERS, PRECISION, DTYPE)
    else:
        b_y = tl.zeros([BLOCK_J, BLOCK_M], DTYPE)
        for i_k in range(0, C, BLOCK_K):
            o_ik = i_k + o_k
            o_kx = o_ik.to(tl.int64) * s_xc if WIDE else o_ik * s_xc
            b_wk = _weight(p_weight, o_j, o_ik, s_wj, s_wk, C, IN_REGISTERS, DTYPE)
            b_x = tl.load(p_x + o_xm[None, :] + o_kx[:, None], mask=(o_ik < C)[:, None] & m_m[None, :], other=0.0)
            b_y += _product(b_wk, b_x.to(DTYPE), IN_REGISTERS, PRECISION, DTYPE)
    if b_bias is not None:
        b_y += b_bias[:, None]
    o_ym, m_m = _positions(i_m, M, P, s_yb, s_yp, ONE_POSITION, WIDE, BLOCK_M)
    o_jy = o_j.to(tl.int64) * s_yc if WIDE else o_j * s_yc
    tl.store(p_y + o_ym[None, :] + o_jy[:, None], b_y.to(p_y.dtype.element_ty), mask=(o_j < C)[:, None] & m_m[None, :])


@triton.jit
def forward_kernel(
    p_x, p_weight, p_bias, p_y, M, C, P, n_m, n_workers,
    s_xb, s_xc, s_xp, s_wj, s_wk, s_yb, s_yc, s_yp,
    ONE_POSITION: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y's channels [J] at positions [M]; also dx, with the weight's strides swapped.

    With the weight in registers a program takes every n_workers-th tile of positions, else one (n_workers = n_m).
    """
    i_program = tl.program_id(0)
    n_j = tl.cdiv(C, BLOCK_J)
    i_worker = i_program // n_j
    o_j = (i_program % n_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    b_bias = None
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_j, mask=o_j < C, other=0.0).to(DTYPE)
    if IN_REGISTERS:
        b_w = _weight(p_weight, o_j, tl.arange(0, BLOCK_K), s_wj, s_wk, C, IN_REGISTERS, DTYPE)
        for i_m in range(i_worker, n_m, n_workers):
            _forward_tile(
                i_m, p_x, p_weight, p_y, b_w, b_bias, o_j, M, C, P, s_xb, s_xc, s_xp, s_wj, s_wk, s_yb, s_yc, s_yp,
                ONE_POSITION, WIDE, IN_REGISTERS, PRECISION, DTYPE, BLOCK_J, BLOCK_K, BLOCK_M,
            )  # fmt: skip
    else:
        _forward_tile(
            i_worker, p_x, p_weight, p_y, None, b_bias, o_j, M, C, P, s_xb, s_xc, s_xp, s_wj, s_wk, s_yb, s_yc, s_yp,
            ONE_POSITION, WIDE, IN_REGISTERS, PRECISION, DTYPE, BLOCK_J, BLOCK_K, BLOCK_M,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    p_x, p_weight, p_dy, p_dx, p_dweight, p_dbias, M, C, P, n_m, n_workers, n_blocks,
    s_xb, s_xc, s_xp, s_wj, s_wk, s_gb, s_gc, s_gp, s_db, s_dc, s_dp,
    ONE_POSITION: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Worker w takes every n_workers-th tile of positions for one block [J, K] of dW; dx where the block is all of it.

    Partials: dW [workers, C, C], dbias [workers, C].
    """
    i_program = tl.program_id(0)
    i_worker = i_program % n_workers
    i_block = i_program // n_workers
    i_jb = i_block // n_blocks
    i_kb = i_block % n_blocks
    o_j = i_jb * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = i_kb * BLOCK_C + tl.arange(0, BLOCK_C)
    m_j = o_j < C
    m_k = o_k < C
    o_jg = o_j.to(tl.int64) * s_gc if WIDE else o_j * s_gc
    o_kx = o_k.to(tl.int64) * s_xc if WIDE else o_k * s_xc
    o_kd = o_k.to(tl.int64) * s_dc if WIDE else o_k * s_dc
    if p_dx is not None:
        b_w = _weight(p_weight, o_k, o_j, s_wk, s_wj, C, IN_REGISTERS, DTYPE)  # transposed
    if IN_REGISTERS:
        b_dw = tl.zeros([BLOCK_C, BLOCK_C, BLOCK_M], DTYPE)  # summed over M once, at the end
    else:
        b_dw = tl.zeros([BLOCK_C, BLOCK_C], DTYPE)
    b_db = tl.zeros([BLOCK_C, BLOCK_M], DTYPE)
    for i_m in range(i_worker, n_m, n_workers):
        o_gm, m_m = _positions(i_m, M, P, s_gb, s_gp, ONE_POSITION, WIDE, BLOCK_M)
        m_jm = m_j[:, None] & m_m[None, :]
        m_km = m_k[:, None] & m_m[None, :]
        b_dy = tl.load(p_dy + o_gm[None, :] + o_jg[:, None], mask=m_jm, other=0.0).to(DTYPE)
        if p_dbias is not None:
            b_db += b_dy
        if p_dx is not None:
            o_dm, m_m = _positions(i_m, M, P, s_db, s_dp, ONE_POSITION, WIDE, BLOCK_M)
            b_dx = _product(b_w, b_dy, IN_REGISTERS, PRECISION, DTYPE)
            tl.store(p_dx + o_dm[None, :] + o_kd[:, None], b_dx.to(p_dx.dtype.element_ty), mask=m_km)
        if p_dweight is not None:
            o_xm, m_m = _positions(i_m, M, P, s_xb, s_xp, ONE_POSITION, WIDE, BLOCK_M)
            b_x = tl.load(p_x + o_xm[None, :] + o_kx[:, None], mask=m_km, other=0.0).to(DTYPE)
            if IN_REGISTERS:
                b_dw += b_dy[:, None, :] * b_x[None, :, :]
            else:
                b_dw += tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION, out_dtype=DTYPE)
    i_out = i_worker.to(tl.int64) * C
    if p_dweight is not None:
        if IN_REGISTERS:
            b_dw_out = tl.sum(b_dw, 2)
        else:
            b_dw_out = b_dw
        tl.store(p_dweight + i_out * C + (o_j[:, None] * C + o_k[None, :]), b_dw_out, mask=m_j[:, None] & m_k[None, :])
    if p_dbias is not None:
        # Of the blocks in a row of dW, the first writes.
        tl.store(p_dbias + i_out + o_j, tl.sum(b_db, 1), mask=o_j + i_kb * C < C)


# --- launchers: the raw ops ------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How C channels are tiled: forward ``[block_j, block_k] x [block_k, block_m]``, backward ``block_c`` squared."""

    in_registers: bool
    precision: str
    block_j: int
    block_k: int
    block_m: int
    warps: int
    block_c: int
    block_m_backward: int
    warps_backward: int


# By padded channels: positions per tile and warps, forward and backward. A thread's share of [C, C, M] stays at or
# below 64 registers forward (with as many of the weight), 32 backward, where a gradient of that shape is kept as well.
_IN_REGISTERS = {
    1: (1024, 4, 1024, 4), 2: (512, 4, 512, 4), 4: (256, 4, 256, 4), 8: (128, 4, 128, 8), 16: (64, 8, 64, 8),
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def plan(channels: int, dtype: torch.dtype, generation: int) -> Plan:
    """Tile sizes for C channels; ``generation`` as :func:`generation_of` gives it."""
    block = tiles.power_of_2(channels)
    if channels <= REGISTER_CHANNELS:
        block_m, warps, block_m_backward, warps_backward = _IN_REGISTERS[block]
        if dtype == torch.float64:
            block_m, block_m_backward = block_m // 2, block_m_backward // 2
        return Plan(True, "ieee", block, block, block_m, warps, block, block_m_backward, warps_backward)
    tensor_cores = generation >= 8 and dtype == torch.float32 and channels >= TENSOR_CORE_CHANNELS
    precision = "tf32x3" if tensor_cores else "ieee"
    if dtype == torch.float64:
        return Plan(False, precision, min(block, 64), 16, 32, 4, min(block, 32), 16, 4)
    # Above 128 channels, blocks of whichever size pads less.
    block_j = 64 if block > 128 and 64 * tiles.divide_up(channels, 64) % 128 else min(block, 128)
    block_c = min(block, FUSED_CHANNELS)
    # IEEE dots unroll over their inner axis in registers, and outside Hopper and data-centre Blackwell both operands of
    # a 3xTF32 dot sit there: 32 at a time would spill.
    block_m_backward = 32 if tensor_cores and (generation in (9, 10) or block_c == 32) else 16
    return Plan(
        False, precision, block_j, 32 if tensor_cores else 16, 64, 8 if block_j > 64 else 4,
        block_c, block_m_backward, 8 if block_c > 32 else 4,
    )  # fmt: skip


def generation_of(x: Tensor) -> int:
    """Major compute capability of an NVIDIA GPU; 0 on AMD and under the interpreter, where dots are IEEE."""
    return _generation(x.get_device()) if x.is_cuda and torch.version.hip is None else 0


@functools.lru_cache(maxsize=64)
def _generation(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, p: Plan) -> None:
    batch, channels, size = x.shape[0], x.shape[1], tiles.positions(x)
    n_m = tiles.divide_up(batch * size, p.block_m)
    # With the weight in registers a program takes several tiles, where enough programs remain.
    n_workers = max(min(n_m, tiles.PROGRAMS), tiles.divide_up(n_m, MOST_TILES)) if p.in_registers else n_m
    forward_kernel[(n_workers * tiles.divide_up(channels, p.block_j),)](
        x, weight, bias, y, batch * size, channels, size, n_m, n_workers,
        *tiles.strides(x), *weight.stride(), *tiles.strides(y),
        ONE_POSITION=size == 1, WIDE=batch * size >= 2**30 or tiles.is_wide(x, y), IN_REGISTERS=p.in_registers,
        PRECISION=p.precision, DTYPE=tiles.TRITON_DTYPE[weight.dtype],
        BLOCK_J=p.block_j, BLOCK_K=p.block_k, BLOCK_M=p.block_m,
        num_warps=p.warps, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y``; the raw op ``_channel_mix_forward``, every argument already checked."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    dtype = compute_dtype(x)
    with tiles.on_device_of(x):
        _launch_forward(
            x, weight.to(dtype), None if bias is None else bias.contiguous(), y,
            plan(x.shape[1], dtype, generation_of(x)),
        )  # fmt: skip
    return y


def backward(
    x: Tensor, weight: Tensor, dy: Tensor, inverse: Tensor | None, bias: Tensor | None,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dweight, dbias, x)``, empty where not needed; the raw op ``_channel_mix_backward``."""
    rebuilt = x.new_empty(0)
    if inverse is not None:
        shift = None if bias is None else -(inverse @ bias)
        x = rebuilt = forward(x, inverse, shift)
    batch, channels, size = x.shape[0], x.shape[1], tiles.positions(x)
    dtype = compute_dtype(x)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    if x.numel() == 0:
        return (
            dx,
            weight.new_zeros(weight.shape if need_dweight else 0),
            weight.new_zeros(channels if need_dbias else 0),
            rebuilt,
        )
    p = plan(channels, dtype, generation_of(x))
    fused = channels <= FUSED_CHANNELS and channels <= p.block_c
    w = weight.to(dtype)
    partial_w = partial_b = None
    with tiles.on_device_of(x):
        if need_dx and not (fused and (need_dweight or need_dbias)):
            _launch_forward(dy, w.t(), None, dx, p)
        if need_dweight or need_dbias:
            n_m = tiles.divide_up(batch * size, p.block_m_backward)
            n_blocks = tiles.divide_up(channels, p.block_c)
            n_workers = min(n_m, max(16, tiles.divide_up(tiles.WORKERS, n_blocks * n_blocks)))
            if need_dweight:
                partial_w = weight.new_empty((n_workers, channels, channels), dtype=dtype)
            if need_dbias:
                partial_b = weight.new_empty((n_workers, channels), dtype=dtype)
            written = dx if need_dx and fused else None
            n_columns = n_blocks if need_dweight else 1
            backward_kernel[(n_workers * n_blocks * n_columns,)](
                x, w, dy, written, partial_w, partial_b, batch * size, channels, size, n_m, n_workers, n_columns,
                *tiles.strides(x), *w.stride(), *tiles.strides(dy),
                *(tiles.strides(written) if written is not None else (0, 0, 0)),
                ONE_POSITION=size == 1, WIDE=batch * size >= 2**30 or tiles.is_wide(x, dy, written),
                IN_REGISTERS=p.in_registers, PRECISION=p.precision, DTYPE=tiles.TRITON_DTYPE[dtype],
                BLOCK_C=p.block_c, BLOCK_M=p.block_m_backward,
                num_warps=p.warps_backward, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return (
        dx,
        weight.new_empty(0) if partial_w is None else partial_w.sum(0).to(weight.dtype),
        weight.new_empty(0) if partial_b is None else partial_b.sum(0).to(weight.dtype),
        rebuilt,
    )
