"""Dequantisation in Triton: the raw ops (``nfkernels/reference/dequantize.py`` is the specification).

One tile is ``[samples, elements of a sample]`` (rows) or ``[channels, positions]`` of one sample (images), as in the
coupling. Noise is numbered in logical order, so a tile's rows always run along positions, and the layouts are strides.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.affine_coupling import _FLOATS
from ..reference.dequantize import _LARGEST, arithmetic
from . import _tiles as tiles
from .philox import load_key, uniform
from .scale_map import exp, log


@triton.jit
def _nudge(v, ulps):
    if v.dtype == tl.float64:
        moved = (v.to(tl.int64, bitcast=True) + ulps).to(tl.float64, bitcast=True)
    else:
        moved = (v.to(tl.int32, bitcast=True) + ulps).to(tl.float32, bitcast=True)
    return moved


@triton.jit
def _unit(x, u, LEVELS: tl.constexpr, INVERSE: tl.constexpr, LIMIT: tl.constexpr):
    """``(x + u) / LEVELS``, kept by a unit in the last place or two from rounding into a neighbour's grey level."""
    v = (x + u) * INVERSE
    back = v * LEVELS
    v = _nudge(v, tl.where(back < x, 1, 0) - tl.where(back >= x + 1.0, 2, 0))
    return tl.where(v > LIMIT, LIMIT, v).to(u.dtype)


