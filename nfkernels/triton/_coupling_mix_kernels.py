"""The coupling mix's two Triton kernels; ``coupling_mix.py`` launches them.

A tile holds all channels of SAMPLES x POSITIONS positions: POSITIONS of one sample, or the whole of several small
samples, so that a log-determinant is a sum inside the tile. The channels come as two blocks, those the coupling
transforms [T] and those that pass through [R], each with its share of the product: the scale map is computed for the
first alone. Channel counts are constexpr: a model has a handful of them, and masks and alignments are then known.
"""

import triton
import triton.language as tl

from ._couple import couple, couple_backward

# --- shared by both kernels ------------------------------------------------------------------------------------------


@triton.jit
def _columns(i_tile, B, P, n_p, WIDE: tl.constexpr, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr):
    """Sample and position of each column of a tile, and which of them exist."""
    o = tl.arange(0, SAMPLES * POSITIONS)
    if SAMPLES == 1:
        o_b = tl.zeros([POSITIONS], tl.int64) + i_tile // n_p
        o_p = (i_tile % n_p) * POSITIONS + o
    else:
        o_b = (tl.zeros([SAMPLES * POSITIONS], tl.int64) + i_tile) * SAMPLES + o // POSITIONS
        o_p = o % POSITIONS
    m_m = (o_b < B) & (o_p < P)
    if WIDE:
        o_p = o_p.to(tl.int64)
    return o_b, o_p, m_m


@triton.jit
def _per_channel(v, IN_REGISTERS: tl.constexpr):
    """A vector over channels, to be broadcast over a tile: [channels, columns] of register sums, else transposed."""
    if IN_REGISTERS:
        v = v[:, None]
    else:
        v = v[None, :]
    return v


@triton.jit
def _per_column(v, IN_REGISTERS: tl.constexpr):
    if IN_REGISTERS:
        v = v[None, :]
    else:
        v = v[:, None]
    return v


@triton.jit
def _zeros(CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr):
    if IN_REGISTERS:
        b = tl.zeros([CHANNELS, COLUMNS], DTYPE)
    else:
        b = tl.zeros([COLUMNS, CHANNELS], DTYPE)
    return b


