"""Autoregressive convolution and its inverse in Triton, in plain multiply-adds (never TF32).

Forward: a program to a tile of positions. Inverse: a program to a sample, one wavefront of pixels (w + skew h = step)
after another with a barrier between. What later wavefronts look at is read back from global memory, from the output or
from a copy in float32 where the output is narrower. The barrier orders that within a program on NVIDIA and AMD's gfx9;
on other AMD GPUs, whose barrier does not wait for stores, the reference serves the inverse.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from ..reference.autoregressive_conv import Form
from ..reference.autoregressive_conv import forward as reference_forward
from . import _tiles as tiles

MOST_CHANNELS, MOST_ROWS, POSITIONS = 16, 64, 128  # of a tile


@triton.jit
def _offset(i_tap, COLUMNS: tl.constexpr, RASTER: tl.constexpr):
    """Rows and columns from a pixel back to its tap, as Form.offsets lists them."""
    HALF: tl.constexpr = COLUMNS // 2
    if RASTER:
        i_h = (i_tap + HALF) // COLUMNS
        i_w = (i_tap + HALF) % COLUMNS - HALF
    else:
        i_h = i_tap // (HALF + 1)
        i_w = i_tap % (HALF + 1)
    return i_h, i_w


@triton.jit
def _bias(p_bias, o_c, C, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    b_out = tl.zeros([BLOCK_C, BLOCK], DTYPE)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_c, mask=o_c < C, other=0.0)[:, None]
    return b_out


@triton.jit
def _add_tap(b_out, p_in, s_c, m_in, p_weight, o_c, C, DTYPE: tl.constexpr):
    """``b_out [C, n] += W x`` for pixels whose first channel is at ``p_in [n]``."""
    for i_k in range(C):
        b_in = tl.load(p_in + tl.full([], i_k, tl.int64) * s_c, mask=m_in, other=0.0).to(DTYPE)
        b_w = tl.load(p_weight + o_c * C + i_k, mask=o_c < C, other=0.0)
        b_out += b_w[:, None] * b_in[None, :]
    return b_out


@triton.jit
def forward_kernel(
    p_x, p_weight, p_bias, p_y, M, C, H, W, taps, s_xb, s_xc, s_xp, s_yb, s_yc, s_yp,
    COLUMNS: tl.constexpr, RASTER: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    n_c = tl.cdiv(C, BLOCK_C)
    o_c = (i_program % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m = (i_program // n_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    P = tl.full([], H, tl.int64) * W
    o_p = o_m % P
    o_h = o_p // W
    o_w = o_p % W
    b_y = _bias(p_bias, o_c, C, DTYPE, BLOCK_C, BLOCK_M)
    for i_tap in range(taps):
        i_h, i_w = _offset(i_tap, COLUMNS, RASTER)
        if REVERSE:
            o_th = o_h + i_h
            o_tw = o_w + i_w
        else:
            o_th = o_h - i_h
            o_tw = o_w - i_w
        m_in = (o_m < M) & (o_th >= 0) & (o_th < H) & (o_tw >= 0) & (o_tw < W)
        p_in = p_x + (o_m // P) * s_xb + (o_th * W + o_tw) * s_xp
        b_y = _add_tap(b_y, p_in, s_xc, m_in, p_weight + tl.full([], i_tap, tl.int64) * C * C, o_c, C, DTYPE)
    p_out = p_y + ((o_m // P) * s_yb + o_p * s_yp)[None, :] + (o_c.to(tl.int64) * s_yc)[:, None]
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=(o_c < C)[:, None] & (o_m < M)[None, :])


@triton.jit
def solve_kernel(
    p_x, p_weight, p_bias, p_state, p_y, C, H, W, taps, s_xb, s_xc, s_xp, s_sb, s_sc, s_sp, s_yb, s_yc, s_yp,
    COLUMNS: tl.constexpr, RASTER: tl.constexpr, REVERSE: tl.constexpr, SKEW: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``p_state`` is the output in the arithmetic's type; ``p_y`` a narrower copy of it, or None."""
    i_b = tl.program_id(0).to(tl.int64)
    p_x += i_b * s_xb
    p_state += i_b * s_sb
    last = tl.full([], H, tl.int64) * W - 1
    for i_step in range(W + SKEW * (H - 1)):
        for i_h in range(0, H, BLOCK_H):
            o_h = i_h + tl.arange(0, BLOCK_H)
            o_w = i_step - SKEW * o_h
            m_p = (o_h < H) & (o_w >= 0) & (o_w < W)
            o_p = o_h.to(tl.int64) * W + o_w
            if REVERSE:
                o_p = last - o_p
            for i_c in range(0, C, BLOCK_C):
                o_c = i_c + tl.arange(0, BLOCK_C)
                b_out = _bias(p_bias, o_c, C, DTYPE, BLOCK_C, BLOCK_H)
                b_out = _add_tap(b_out, p_x + o_p * s_xp, s_xc, m_p, p_weight, o_c, C, DTYPE)
                for i_tap in range(1, taps):
                    i_th, i_tw = _offset(i_tap, COLUMNS, RASTER)
                    o_th = o_h - i_th
                    o_tw = o_w - i_tw
                    o_tp = o_th.to(tl.int64) * W + o_tw
                    if REVERSE:
                        o_tp = last - o_tp
                    m_in = m_p & (o_th >= 0) & (o_tw >= 0) & (o_tw < W)
                    p_matrix = p_weight + tl.full([], i_tap, tl.int64) * C * C
                    b_out = _add_tap(b_out, p_state + o_tp * s_sp, s_sc, m_in, p_matrix, o_c, C, DTYPE)
                o_cc = o_c.to(tl.int64)[:, None]
                m_out = (o_c < C)[:, None] & m_p[None, :]
                tl.store(p_state + (o_p * s_sp)[None, :] + o_cc * s_sc, b_out, mask=m_out)
                if p_y is not None:
                    b_y = b_out.to(p_y.dtype.element_ty)
                    tl.store(p_y + i_b * s_yb + (o_p * s_yp)[None, :] + o_cc * s_yc, b_y, mask=m_out)
        tl.debug_barrier()


