"""Gaussian log-density in Triton: the raw ops (``nfkernels/reference/gaussian_log_density.py`` is the specification).

Tiles and the two-stage sum are the affine coupling's: several samples to a program (rows), or one sample over several
(images). Layouts of params are strides and starts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.affine_coupling import Layout, compute_dtype
from ..reference.gaussian_log_density import HALF_LOG_2PI
from . import _tiles as tiles
from ._affine_coupling_kernels import _row_elements

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _standardised(p_x, p_params, o_x, o_w, o_mean, o_scale, m_in, DTYPE: tl.constexpr):
    """``(x - mean) / sigma``, ``1 / sigma`` and ``log sigma``; all zero but 1 / sigma where there is no element."""
    b_x = tl.load(p_x + o_x, mask=m_in, other=0.0).to(DTYPE)
    if p_params is None:
        b_s = b_x
        b_p = b_x
    else:
        b_s = tl.load(p_params + (o_w + o_scale), mask=m_in, other=0.0).to(DTYPE)
        b_p = tl.exp(-b_s)
        b_x = (b_x - tl.load(p_params + (o_w + o_mean), mask=m_in, other=0.0).to(DTYPE)) * b_p
    return b_x, b_p, b_s


@triton.jit
def _terms(p_x, p_params, o_x, o_w, o_mean, o_scale, m_in, DTYPE: tl.constexpr):
    """Minus twice the log-density of each element, without its constant."""
    b_eps, _, b_s = _standardised(p_x, p_params, o_x, o_w, o_mean, o_scale, m_in, DTYPE)
    b_terms = b_eps * b_eps
    if p_params is not None:
        b_terms += 2 * b_s
    return b_terms


@triton.jit
def forward_kernel(
    p_x, p_params, p_running, p_out,  # p_out: [B], or partials [B, n_blocks]
    B, C, P, n_elements, n_blocks,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wp, o_mean, o_scale,
    CONSTANT: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    b_constant = tl.full([1], CONSTANT, DTYPE) * n_elements
    if ROWS:
        o_b = (tl.zeros([1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)
        m_b = o_b < B
        o_n = tl.arange(0, BLOCK_1)
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
        b_terms = _terms(
            p_x + o_b[:, None] * s_xb, None if p_params is None else p_params + o_b[:, None] * s_wb,
            (o_c * s_xc + o_p * s_xp)[None, :], (o_c * s_wc + o_p * s_wp)[None, :], o_mean, o_scale,
            m_b[:, None] & (o_n < C * P)[None, :], DTYPE,
        )  # fmt: skip
        b_out = -0.5 * tl.sum(b_terms, 1) - b_constant
        if p_running is not None:
            b_out += tl.load(p_running + o_b, mask=m_b, other=0.0)
        tl.store(p_out + o_b, b_out, mask=m_b)
    else:
        i_b = (i_program // n_blocks).to(tl.int64)
        i_block = i_program % n_blocks
        n_p = tl.cdiv(P, BLOCK_1)
        b_sum = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
        for i_tile in range(i_block, tl.cdiv(C, BLOCK_0) * n_p, n_blocks):
            o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
            o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
            m_in = (o_c < C) & (o_p < P)
            if WIDE:
                o_c = o_c.to(tl.int64)
                o_p = o_p.to(tl.int64)
            b_sum += _terms(
                p_x + i_b * s_xb, None if p_params is None else p_params + i_b * s_wb,
                o_c * s_xc + o_p * s_xp, o_c * s_wc + o_p * s_wp, o_mean, o_scale, m_in, DTYPE,
            )  # fmt: skip
        b_out = -0.5 * tl.sum(tl.sum(b_sum, 1), 0)
        # The sample's constant goes into the first of its partials.
        b_out -= tl.sum(tl.where(i_block == 0, b_constant, 0.0), 0)
        if p_running is not None:
            b_out += tl.load(p_running + i_b)
        tl.store(p_out + i_b * n_blocks + i_block, b_out)


@triton.jit
def backward_kernel(
    p_x, p_params, p_dout, p_dx, p_dparams,
    B, C, P, s_d,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wp, o_mean, o_scale,
    s_gb, s_gc, s_gp, s_vb, s_vc, s_vp, o_dmean, o_dscale,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if ROWS:
        o_b = (tl.zeros([1, 1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        m_b = o_b < B
        o_n = tl.arange(0, BLOCK_1)[None, :]
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
        m_in = m_b & (o_n < C * P)
        b_d = tl.load(p_dout + o_b * s_d, mask=m_b, other=0.0).to(DTYPE)
    else:
        n_p = tl.cdiv(P, BLOCK_1)
        n_tiles = tl.cdiv(C, BLOCK_0) * n_p
        i_tile = i_program % n_tiles
        o_b = (i_program // n_tiles).to(tl.int64)
        o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
        m_in = (o_c < C) & (o_p < P)
        b_d = tl.load(p_dout + o_b * s_d).to(DTYPE)
    if WIDE:
        o_c = o_c.to(tl.int64)
        o_p = o_p.to(tl.int64)
    b_eps, b_p, _ = _standardised(
        p_x + o_b * s_xb, None if p_params is None else p_params + o_b * s_wb,
        o_c * s_xc + o_p * s_xp, o_c * s_wc + o_p * s_wp, o_mean, o_scale, m_in, DTYPE,
    )  # fmt: skip
    b_dmean = b_d * b_eps
    if p_params is not None:
        b_dmean = b_d * (b_eps * b_p)
    if p_dx is not None:
        p_to = p_dx + o_b * s_gb + (o_c * s_gc + o_p * s_gp)
        tl.store(p_to, (-b_dmean).to(p_dx.dtype.element_ty), mask=m_in)
    if p_dparams is not None:
        p_to = p_dparams + o_b * s_vb + (o_c * s_vc + o_p * s_vp)
        tl.store(p_to + o_dmean, b_dmean.to(p_dparams.dtype.element_ty), mask=m_in)
        tl.store(p_to + o_dscale, (b_d * (b_eps * b_eps - 1)).to(p_dparams.dtype.element_ty), mask=m_in)


# --- launchers -------------------------------------------------------------------------------------------------------


def _params_strides(params: Tensor | None, layout: Layout) -> tuple[int, int, int, int, int]:
    """Strides over [B, C, P] of a mean or a log-scale, and where in a sample the two start."""
    if params is None:
        return 0, 0, 0, 0, 0
    s_b, s_c, s_p = tiles.strides(params)
    interleaved = layout in (Layout.shift_scale_interleaved, Layout.scale_shift_interleaved)
    starts = [0, s_c if interleaved else params.shape[1] // 2 * s_c]
    if layout in (Layout.scale_shift, Layout.scale_shift_interleaved):
        starts.reverse()
    return s_b, s_c * 2 if interleaved else s_c, s_p, *starts


def _options(x: Tensor, t: tiles.Tile, *others: Tensor | None) -> dict:
    """The constexprs and launch options that both kernels take."""
    return {
        "DTYPE": tiles.TRITON_DTYPE[compute_dtype(x)],
        "ROWS": t.rows,
        "CHANNELS_INNER": tiles.strides(x)[1] == 1 and x.shape[1] > 1,
        "ONE_POSITION": tiles.positions(x) == 1,
        "WIDE": tiles.is_wide(x, *others),
        "BLOCK_0": t.block_0,
        "BLOCK_1": t.block_1,
        "num_warps": t.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def forward(x, params, logdet, layout) -> Tensor:
    """``[B]``; the raw op ``_gaussian_log_density_forward``, every argument already checked."""
    batch, channels = x.shape[:2]
    size = tiles.positions(x)
    dtype = compute_dtype(x)
    if x.numel() == 0:
        return x.new_zeros(batch, dtype=dtype) if logdet is None else logdet.clone()
    out = x.new_empty(batch, dtype=dtype)
    t = tiles.tile(x, x if params is None else params)
    n_blocks = 1
    if t.rows:
        grid = (tiles.divide_up(batch, t.block_0),)
    else:
        n_tiles = tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
        if n_tiles > tiles.ONE_PROGRAM_TILES:
            n_blocks = min(n_tiles, tiles.divide_up(tiles.PROGRAMS, batch))
        grid = (batch * n_blocks,)
    partials = out if n_blocks == 1 else x.new_empty((batch, n_blocks), dtype=dtype)
    running = None if logdet is None else logdet.contiguous()
    with tiles.on_device_of(x):
        forward_kernel[grid](
            x, params, running if n_blocks == 1 else None, partials,
            batch, channels, size, channels * size, n_blocks,
            *tiles.strides(x), *_params_strides(params, Layout(layout)),
            CONSTANT=HALF_LOG_2PI, **_options(x, t, params),
        )  # fmt: skip
        if n_blocks > 1:
            tiles.sum_partials(partials, running, out)
    return out


def backward(x, params, dout, layout, need_dx, need_dparams) -> tuple[Tensor, Tensor]:
    """``(dx, dparams)``, empty where not needed; the raw op ``_gaussian_log_density_backward``."""
    batch, channels = x.shape[:2]
    size = tiles.positions(x)
    dx = torch.empty_like(x) if need_dx else None
    dparams = torch.empty_like(params) if need_dparams else None
    if x.numel() and (need_dx or need_dparams):
        t = tiles.tile(x, x if params is None else params)
        if t.rows:
            grid = (tiles.divide_up(batch, t.block_0),)
        else:
            grid = (batch * tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1),)
        with tiles.on_device_of(x):
            backward_kernel[grid](
                x, params, dout, dx, dparams,
                batch, channels, size, dout.stride(0),
                *tiles.strides(x), *_params_strides(params, Layout(layout)),
                *(tiles.strides(dx) if need_dx else (0, 0, 0)), *_params_strides(dparams, Layout(layout)),
                **_options(x, t, params, dx, dparams),
            )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dparams is None else dparams