@triton.jit
def _at(o_b, o_c, o_p, s_b, s_c, s_p, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """A tile's offsets."""
    if WIDE:
        o_c = o_c.to(tl.int64)
    return _per_column(o_b * s_b + o_p * s_p, IN_REGISTERS) + _per_channel(o_c * s_c, IN_REGISTERS)


@triton.jit
def _matrix(p, o_k, m_k, s_k, o_j, m_j, s_j, DTYPE: tl.constexpr):
    """The matrix ``a[j, k]``, as [K, J]."""
    b = tl.load(p + (o_k[:, None] * s_k + o_j[None, :] * s_j), mask=m_k[:, None] & m_j[None, :], other=0.0)
    return b.to(DTYPE)


@triton.jit
def _product(b_w, b_x, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``a x`` at every column. In registers K is the outermost axis, which Triton keeps inside a thread; as a dot's
    rows, the columns are what its warps share out."""
    if IN_REGISTERS:
        b_y = tl.sum(b_w[:, :, None] * b_x[:, None, :], 0)
    else:
        b_y = tl.dot(b_x, b_w, input_precision=PRECISION, out_dtype=DTYPE)
    return b_y


@triton.jit
def _dweight(b_dw, b_dz, b_y, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``b_dw + dz y^T``; in registers the sum over the columns is left for the end."""
    if IN_REGISTERS:
        b_dw += b_dz[:, None, :] * b_y[None, :, :]
    else:
        b_dw += tl.dot(tl.trans(b_dz), b_y, input_precision=PRECISION, out_dtype=DTYPE)
    return b_dw


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    p_x, p_params, p_weight, p_bias, p_gain, p_running, p_z, p_extra, p_logdet,  # p_logdet: [B], or partials [B, n_p]
    B, P, n_p, n_tiles, n_workers,
    s_xb, s_xc, s_xp, s_wb, s_wc, s_wp, o_shift, o_scale, s_zb, s_zc, s_zp, s_eb, s_ec, s_ep,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr, SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr,
    C: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
    EXTRA_START: tl.constexpr, EXTRA_COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    SAMPLES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Worker w takes every n_workers-th tile."""
    o_j = tl.arange(0, BLOCK_C)
    o_t = tl.arange(0, BLOCK_T)
    m_j = o_j < C
    m_t = o_t < COUNT
    # Those that pass through are the channels before the transformed ones, or those behind them.
    o_r = tl.arange(0, BLOCK_R) + (0 if START > 0 else COUNT)
    m_r = tl.arange(0, BLOCK_R) < C - COUNT
    if IN_REGISTERS:
        b_wt = _matrix(p_weight, START + o_t, m_t, 1, o_j, m_j, C, DTYPE)
        b_wr = _matrix(p_weight, o_r, m_r, 1, o_j, m_j, C, DTYPE)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_j, mask=m_j, other=0.0).to(DTYPE)
    for i_tile in range(tl.program_id(0), n_tiles, n_workers):
        o_b, o_p, m_m = _columns(i_tile, B, P, n_p, WIDE, SAMPLES, POSITIONS)
        m_tm = _per_channel(m_t, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
        b_x = tl.load(p_x + _at(o_b, START + o_t, o_p, s_xb, s_xc, s_xp, WIDE, IN_REGISTERS), mask=m_tm, other=0.0).to(
            DTYPE
        )
        o_w = _at(o_b, o_t, o_p, s_wb, s_wc, s_wp, WIDE, IN_REGISTERS)
        b_t = tl.load(p_params + (o_w + o_shift), mask=m_tm, other=0.0).to(DTYPE)
        b_r = b_t
        b_g = b_t
        if KIND != 0:
            b_r = tl.load(p_params + (o_w + o_scale), mask=m_tm, other=0.0).to(DTYPE)
            if p_gain is not None:
                b_g = _per_channel(tl.load(p_gain + o_t, mask=m_t, other=1.0).to(DTYPE), IN_REGISTERS)
        b_y, b_log_s = couple(
            b_x, b_t, b_r, b_g, p_gain is not None,
            KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, SHIFT_FIRST, SHIFT_FACTOR,
        )  # fmt: skip
        if not IN_REGISTERS:
            b_wt = _matrix(p_weight, START + o_t, m_t, 1, o_j, m_j, C, DTYPE)
        b_z = _product(b_wt, b_y, IN_REGISTERS, PRECISION, DTYPE)
        if COUNT < C:
            m_rm = _per_channel(m_r, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
            b_xr = tl.load(p_x + _at(o_b, o_r, o_p, s_xb, s_xc, s_xp, WIDE, IN_REGISTERS), mask=m_rm, other=0.0).to(
                DTYPE
            )
            if not IN_REGISTERS:
                b_wr = _matrix(p_weight, o_r, m_r, 1, o_j, m_j, C, DTYPE)
            b_z += _product(b_wr, b_xr, IN_REGISTERS, PRECISION, DTYPE)
        if p_bias is not None:
            b_z += _per_channel(b_bias, IN_REGISTERS)
        b_out = b_z.to(p_z.dtype.element_ty)
        tl.store(
            p_z + _at(o_b, o_j, o_p, s_zb, s_zc, s_zp, WIDE, IN_REGISTERS),
            b_out,
            mask=_per_channel(m_j, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS),
        )
        if EXTRA_COUNT > 0:
            # What z holds, rounded as z is: an inverse knows no more than that.
            b_extra = b_out.to(tl.float32).to(p_extra.dtype.element_ty)
            if p_extra.dtype.element_ty == tl.float64:
                b_extra = b_out.to(tl.float64)
            m_e = (o_j >= EXTRA_START) & (o_j < EXTRA_START + EXTRA_COUNT)
            o_e = _at(o_b, o_j - EXTRA_START, o_p, s_eb, s_ec, s_ep, WIDE, IN_REGISTERS)
            tl.store(p_extra + o_e, b_extra, mask=_per_channel(m_e, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS))
        b_logdet = tl.sum(tl.where(m_tm, b_log_s, 0.0), 0 if IN_REGISTERS else 1)
        b_logdet = tl.sum(tl.reshape(b_logdet, [SAMPLES, POSITIONS]), 1)
        if SAMPLES == 1:
            o_s = tl.zeros([1], tl.int64) + i_tile // n_p
        else:
            o_s = (tl.zeros([SAMPLES], tl.int64) + i_tile) * SAMPLES + tl.arange(0, SAMPLES)
        if p_running is not None:
            b_logdet += tl.load(p_running + o_s, mask=o_s < B, other=0.0)
        tl.store(p_logdet + (o_s * n_p + i_tile % n_p), b_logdet, mask=o_s < B)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_z(
    p_z, p_bias, o_b, o_j, o_p, m_j, m_m, s_zb, s_zc, s_zp,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """``z - bias`` of channels o_j."""
    m_jm = _per_channel(m_j, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
    b_z = tl.load(p_z + _at(o_b, o_j, o_p, s_zb, s_zc, s_zp, WIDE, IN_REGISTERS), mask=m_jm, other=0.0).to(DTYPE)
    if p_bias is not None:
        # A column that does not exist is then -bias, which meets a dz of zero.
        b_z -= _per_channel(tl.load(p_bias + o_j, mask=m_j, other=0.0).to(DTYPE), IN_REGISTERS)
    return b_z


@triton.jit
def _load_dz(
    p_dz, p_dextra, o_b, o_j, o_p, m_j, m_m, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
    EXTRA_START: tl.constexpr, EXTRA_COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """The gradient of channels o_j of z, that of its second output added."""
    m_jm = _per_channel(m_j, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
    if p_dz is not None:
        o_g = _at(o_b, o_j, o_p, s_gb, s_gc, s_gp, WIDE, IN_REGISTERS)
        b_dz = tl.load(p_dz + o_g, mask=m_jm, other=0.0).to(DTYPE)
    else:
        b_dz = tl.zeros(m_jm.shape, DTYPE)
    if EXTRA_COUNT > 0:
        m_e = _per_channel((o_j >= EXTRA_START) & (o_j < EXTRA_START + EXTRA_COUNT), IN_REGISTERS)
        o_e = _at(o_b, o_j - EXTRA_START, o_p, s_eb, s_ec, s_ep, WIDE, IN_REGISTERS)
        b_dz += tl.load(p_dextra + o_e, mask=m_jm & m_e, other=0.0).to(DTYPE)
    return b_dz


@triton.jit
def _through_the_mix(
    b_z, b_dz, b_i, b_w,  # of register sums: whole tiles; dots read theirs in steps of BLOCK_K, or they would spill
    p_z, p_bias, p_dz, p_dextra, p_inverse, p_weight, o_b, o_p, m_m, o_h, m_h,
    s_zb, s_zc, s_zp, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
    C: tl.constexpr, EXTRA_START: tl.constexpr, EXTRA_COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``(y, dy)`` of channels o_h, the mix's input: ``W^-1 (z - bias)`` and ``W^T dz``."""
    if IN_REGISTERS:
        b_y = _product(b_i, b_z, IN_REGISTERS, PRECISION, DTYPE)
        b_dy = _product(b_w, b_dz, IN_REGISTERS, PRECISION, DTYPE)
    else:
        b_y = tl.zeros([BLOCK_M, BLOCK_H], DTYPE)
        b_dy = tl.zeros([BLOCK_M, BLOCK_H], DTYPE)
        for i_k in range(0, C, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < C
            b_zk = _load_z(p_z, p_bias, o_b, o_k, o_p, m_k, m_m, s_zb, s_zc, s_zp, DTYPE, WIDE, IN_REGISTERS)
            b_ik = _matrix(p_inverse, o_k, m_k, 1, o_h, m_h, C, DTYPE)
            b_y += _product(b_ik, b_zk, IN_REGISTERS, PRECISION, DTYPE)
            b_dzk = _load_dz(
                p_dz, p_dextra, o_b, o_k, o_p, m_k, m_m, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
                EXTRA_START, EXTRA_COUNT, DTYPE, WIDE, IN_REGISTERS,
            )  # fmt: skip
            b_wk = _matrix(p_weight, o_k, m_k, C, o_h, m_h, 1, DTYPE)
            b_dy += _product(b_wk, b_dzk, IN_REGISTERS, PRECISION, DTYPE)
    return b_y, b_dy


@triton.jit
def backward_kernel(
    p_z, p_params, p_weight, p_inverse, p_bias, p_gain, p_dz, p_dlogdet, p_dextra,
    p_dx, p_dparams, p_x, p_dweight, p_dbias, p_dgain,  # the last three: partials, one per worker
    B, P, n_p, n_tiles, n_workers,
    s_zb, s_zc, s_zp, s_wb, s_wc, s_wp, o_shift, o_scale, s_gb, s_gc, s_gp, s_lb, s_eb, s_ec, s_ep,
    s_db, s_dc, s_dp, s_vb, s_vc, s_vp, o_dshift, o_dscale, s_xb, s_xc, s_xp,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr, SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr,
    C: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
    EXTRA_START: tl.constexpr, EXTRA_COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SAMPLES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Worker w takes every n_workers-th tile, so that it owns one partial of dW, dbias and dgain."""
    i_worker = tl.program_id(0)
    BLOCK_M: tl.constexpr = SAMPLES * POSITIONS
    o_j = tl.arange(0, BLOCK_C)
    o_t = tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R) + (0 if START > 0 else COUNT)
    m_j = o_j < C
    m_t = o_t < COUNT
    m_r = tl.arange(0, BLOCK_R) < C - COUNT
    b_it = None
    b_wt = None
    b_ir = None
    b_wr = None
    if IN_REGISTERS:
        b_it = _matrix(p_inverse, o_j, m_j, 1, START + o_t, m_t, C, DTYPE)
        b_wt = _matrix(p_weight, o_j, m_j, C, START + o_t, m_t, 1, DTYPE)
        b_ir = _matrix(p_inverse, o_j, m_j, 1, o_r, m_r, C, DTYPE)
        b_wr = _matrix(p_weight, o_j, m_j, C, o_r, m_r, 1, DTYPE)
        # Summed over the columns once, at the end.
        b_dwt = tl.zeros([BLOCK_C, BLOCK_T, BLOCK_M], DTYPE)
        b_dwr = tl.zeros([BLOCK_C, BLOCK_R, BLOCK_M], DTYPE)
        b_db = tl.zeros([BLOCK_C, BLOCK_M], DTYPE)
        b_dg = tl.zeros([BLOCK_T, BLOCK_M], DTYPE)
    else:
        b_dwt = tl.zeros([BLOCK_C, BLOCK_T], DTYPE)
        b_dwr = tl.zeros([BLOCK_C, BLOCK_R], DTYPE)
        b_db = tl.zeros([BLOCK_C], DTYPE)
        b_dg = tl.zeros([BLOCK_T], DTYPE)
    for i_tile in range(i_worker, n_tiles, n_workers):
        o_b, o_p, m_m = _columns(i_tile, B, P, n_p, WIDE, SAMPLES, POSITIONS)
        b_dz = _load_dz(
            p_dz, p_dextra, o_b, o_j, o_p, m_j, m_m, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
            EXTRA_START, EXTRA_COUNT, DTYPE, WIDE, IN_REGISTERS,
        )  # fmt: skip
        if IN_REGISTERS:
            b_z = _load_z(p_z, p_bias, o_b, o_j, o_p, m_j, m_m, s_zb, s_zc, s_zp, DTYPE, WIDE, IN_REGISTERS)
        else:
            b_z = None
        if p_dbias is not None:
            b_db += b_dz if IN_REGISTERS else tl.sum(b_dz, 0)
        # The transformed channels.
        m_tm = _per_channel(m_t, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
        b_y, b_dy = _through_the_mix(
            b_z, b_dz, b_it, b_wt,
            p_z, p_bias, p_dz, p_dextra, p_inverse, p_weight, o_b, o_p, m_m, START + o_t, m_t,
            s_zb, s_zc, s_zp, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
            C, EXTRA_START, EXTRA_COUNT, DTYPE, WIDE, IN_REGISTERS, PRECISION, BLOCK_T, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        if p_dweight is not None:
            b_dwt = _dweight(b_dwt, b_dz, b_y, IN_REGISTERS, PRECISION, DTYPE)
        o_w = _at(o_b, o_t, o_p, s_wb, s_wc, s_wp, WIDE, IN_REGISTERS)
        b_t = b_y
        b_r = b_y
        b_g = b_y
        b_dlogdet = 0.0
        if KIND != 0:
            b_r = tl.load(p_params + (o_w + o_scale), mask=m_tm, other=0.0).to(DTYPE)
            if p_gain is not None:
                b_g = _per_channel(tl.load(p_gain + o_t, mask=m_t, other=1.0).to(DTYPE), IN_REGISTERS)
            if p_dlogdet is not None:
                b_dlogdet = tl.load(p_dlogdet + o_b * s_lb, mask=m_m, other=0.0).to(DTYPE)
                b_dlogdet = _per_column(b_dlogdet, IN_REGISTERS)
        if p_x is not None or (KIND != 0 and not SHIFT_FIRST):
            b_t = tl.load(p_params + (o_w + o_shift), mask=m_tm, other=0.0).to(DTYPE)
        b_dx, b_dt, b_dr, b_dgain = couple_backward(
            b_y, b_dy, b_dlogdet, b_t, b_r, b_g, p_gain is not None,
            KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, SHIFT_FIRST, SHIFT_FACTOR,
        )  # fmt: skip
        o_v = _at(o_b, o_t, o_p, s_vb, s_vc, s_vp, WIDE, IN_REGISTERS)
        tl.store(p_dparams + (o_v + o_dshift), b_dt.to(p_dparams.dtype.element_ty), mask=m_tm)
        if KIND != 0:
            tl.store(p_dparams + (o_v + o_dscale), b_dr.to(p_dparams.dtype.element_ty), mask=m_tm)
        o_d = _at(o_b, START + o_t, o_p, s_db, s_dc, s_dp, WIDE, IN_REGISTERS)
        tl.store(p_dx + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_tm)
        if p_gain is not None:
            b_dgain = tl.where(m_tm, b_dgain, 0.0)
            b_dg += b_dgain if IN_REGISTERS else tl.sum(b_dgain, 0)
        if p_x is not None:
            b_x, _ = couple(
                b_y, b_t, b_r, b_g, p_gain is not None, KIND, not NEGATE,
                PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, not SHIFT_FIRST, -SHIFT_FACTOR,
            )  # fmt: skip
            o_x = _at(o_b, START + o_t, o_p, s_xb, s_xc, s_xp, WIDE, IN_REGISTERS)
            tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_tm)
        # Those that pass through.
        if COUNT < C:
            m_rm = _per_channel(m_r, IN_REGISTERS) & _per_column(m_m, IN_REGISTERS)
            b_y, b_dy = _through_the_mix(
                b_z, b_dz, b_ir, b_wr,
                p_z, p_bias, p_dz, p_dextra, p_inverse, p_weight, o_b, o_p, m_m, o_r, m_r,
                s_zb, s_zc, s_zp, s_gb, s_gc, s_gp, s_eb, s_ec, s_ep,
                C, EXTRA_START, EXTRA_COUNT, DTYPE, WIDE, IN_REGISTERS, PRECISION, BLOCK_R, BLOCK_K, BLOCK_M,
            )  # fmt: skip
            o_d = _at(o_b, o_r, o_p, s_db, s_dc, s_dp, WIDE, IN_REGISTERS)
            tl.store(p_dx + o_d, b_dy.to(p_dx.dtype.element_ty), mask=m_rm)
            if p_dweight is not None:
                b_dwr = _dweight(b_dwr, b_dz, b_y, IN_REGISTERS, PRECISION, DTYPE)
            if p_x is not None:
                o_x = _at(o_b, o_r, o_p, s_xb, s_xc, s_xp, WIDE, IN_REGISTERS)
                tl.store(p_x + o_x, b_y.to(p_x.dtype.element_ty), mask=m_rm)
    i_out = i_worker.to(tl.int64) * C
    if IN_REGISTERS:
        b_dwt = tl.sum(b_dwt, 2)
        b_dwr = tl.sum(b_dwr, 2)
        b_db = tl.sum(b_db, 1)
        b_dg = tl.sum(b_dg, 1)
    if p_dweight is not None:
        p_out = p_dweight + i_out * C + o_j[:, None] * C
        tl.store(p_out + (START + o_t)[None, :], b_dwt, mask=m_j[:, None] & m_t[None, :])
        if COUNT < C:
            tl.store(p_out + o_r[None, :], b_dwr, mask=m_j[:, None] & m_r[None, :])
    if p_dbias is not None:
        tl.store(p_dbias + i_out + o_j, b_db, mask=m_j)
    if p_gain is not None:
        tl.store(p_dgain + i_worker.to(tl.int64) * COUNT + o_t, b_dg, mask=m_t)