@triton.jit
def forward_kernel(
    p_x, p_y, p_key, p_logdet, p_running,  # p_logdet: [B], or partials [B, n_blocks]; None without a logit
    B, C, P, n_blocks, s_xb, s_xc, s_xp, s_yb, s_yc, s_yp,
    LEVELS: tl.constexpr, INVERSE: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, SPAN: tl.constexpr, LOG_SPAN: tl.constexpr,
    ROWS: tl.constexpr, QUADS: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    b_seed, b_offset = load_key(p_key)
    if ROWS:
        i_b = (tl.zeros([BLOCK_0, 1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        i_block = 0
        n_tiles = 1
    else:
        i_b = tl.zeros([1, 1], tl.int64) + i_program // n_blocks
        i_block = i_program % n_blocks
        n_p = tl.cdiv(P, BLOCK_1)
        n_tiles = tl.cdiv(C, BLOCK_0) * n_p
    b_sum = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
    for i_tile in range(i_block, n_tiles, n_blocks):
        if ROWS:
            o_n = tl.arange(0, BLOCK_1)[None, :]
            o_c = o_n // P
            o_p = o_n % P
            m_in = (i_b < B) & (o_n < C * P)
            i_first = i_b * C * P
        else:
            o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
            o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
            m_in = (o_c < C) & (o_p < P)
            i_first = (i_b * C + o_c) * P + (i_tile % n_p) * BLOCK_1
        if WIDE:
            o_c = o_c.to(tl.int64)
            o_p = o_p.to(tl.int64)
        b_x = tl.load(p_x + i_b * s_xb + (o_c * s_xc + o_p * s_xp), mask=m_in, other=0).to(DTYPE)
        b_v = _unit(b_x, uniform(i_first, b_seed, b_offset, QUADS, DTYPE, BLOCK_0, BLOCK_1), LEVELS, INVERSE, LIMIT)
        if p_logdet is None:
            b_y = b_v
        else:
            b_low = log(ALPHA + SPAN * b_v)
            b_high = log(ALPHA + SPAN * (1.0 - b_v))
            b_y = b_low - b_high
            b_sum += tl.where(m_in, LOG_SPAN - b_low - b_high, 0.0)
        tl.store(p_y + i_b * s_yb + (o_c * s_yc + o_p * s_yp), b_y.to(p_y.dtype.element_ty), mask=m_in)
    if p_logdet is not None:
        if ROWS:
            o_b = i_program.to(tl.int64) * BLOCK_0 + tl.arange(0, BLOCK_0)
            m_b = o_b < B
            b_logdet = tl.sum(b_sum, 1)
            if p_running is not None:
                b_logdet += tl.load(p_running + o_b, mask=m_b, other=0.0)
            tl.store(p_logdet + o_b, b_logdet, mask=m_b)
        else:
            b_total = tl.sum(tl.sum(b_sum, 1), 0)
            if p_running is not None:
                b_total += tl.load(p_running + i_program // n_blocks)
            tl.store(p_logdet + i_program.to(tl.int64), b_total)


@triton.jit
def backward_kernel(
    p_y, p_dy, p_dlogdet, p_dx, B, C, P, n_blocks,
    s_yb, s_yc, s_yp, s_gb, s_gc, s_gp, s_xb, s_xc, s_xp, s_l,
    SLOPE: tl.constexpr, LOGIT: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if ROWS:
        i_b = (tl.zeros([BLOCK_0, 1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        o_n = tl.arange(0, BLOCK_1)[None, :]
        o_c = o_n // P
        o_p = o_n % P
        m_b = i_b < B
        m_in = m_b & (o_n < C * P)
    else:
        i_b = tl.zeros([1, 1], tl.int64) + i_program // n_blocks
        n_p = tl.cdiv(P, BLOCK_1)
        i_tile = i_program % n_blocks
        o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
        m_b = i_b < B
        m_in = (o_c < C) & (o_p < P)
    if WIDE:
        o_c = o_c.to(tl.int64)
        o_p = o_p.to(tl.int64)
    if p_dy is None:
        b_grad = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
    else:
        b_grad = tl.load(p_dy + i_b * s_gb + (o_c * s_gc + o_p * s_gp), mask=m_in, other=0.0).to(DTYPE)
    if LOGIT:
        b_y = tl.load(p_y + i_b * s_yb + (o_c * s_yc + o_p * s_yp), mask=m_in, other=0.0).to(DTYPE)
        b_u = exp(-tl.abs(b_y))
        b_q = 1.0 + b_u
        if p_dlogdet is not None:
            b_tilt = (1.0 - b_u) / b_q
            b_dlogdet = tl.load(p_dlogdet + i_b * s_l, mask=m_b, other=0.0)
            b_grad += tl.where(b_y < 0.0, -b_tilt, b_tilt) * b_dlogdet
        b_grad = b_grad * (b_q * (b_q / b_u))
    b_dx = SLOPE * b_grad
    tl.store(p_dx + i_b * s_xb + (o_c * s_xc + o_p * s_xp), b_dx.to(p_dx.dtype.element_ty), mask=m_in)


def _run(tensors: list[Tensor], numbered: bool) -> bool:
    """Whether a sample is one run of memory in all tensors; in the logical order if elements are ``numbered``."""
    x = tensors[0]
    size = tiles.positions(x)
    if size == 1 or all(tiles.strides(t)[2] == 1 and tiles.strides(t)[1] in (0, size) for t in tensors):
        return True
    same = all(tiles.strides(t)[1:] == tiles.strides(x)[1:] for t in tensors)
    return not numbered and same and 0 not in tiles.strides(x)[1:] and tiles.span(x) == x.shape[1] * size - 1


def _tile(x: Tensor, one_run: bool) -> tuple[tiles.Tile, int, int]:
    """The tile, C and P; samples that are one run count as one channel of C * P positions."""
    channels, size = x.shape[1], tiles.positions(x)
    n = channels * size
    if one_run:
        channels, size = 1, n
    if n <= (tiles.TILE if one_run else tiles.ROW_LIMIT):
        block = max(4, tiles.power_of_2(n))
        samples = max(1, min(tiles.TILE // block, tiles.power_of_2(x.shape[0])))
        return tiles.Tile(True, samples, block, 4), channels, size
    elements, warps = (tiles.WIDE_TILE, 8) if n >= tiles.WIDE_TILE else (tiles.TILE, 4)
    if not one_run and tiles.strides(x)[1] == 1:
        block_c = min(tiles.power_of_2(channels), elements // 4)
        block_p = min(elements // block_c, max(4, tiles.power_of_2(size)))
    else:
        block_p = min(elements, max(4, tiles.power_of_2(size)))
        block_c = min(elements // block_p, tiles.power_of_2(channels))
    return tiles.Tile(False, block_c, block_p, warps), channels, size


def _strides(x: Tensor | None, one_run: bool) -> tuple[int, int, int]:
    """Over [B, C, P] as :func:`_tile` gives them."""
    if x is None:
        return 0, 0, 0
    s_b, s_c, s_p = tiles.strides(x)
    if not one_run:
        return s_b, s_c, s_p
    return s_b, 0, s_c if tiles.positions(x) == 1 else min(s for s in (s_c, s_p) if s > 0)


def forward(x, key, logdet, levels, alpha, dtype) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``; the raw op ``_dequantize_forward``, every argument already checked."""
    y = torch.empty_like(x, dtype=_FLOATS[dtype])
    compute = arithmetic(y.dtype)
    logit = alpha >= 0
    batch = x.shape[0]
    if not logit or y.numel() == 0:
        out = x.new_zeros(batch, dtype=compute) if logdet is None else logdet.clone()
        if y.numel() == 0:
            return y, out
    one_run = _run([x, y], True)
    t, channels, size = _tile(x, one_run)
    n_tiles = tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
    n_blocks = 1 if t.rows else n_tiles
    if logit and not t.rows:
        few = n_tiles <= tiles.ONE_PROGRAM_TILES
        n_blocks = 1 if few else min(n_tiles, tiles.divide_up(tiles.PROGRAMS, batch))
    partials = running = None
    if logit:
        out = x.new_empty(batch, dtype=compute)
        partials = out if n_blocks == 1 else x.new_empty((batch, n_blocks), dtype=compute)
        running = None if logdet is None else logdet.contiguous()
    span = 1 - 2 * alpha if logit else 1.0
    with tiles.on_device_of(x):
        forward_kernel[(tiles.divide_up(batch, t.block_0) if t.rows else batch * n_blocks,)](
            x, y, key.contiguous(), partials, running if n_blocks == 1 else None,
            batch, channels, size, n_blocks, *_strides(x, one_run), *_strides(y, one_run),
            LEVELS=levels, INVERSE=1 / levels, LIMIT=_LARGEST[compute if logit else y.dtype],
            ALPHA=alpha, SPAN=span, LOG_SPAN=math.log(span),
            ROWS=t.rows, QUADS=(channels * size if t.rows else size) % 4 == 0,
            WIDE=tiles.is_wide(x, y), DTYPE=tiles.TRITON_DTYPE[compute], BLOCK_0=t.block_0, BLOCK_1=t.block_1,
            num_warps=t.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if n_blocks > 1 and logit:
            tiles.sum_partials(partials, running, out)
    return y, out


def backward(y, dy, dlogdet, levels, alpha) -> Tensor:
    """``dx``; the raw op ``_dequantize_backward``."""
    dx = torch.empty_like(y)
    if dx.numel() == 0:
        return dx
    batch = y.shape[0]
    compute = arithmetic(y.dtype)
    one_run = _run([y, dx] if dy is None else [y, dx, dy], False)
    t, channels, size = _tile(y, one_run)
    n_blocks = 1 if t.rows else tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
    with tiles.on_device_of(y):
        backward_kernel[(tiles.divide_up(batch, t.block_0) if t.rows else batch * n_blocks,)](
            y, dy, dlogdet, dx, batch, channels, size, n_blocks,
            *_strides(y, one_run), *_strides(dy, one_run), *_strides(dx, one_run),
            0 if dlogdet is None else dlogdet.stride(0),
            SLOPE=(1 - 2 * alpha if alpha >= 0 else 1.0) / levels, LOGIT=alpha >= 0,
            ROWS=t.rows, WIDE=tiles.is_wide(y, dy, dx), DTYPE=tiles.TRITON_DTYPE[compute],
            BLOCK_0=t.block_0, BLOCK_1=t.block_1, num_warps=t.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dx