@functools.lru_cache(maxsize=64)
def barrier_orders_stores(device: int) -> bool:
    """``device`` is -1 for the interpreter, where programs have one thread."""
    if device < 0 or torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, raster: bool, reverse: bool, solve: bool
) -> Tensor:
    """The raw op ``_autoregressive_conv_forward``, every argument already checked."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    batch, channels, height, width = x.shape
    form, dtype = Form(rows, columns, raster, reverse), compute_dtype(x)
    block_c = min(tiles.power_of_2(channels), MOST_CHANNELS)
    options = {
        "COLUMNS": columns, "RASTER": raster, "REVERSE": reverse, "DTYPE": tiles.TRITON_DTYPE[dtype],
        "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    taps = len(form.offsets())
    with tiles.on_device_of(x):
        if not solve:
            positions = batch * height * width
            grid = tiles.divide_up(positions, POSITIONS) * tiles.divide_up(channels, block_c)
            forward_kernel[(grid,)](
                x, weight, bias, y, positions, channels, height, width, taps,
                *tiles.strides(x), *tiles.strides(y), BLOCK_M=POSITIONS, **options,
            )  # fmt: skip
            return y
        if not barrier_orders_stores(x.get_device()):
            return y.copy_(reference_forward(x, weight, bias, form, solve))
        state = y if y.dtype == dtype else x.new_empty(x.shape, dtype=dtype)
        solve_kernel[(batch,)](
            x, weight, bias, state, None if state is y else y, channels, height, width, taps,
            *tiles.strides(x), *tiles.strides(state), *tiles.strides(y),
            SKEW=form.skew(), BLOCK_H=min(tiles.power_of_2(height), MOST_ROWS), **options,
        )  # fmt: skip
    return y
