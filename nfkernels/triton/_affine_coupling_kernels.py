"""The affine coupling's two Triton kernels; ``affine_coupling.py`` launches them.

One tile is ``[samples, elements of a sample]`` (rows) or ``[channels, positions]`` of one sample (images). The discrete
options and the scale map's constants are constexpr, so that each variant compiles to straight code; layouts of params
are strides and starts, so they cost no variant. A log-determinant that several programs share is summed from partials,
as is the gain's gradient: no atomics, the same bits every run.
"""

import triton
import triton.language as tl

from ._couple import couple, couple_backward

# --- shared by both kernels ------------------------------------------------------------------------------------------


@triton.jit
def _row_elements(n, C, P, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr):
    """Channel and position of the n-th element of a sample, in the order that its memory has."""
    if ONE_POSITION:
        o_c = n
        o_p = n * 0
    elif CHANNELS_INNER:
        o_c = n % C
        o_p = n // C
    else:
        o_c = n // P
        o_p = n % P
    return o_c, o_p


@triton.jit
def _params_channel(p_map, o_c, m_c, start, count, PARTIAL: tl.constexpr):
    """The params channel of each data channel, and whether it has one."""
    if p_map is not None:
        b_row = tl.load(p_map + o_c, mask=m_c, other=-1).to(o_c.dtype)
        m_row = (b_row >= 0) & (b_row < count)
    elif PARTIAL:
        b_row = o_c - start
        m_row = m_c & (b_row >= 0) & (b_row < count)
    else:
        b_row = o_c
        m_row = m_c
    return b_row, m_row


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    p_x, p_params, p_y, p_map, p_mask, p_gain,  # at the samples' first elements
    o_c, o_p, m_c, m_in, start, count,
    s_xc, s_xp, s_wc, s_wp, o_shift, o_scale, s_yc, s_yp, s_mc, s_mp,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes one tile of y and returns its log s, zero where nothing is transformed."""
    b_row, m_row = _params_channel(p_map, o_c, m_c, start, count, PARTIAL)
    m_w = m_in & m_row
    b_x = tl.load(p_x + (o_c * s_xc + o_p * s_xp), mask=m_in, other=0.0).to(DTYPE)
    o_w = b_row * s_wc + o_p * s_wp
    b_t = tl.load(p_params + (o_w + o_shift), mask=m_w, other=0.0).to(DTYPE)
    m_t = m_w
    if p_mask is not None:
        m_t = m_w & (tl.load(p_mask + (o_c * s_mc + o_p * s_mp), mask=m_in, other=0) != 0)
        b_t = tl.where(m_t, b_t, 0.0)
    b_r = b_t
    b_g = b_t
    if KIND != 0:
        b_r = tl.load(p_params + (o_w + o_scale), mask=m_w, other=0.0).to(DTYPE)
        if p_mask is not None:
            # A raw value that is not used must not reach exp.
            b_r = tl.where(m_t, b_r, 0.0)
        if p_gain is not None:
            b_g = tl.load(p_gain + b_row, mask=m_row, other=1.0).to(DTYPE)
    b_y, b_log_s = couple(
        b_x, b_t, b_r, b_g, p_gain is not None,
        KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, SHIFT_FIRST, SHIFT_FACTOR,
    )  # fmt: skip
    if KIND != 0:
        b_log_s = tl.where(m_t, b_log_s, 0.0)
    if PARTIAL or p_mask is not None:
        b_y = tl.where(m_t, b_y, b_x)
    tl.store(p_y + (o_c * s_yc + o_p * s_yp), b_y.to(p_y.dtype.element_ty), mask=m_in)
    return b_log_s


@triton.jit
def forward_kernel(
    p_x, p_params, p_y, p_logdet, p_running, p_map, p_mask, p_gain,  # p_logdet: [B], or partials [B, n_blocks]
    B, C, P, start, count, n_blocks,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wp, o_shift, o_scale, s_yb, s_yc, s_yp, s_mb, s_mc, s_mp,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if ROWS:
        o_b = (tl.zeros([1], tl.int64) + i_program) * BLOCK_0 + tl.arange(0, BLOCK_0)
        m_b = o_b < B
        o_n = tl.arange(0, BLOCK_1)
        m_n = o_n < C * P
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
        b_log_s = _forward_tile(
            p_x + o_b[:, None] * s_xb, p_params + o_b[:, None] * s_wb, p_y + o_b[:, None] * s_yb,
            p_map, None if p_mask is None else p_mask + o_b[:, None] * s_mb, p_gain,
            o_c[None, :], o_p[None, :], m_n[None, :], m_b[:, None] & m_n[None, :], start, count,
            s_xc, s_xp, s_wc, s_wp, o_shift, o_scale, s_yc, s_yp, s_mc, s_mp,
            KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP,
            SHIFT_FIRST, SHIFT_FACTOR, PARTIAL, DTYPE,
        )  # fmt: skip
        b_logdet = tl.sum(b_log_s, 1)
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
                p_map, None if p_mask is None else p_mask + i_b * s_mb, p_gain,
                o_c[:, None], o_p[None, :], m_c, m_in, start, count,
                s_xc, s_xp, s_wc, s_wp, o_shift, o_scale, s_yc, s_yp, s_mc, s_mp,
                KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP,
                SHIFT_FIRST, SHIFT_FACTOR, PARTIAL, DTYPE,
            )  # fmt: skip
        b_logdet = tl.sum(tl.sum(b_sum, 1), 0)
        if p_running is not None:
            b_logdet += tl.load(p_running + i_b)
        tl.store(p_logdet + i_b * n_blocks + i_block, b_logdet)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_tile(
    p_y, p_params, p_dy, p_dx, p_dparams, p_rebuilt, p_map, p_mask, p_gain,  # at the samples' first elements
    b_dlogdet,
    o_c, o_p, m_c, m_in, start, count,
    s_yc, s_yp, s_wc, s_wp, o_shift, o_scale, s_gc, s_gp, s_xc, s_xp, s_vc, s_vp, o_dshift, o_dscale, s_mc, s_mp,
    s_rc, s_rp,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes one tile of dx and dparams, and of the input rebuilt from y where that is wanted.

    Returns the tile's dgain terms, zero where nothing is transformed.
    """
    b_row, m_row = _params_channel(p_map, o_c, m_c, start, count, PARTIAL)
    m_w = m_in & m_row
    if p_dy is not None:
        b_dy = tl.load(p_dy + (o_c * s_gc + o_p * s_gp), mask=m_in, other=0.0).to(DTYPE)
    else:
        b_dy = tl.zeros(m_in.shape, DTYPE)
    o_w = b_row * s_wc + o_p * s_wp
    o_v = b_row * s_vc + o_p * s_vp
    m_t = m_w
    if p_mask is not None:
        m_t = m_w & (tl.load(p_mask + (o_c * s_mc + o_p * s_mp), mask=m_in, other=0) != 0)
    b_y = b_dy
    b_t = b_dy
    b_r = b_dy
    b_g = b_dy
    if KIND != 0 or p_rebuilt is not None:
        # A rebuilt tile takes what passes through from y as well.
        m_y = m_w if p_rebuilt is None else m_in
        b_y = tl.load(p_y + (o_c * s_yc + o_p * s_yp), mask=m_y, other=0.0).to(DTYPE)
    if KIND != 0:
        b_r = tl.load(p_params + (o_w + o_scale), mask=m_w, other=0.0).to(DTYPE)
        if p_mask is not None:
            b_r = tl.where(m_t, b_r, 0.0)
        if p_gain is not None:
            b_g = tl.load(p_gain + b_row, mask=m_row, other=1.0).to(DTYPE)
    if (KIND != 0 and not SHIFT_FIRST) or p_rebuilt is not None:
        b_t = tl.load(p_params + (o_w + o_shift), mask=m_w, other=0.0).to(DTYPE)
        if p_mask is not None:
            b_t = tl.where(m_t, b_t, 0.0)
    b_dx, b_dt, b_dr, b_dgain = couple_backward(
        b_y, b_dy, b_dlogdet, b_t, b_r, b_g, p_gain is not None,
        KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, SHIFT_FIRST, SHIFT_FACTOR,
    )  # fmt: skip
    if KIND != 0:
        if p_mask is not None:
            b_dr = tl.where(m_t, b_dr, 0.0)
        tl.store(p_dparams + (o_v + o_dscale), b_dr.to(p_dparams.dtype.element_ty), mask=m_w)
    if p_gain is not None:
        b_dgain = tl.where(m_t, b_dgain, 0.0)
    else:
        b_dgain = tl.zeros(m_in.shape, DTYPE)
    if p_mask is not None:
        b_dt = tl.where(m_t, b_dt, 0.0)
    if PARTIAL or p_mask is not None:
        b_dx = tl.where(m_t, b_dx, b_dy)
    tl.store(p_dparams + (o_v + o_dshift), b_dt.to(p_dparams.dtype.element_ty), mask=m_w)
    tl.store(p_dx + (o_c * s_xc + o_p * s_xp), b_dx.to(p_dx.dtype.element_ty), mask=m_in)
    if p_rebuilt is not None:
        b_x, _ = couple(
            b_y, b_t, b_r, b_g, p_gain is not None, KIND, not NEGATE,
            PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, not SHIFT_FIRST, -SHIFT_FACTOR,
        )  # fmt: skip
        if PARTIAL or p_mask is not None:
            b_x = tl.where(m_t, b_x, b_y)
        tl.store(p_rebuilt + (o_c * s_rc + o_p * s_rp), b_x.to(p_rebuilt.dtype.element_ty), mask=m_in)
    return b_dgain


