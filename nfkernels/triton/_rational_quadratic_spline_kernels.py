"""The rational-quadratic spline's two Triton kernels; ``rational_quadratic_spline.py`` launches them.

One tile is ``[samples, elements of a sample]`` (rows) or ``[channels, positions]`` of one sample (images), as in the
affine coupling's; each element's raw values are ``s_wj`` apart. The form and its numbers are constexpr.
"""

import triton
import triton.language as tl

from ._affine_coupling_kernels import _params_channel, _row_elements
from ._spline import spline, spline_backward

# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    p_x, p_params, p_y, p_each, p_map, p_mask,  # at the samples' first elements; p_each: log-derivatives, or None
    o_c, o_p, m_c, m_in, count, s_xc, s_xp, s_wc, s_wj, s_wp, s_yc, s_yp, s_lc, s_lp, s_mc, s_mp,
    INVERSE: tl.constexpr, K: tl.constexpr, DERIVATIVES: tl.constexpr, SOFTCLIP: tl.constexpr,
    OUTSIDE: tl.constexpr, HALF_TURN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    MIN_D: tl.constexpr, CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes one tile of y and returns its log-derivatives, zero where nothing is transformed."""
    b_row, m_row = _params_channel(p_map, o_c, m_c, 0, count, False)
    m_t = m_in & m_row
    if p_mask is not None:
        m_t = m_t & (tl.load(p_mask + (o_c * s_mc + o_p * s_mp), mask=m_in, other=0) != 0)
    b_x = tl.load(p_x + (o_c * s_xc + o_p * s_xp), mask=m_in, other=0.0).to(DTYPE)
    b_y, b_log = spline(
        p_params, b_row * s_wc + o_p * s_wp, s_wj, m_t, b_x, INVERSE, K, DERIVATIVES, SOFTCLIP, OUTSIDE, HALF_TURN,
        LOW, HIGH, BOTTOM, TOP, W_LEAST, W_SCALE, H_LEAST, H_SCALE, MIN_D, CLIP, PRESCALE, DTYPE,
    )  # fmt: skip
    b_log = tl.where(m_t, b_log, 0.0)
    b_y = tl.where(m_t, b_y, b_x)
    tl.store(p_y + (o_c * s_yc + o_p * s_yp), b_y.to(p_y.dtype.element_ty), mask=m_in)
    if p_each is not None:
        tl.store(p_each + (o_c * s_lc + o_p * s_lp), b_log, mask=m_in)
    return b_log


@triton.jit
def forward_kernel(
    p_x, p_params, p_y, p_each, p_logdet, p_running, p_map, p_mask,  # p_logdet: [B], or partials [B, n_blocks]
    B, C, P, count, n_blocks,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wj, s_wp, s_yb, s_yc, s_yp, s_lb, s_lc, s_lp, s_mb, s_mc, s_mp,
    INVERSE: tl.constexpr, K: tl.constexpr, DERIVATIVES: tl.constexpr, SOFTCLIP: tl.constexpr,
    OUTSIDE: tl.constexpr, HALF_TURN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    MIN_D: tl.constexpr, CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if WIDE:
        s_wj = tl.full([], s_wj, tl.int64)
    if ROWS:
        o_b = (tl.zeros([1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)
        m_b = o_b < B
        o_n = tl.arange(0, BLOCK_1)
        m_n = o_n < C * P
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
        b_log = _forward_tile(
            p_x + o_b[:, None] * s_xb, p_params + o_b[:, None] * s_wb, p_y + o_b[:, None] * s_yb,
            None if p_each is None else p_each + o_b[:, None] * s_lb, p_map,
            None if p_mask is None else p_mask + o_b[:, None] * s_mb,
            o_c[None, :], o_p[None, :], m_n[None, :], m_b[:, None] & m_n[None, :], count,
            s_xc, s_xp, s_wc, s_wj, s_wp, s_yc, s_yp, s_lc, s_lp, s_mc, s_mp,
            INVERSE, K, DERIVATIVES, SOFTCLIP, OUTSIDE, HALF_TURN,
            LOW, HIGH, BOTTOM, TOP, W_LEAST, W_SCALE, H_LEAST, H_SCALE, MIN_D, CLIP, PRESCALE, DTYPE,
        )  # fmt: skip
        if p_logdet is not None:
            b_logdet = tl.sum(b_log, 1)
            if p_running is not None:
                b_logdet += tl.load(p_running + o_b, mask=m_b, other=0.0)
            tl.store(p_logdet + o_b, b_logdet, mask=m_b)
    else:
        i_b = (i_program // n_blocks).to(tl.int64)
        i_block = i_program % n_blocks
        n_p = tl.cdiv(P, BLOCK_1)
        b_sum = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
        for i_tile in range(i_block, tl.cdiv(C, BLOCK_0) * n_p, n_blocks):
            o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)
            o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)
            m_c = (o_c < C)[:, None]
            m_in = m_c & (o_p < P)[None, :]
            if WIDE:
                o_c = o_c.to(tl.int64)
                o_p = o_p.to(tl.int64)
            b_sum += _forward_tile(
                p_x + i_b * s_xb, p_params + i_b * s_wb, p_y + i_b * s_yb,
                None if p_each is None else p_each + i_b * s_lb, p_map,
                None if p_mask is None else p_mask + i_b * s_mb,
                o_c[:, None], o_p[None, :], m_c, m_in, count,
                s_xc, s_xp, s_wc, s_wj, s_wp, s_yc, s_yp, s_lc, s_lp, s_mc, s_mp,
                INVERSE, K, DERIVATIVES, SOFTCLIP, OUTSIDE, HALF_TURN,
                LOW, HIGH, BOTTOM, TOP, W_LEAST, W_SCALE, H_LEAST, H_SCALE, MIN_D, CLIP, PRESCALE, DTYPE,
            )  # fmt: skip
        if p_logdet is not None:
            b_logdet = tl.sum(tl.sum(b_sum, 1), 0)
            if p_running is not None:
                b_logdet += tl.load(p_running + i_b)
            tl.store(p_logdet + i_b * n_blocks + i_block, b_logdet)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def backward_kernel(
    p_x, p_params, p_dy, p_dlogdet, p_dx, p_dparams, p_map, p_mask,
    B, C, P, count,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wj, s_wp, s_gb, s_gc, s_gp, s_lb, s_lc, s_lp,
    s_db, s_dc, s_dp, s_vb, s_vc, s_vj, s_vp, s_mb, s_mc, s_mp,
    INVERSE: tl.constexpr, K: tl.constexpr, DERIVATIVES: tl.constexpr, SOFTCLIP: tl.constexpr,
    OUTSIDE: tl.constexpr, HALF_TURN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    MIN_D: tl.constexpr, CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    """One tile; ``p_dlogdet`` is ``[B]`` with strides 0, or like x."""
    i_program = tl.program_id(0)
    if ROWS:
        o_b = (tl.zeros([1, 1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        o_n = tl.arange(0, BLOCK_1)[None, :]
        m_c = o_n < C * P
        m_in = (o_b < B) & m_c
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
    else:
        n_p = tl.cdiv(P, BLOCK_1)
        n_tiles = tl.cdiv(C, BLOCK_0) * n_p
        i_tile = i_program % n_tiles
        o_b = (i_program // n_tiles).to(tl.int64)
        o_c = (i_tile // n_p) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        o_p = (i_tile % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
        m_c = o_c < C
        m_in = m_c & (o_p < P)
    if WIDE:
        o_c = o_c.to(tl.int64)
        o_p = o_p.to(tl.int64)
        s_wj = tl.full([], s_wj, tl.int64)
        s_vj = tl.full([], s_vj, tl.int64)
    b_row, m_row = _params_channel(p_map, o_c, m_c, 0, count, False)
    m_w = m_in & m_row
    m_t = m_w
    if p_mask is not None:
        p_m = p_mask + o_b * s_mb + (o_c * s_mc + o_p * s_mp)
        m_t = m_w & (tl.load(p_m, mask=m_in, other=0) != 0)
    b_x = tl.load(p_x + o_b * s_xb + (o_c * s_xc + o_p * s_xp), mask=m_in, other=0.0).to(DTYPE)
    b_dy = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
    b_dl = b_dy
    if p_dy is not None:
        b_dy = tl.load(p_dy + o_b * s_gb + (o_c * s_gc + o_p * s_gp), mask=m_in, other=0.0).to(DTYPE)
    if p_dlogdet is not None:
        b_dl = tl.load(p_dlogdet + o_b * s_lb + (o_c * s_lc + o_p * s_lp), mask=m_in, other=0.0).to(DTYPE)
    b_dx = spline_backward(
        p_params + o_b * s_wb, b_row * s_wc + o_p * s_wp, s_wj,
        None if p_dparams is None else p_dparams + o_b * s_vb, b_row * s_vc + o_p * s_vp, s_vj,
        m_w, m_t, b_x, b_dy, b_dl, INVERSE, K, DERIVATIVES, SOFTCLIP, OUTSIDE, HALF_TURN,
        LOW, HIGH, BOTTOM, TOP, W_LEAST, W_SCALE, H_LEAST, H_SCALE, MIN_D, CLIP, PRESCALE, DTYPE,
    )  # fmt: skip
    if p_dx is not None:
        b_dx = tl.where(m_t, b_dx, b_dy)
        tl.store(p_dx + o_b * s_db + (o_c * s_dc + o_p * s_dp), b_dx.to(p_dx.dtype.element_ty), mask=m_in)