@triton.jit
def backward_kernel(
    p_y, p_params, p_dy, p_dlogdet, p_dx, p_dparams, p_rebuilt, p_dgain, p_map, p_mask, p_gain,
    B, C, P, start, count, n_units, n_workers,
    s_yb, s_yc, s_yp, s_wb, s_wc, s_wp, o_shift, o_scale, s_gb, s_gc, s_gp, s_lb,
    s_xb, s_xc, s_xp, s_vb, s_vc, s_vp, o_dshift, o_dscale, s_rb, s_rc, s_rp, s_mb, s_mc, s_mp,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS_INNER: tl.constexpr, ONE_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    """Worker w of a block of channels takes every n_workers-th tile of it, so that it owns one partial of dgain."""
    i_program = tl.program_id(0)
    if ROWS:
        i_worker = i_program
        o_n = tl.arange(0, BLOCK_1)
        m_c = (o_n < C * P)[None, :]
        o_c, o_p = _row_elements(o_n, C, P, CHANNELS_INNER, ONE_POSITION)
        o_c = o_c[None, :]
        o_p = o_p[None, :]
    else:
        n_c = tl.cdiv(C, BLOCK_0)
        n_p = tl.cdiv(P, BLOCK_1)
        i_worker = i_program // n_c
        o_c = (i_program % n_c) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
        m_c = o_c < C
        if WIDE:
            o_c = o_c.to(tl.int64)
    b_dgain = tl.zeros([BLOCK_0, BLOCK_1], DTYPE)
    for i_unit in range(i_worker, n_units, n_workers):
        if ROWS:
            o_b = (tl.zeros([1, 1], tl.int64) + i_unit) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None]
            m_b = o_b < B
            m_in = m_b & m_c
        else:
            o_b = (i_unit // n_p).to(tl.int64)
            o_p = (i_unit % n_p) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :]
            m_b = True
            m_in = m_c & (o_p < P)
            if WIDE:
                o_p = o_p.to(tl.int64)
        if p_dlogdet is None:
            b_dlogdet = 0.0
        elif ROWS:
            b_dlogdet = tl.load(p_dlogdet + o_b * s_lb, mask=m_b, other=0.0).to(DTYPE)
        else:
            b_dlogdet = tl.load(p_dlogdet + o_b * s_lb).to(DTYPE)
        b_dgain += _backward_tile(
            p_y + o_b * s_yb, p_params + o_b * s_wb, None if p_dy is None else p_dy + o_b * s_gb,
            p_dx + o_b * s_xb, p_dparams + o_b * s_vb, None if p_rebuilt is None else p_rebuilt + o_b * s_rb,
            p_map, None if p_mask is None else p_mask + o_b * s_mb, p_gain,
            b_dlogdet, o_c, o_p, m_c, m_in, start, count,
            s_yc, s_yp, s_wc, s_wp, o_shift, o_scale, s_gc, s_gp, s_xc, s_xp, s_vc, s_vp, o_dshift, o_dscale,
            s_mc, s_mp, s_rc, s_rp,
            KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP,
            SHIFT_FIRST, SHIFT_FACTOR, PARTIAL, DTYPE,
        )  # fmt: skip
    if p_gain is not None:
        # Partials: [workers, count, P] of rows, [workers, count] of images.
        b_row, m_row = _params_channel(p_map, o_c, m_c, start, count, PARTIAL)
        if ROWS:
            p_out = p_dgain + i_worker.to(tl.int64) * (count * P) + (b_row * P + o_p)
            tl.store(p_out, tl.sum(b_dgain, 0)[None, :], mask=m_row)
        else:
            p_out = p_dgain + i_worker.to(tl.int64) * count + b_row
            tl.store(p_out, tl.sum(b_dgain, 1)[:, None], mask=m_row)
