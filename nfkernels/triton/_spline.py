"""The rational-quadratic spline of elements in registers, whose raw values are read from memory, and its gradient.

A tile's bins are gone through in two loops: for the softmaxes' maxima and sums, then for the cumulative sums and the
bin; the second reading meets the cache. The gradient goes through them once more, to write. Only the chosen bin's
slopes are read. Formulas: ``nfkernels/reference/rational_quadratic_spline.py``.
"""

import triton
import triton.language as tl

from .scale_map import exp, log, log1p

# --- from raw values to a bin ----------------------------------------------------------------------------------------


@triton.jit
def _exponents(p_raw, o_raw, j, s_j, m_t, K: tl.constexpr, SOFTCLIP: tl.constexpr, CLIP: tl.constexpr,
               PRESCALE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """What the softmaxes of widths and of heights take the exponentials of, for the j-th bin."""
    b_w = tl.load(p_raw + (o_raw + j * s_j), mask=m_t, other=0.0).to(DTYPE) * PRESCALE
    b_h = tl.load(p_raw + (o_raw + (j + K) * s_j), mask=m_t, other=0.0).to(DTYPE) * PRESCALE
    if SOFTCLIP:
        b_w = b_w / (1.0 + tl.abs(b_w) / (0.5 * CLIP))
        b_h = b_h / (1.0 + tl.abs(b_h) / (0.5 * CLIP))
    return b_w, b_h


@triton.jit
def _online(b_most, b_total, b_r):
    """The maximum so far and the sum of exponentials relative to it, with one value more."""
    # The GPU's own exponential: its error grows with a distance at which the term itself no longer counts.
    b_e = tl.exp(-tl.abs(b_r - b_most))
    m_more = b_r > b_most
    return tl.where(m_more, b_r, b_most), tl.where(m_more, b_total * b_e + 1.0, b_total + b_e)


@triton.jit
def find_bin(
    p_raw, o_raw, s_j, m_t, b_v,  # b_v: x, or BY_Y a y
    BY_Y: tl.constexpr, K: tl.constexpr, SOFTCLIP: tl.constexpr, LOW: tl.constexpr, BOTTOM: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The bin's number; of widths, then of heights, the exponentials' maximum and sum, the sum before the bin, its own.

    A bin is as wide as ``W_LEAST + W_SCALE own / sum``. Ends belong to the last and the first bin.
    """
    b_zero = tl.zeros(b_v.shape, DTYPE)
    b_most_w = b_zero
    b_most_h = b_zero
    b_sum_w = b_zero
    b_sum_h = b_zero
    if not SOFTCLIP:
        b_most_w = b_zero - 3.0e38  # finite, so that it leaves no inf - inf
        b_most_h = b_zero - 3.0e38
    for j in range(K):
        b_w, b_h = _exponents(p_raw, o_raw, j, s_j, m_t, K, SOFTCLIP, CLIP, PRESCALE, DTYPE)
        if SOFTCLIP:  # within half of CLIP: no maximum needed
            b_sum_w += tl.exp(b_w)
            b_sum_h += tl.exp(b_h)
        else:
            b_most_w, b_sum_w = _online(b_most_w, b_sum_w, b_w)
            b_most_h, b_sum_h = _online(b_most_h, b_sum_h, b_h)
    if BY_Y:
        b_scale = H_SCALE / b_sum_h
    else:
        b_scale = W_SCALE / b_sum_w
    b_floor = tl.zeros(b_v.shape, DTYPE)  # where the bin would start by the least sizes alone
    b_index = tl.zeros(b_v.shape, tl.int32)
    b_run_w = b_zero
    b_run_h = b_zero
    b_before_w = b_zero
    b_before_h = b_zero
    b_own_w = b_zero
    b_own_h = b_zero
    for j in range(K):
        b_w, b_h = _exponents(p_raw, o_raw, j, s_j, m_t, K, SOFTCLIP, CLIP, PRESCALE, DTYPE)
        b_w = tl.exp(b_w - b_most_w)
        b_h = tl.exp(b_h - b_most_h)
        if BY_Y:
            m_here = (b_v >= BOTTOM + (b_floor + b_scale * b_run_h)) | (j == 0)
            b_floor += H_LEAST
        else:
            m_here = (b_v >= LOW + (b_floor + b_scale * b_run_w)) | (j == 0)
            b_floor += W_LEAST
        b_index = tl.where(m_here, j, b_index)
        b_before_w = tl.where(m_here, b_run_w, b_before_w)
        b_before_h = tl.where(m_here, b_run_h, b_before_h)
        b_own_w = tl.where(m_here, b_w, b_own_w)
        b_own_h = tl.where(m_here, b_h, b_own_h)
        b_run_w += b_w
        b_run_h += b_h
    return b_index, b_most_w, b_sum_w, b_before_w, b_own_w, b_most_h, b_sum_h, b_before_h, b_own_h


@triton.jit
def _slope_places(b_index, K: tl.constexpr, DERIVATIVES: tl.constexpr):
    """The raw slopes of the bin's two knots, and whether there are such: without, the slope is 1."""
    if DERIVATIVES == 0:
        b_first = b_index - 1
        b_second = b_index
    else:
        b_first = b_index
        b_second = b_index + 1
    if DERIVATIVES == 1:
        b_second = tl.where(b_second == K, 0, b_second)
    return b_first, b_second, b_first >= 0, b_second < K - 1 + DERIVATIVES


@triton.jit
def _slope(b_r, m_free, SOFTCLIP: tl.constexpr, MIN_D: tl.constexpr, CLIP: tl.constexpr):
    if SOFTCLIP:
        b_d = exp(b_r / (1.0 + tl.abs(b_r) / CLIP))
    else:
        b_d = MIN_D + (tl.where(b_r < 0.0, 0.0, b_r) + log1p(exp(-tl.abs(b_r))))
    return tl.where(m_free, b_d, 1.0)


@triton.jit
def _slope_derivative(b_r, m_free, SOFTCLIP: tl.constexpr, CLIP: tl.constexpr):
    if SOFTCLIP:
        b_q = 1.0 / (1.0 + tl.abs(b_r) / CLIP)
        b_d = exp(b_r * b_q) * (b_q * b_q)
    else:
        b_u = exp(-tl.abs(b_r))
        b_d = tl.where(b_r < 0.0, b_u, 1.0) / (1.0 + b_u)
    return tl.where(m_free, b_d, 0.0)


# --- elements --------------------------------------------------------------------------------------------------------


@triton.jit
def _turned(b_x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Half a turn on: its own inverse on the interval."""
    b_r = b_x - LOW + 0.5 * (HIGH - LOW)
    b_r = b_r - tl.floor(b_r / (HIGH - LOW)) * (HIGH - LOW)
    b_r = tl.where(b_r < 0.0, b_r + (HIGH - LOW), b_r)  # the quotient was rounded
    b_r = tl.where(b_r >= HIGH - LOW, b_r - (HIGH - LOW), b_r)
    return LOW + b_r


@triton.jit
def _clamped(b_a):
    """To [0, 1]; NaN stays."""
    return tl.where(b_a < 0.0, 0.0, tl.where(b_a > 1.0, 1.0, b_a))


@triton.jit
def spline(
    p_raw, o_raw, s_j, m_t, b_v,  # where not m_t: anything finite comes out of a finite b_v
    INVERSE: tl.constexpr, K: tl.constexpr, DERIVATIVES: tl.constexpr, SOFTCLIP: tl.constexpr,
    OUTSIDE: tl.constexpr, HALF_TURN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    MIN_D: tl.constexpr, CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(result, log-derivative)`` of every element, whose raw values lie from ``p_raw + o_raw`` on, s_j apart."""
    if HALF_TURN and not INVERSE:
        b_v = _turned(b_v, LOW, HIGH)
    b_index, _, b_sum_w, b_before_w, b_own_w, _, b_sum_h, b_before_h, b_own_h = find_bin(
        p_raw, o_raw, s_j, m_t, b_v, INVERSE, K, SOFTCLIP, LOW, BOTTOM,
        W_LEAST, W_SCALE, H_LEAST, H_SCALE, CLIP, PRESCALE, DTYPE,
    )  # fmt: skip
    b_first, b_second, m_first, m_second = _slope_places(b_index, K, DERIVATIVES)
    b_r0 = tl.load(p_raw + (o_raw + (b_first + 2 * K) * s_j), mask=m_t & m_first, other=0.0).to(DTYPE)
    b_r1 = tl.load(p_raw + (o_raw + (b_second + 2 * K) * s_j), mask=m_t & m_second, other=0.0).to(DTYPE)
    b_d0 = _slope(b_r0, m_first, SOFTCLIP, MIN_D, CLIP)
    b_d1 = _slope(b_r1, m_second, SOFTCLIP, MIN_D, CLIP)
    b_place = b_index.to(DTYPE)
    b_scale_w = W_SCALE / b_sum_w
    b_scale_h = H_SCALE / b_sum_h
    b_left = LOW + (W_LEAST * b_place + b_scale_w * b_before_w)
    b_below = BOTTOM + (H_LEAST * b_place + b_scale_h * b_before_h)
    b_w = W_LEAST + b_scale_w * b_own_w
    b_h = H_LEAST + b_scale_h * b_own_h
    b_s = b_h / b_w
    if INVERSE:
        b_e = _clamped((b_v - b_below) / b_h)
        b_f = _clamped((b_below + b_h - b_v) / b_h)
        b_u = b_d0 * b_f - b_d1 * b_e
        b_q = 4.0 * b_s * b_s * b_e * b_f
        b_larger = tl.sqrt(b_u * b_u + b_q) + tl.abs(b_u)  # of the roots of the two quadratics, for a and for b
        b_smaller = b_q / b_larger
        b_a = 2.0 * b_s * b_e
        b_b = 2.0 * b_s * b_f
        b_a = b_a / (tl.where(b_u >= 0.0, b_larger, b_smaller) + b_a)
        b_b = b_b / (tl.where(b_u >= 0.0, b_smaller, b_larger) + b_b)
    else:
        b_a = _clamped((b_v - b_left) / b_w)
        b_b = 1.0 - b_a
    b_total = b_s * (b_a * b_a + b_b * b_b) + (b_d0 + b_d1) * (b_a * b_b)
    b_among = b_d1 * b_a * b_a + 2.0 * b_s * b_a * b_b + b_d0 * b_b * b_b
    b_log = 2.0 * log(b_s / b_total) + log(b_among)
    if INVERSE:
        b_result = b_left + b_w * b_a
        m_before = b_v < BOTTOM
        m_after = b_v > TOP
    else:
        b_result = b_below + b_h * (b_a * (b_s * b_a + b_d0 * b_b) / b_total)
        m_before = b_v < LOW
        m_after = b_v > HIGH
    if OUTSIDE:
        b_result = tl.where(m_before | m_after, b_v, b_result)
        b_log = tl.where(m_before | m_after, 0.0, b_log)
    else:  # straight on, with the slope of the end
        b_log = tl.where(m_before | m_after, log(tl.where(m_before, b_d0, b_d1)), b_log)
        if INVERSE:
            b_result = tl.where(m_before, LOW + (b_v - BOTTOM) / b_d0, b_result)
            b_result = tl.where(m_after, HIGH + (b_v - TOP) / b_d1, b_result)
        else:
            b_result = tl.where(m_before, BOTTOM + (b_v - LOW) * b_d0, b_result)
            b_result = tl.where(m_after, TOP + (b_v - HIGH) * b_d1, b_result)
    if INVERSE:
        b_log = -b_log
        if HALF_TURN:
            b_result = _turned(b_result, LOW, HIGH)
    return b_result, b_log


# --- the gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def spline_backward(
    p_raw, o_raw, s_j, p_draw, o_draw, s_dj, m_w, m_t,  # m_w: elements that have raw values, m_t: transformed ones
    b_x, b_dy, b_dl,  # b_x: the spline's x, the input or of an inverse the output
    INVERSE: tl.constexpr, K: tl.constexpr, DERIVATIVES: tl.constexpr, SOFTCLIP: tl.constexpr,
    OUTSIDE: tl.constexpr, HALF_TURN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    W_LEAST: tl.constexpr, W_SCALE: tl.constexpr, H_LEAST: tl.constexpr, H_SCALE: tl.constexpr,
    MIN_D: tl.constexpr, CLIP: tl.constexpr, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the raw values' gradients, if ``p_draw`` is there, and returns dx."""
    if HALF_TURN:
        b_x = _turned(b_x, LOW, HIGH)
    b_index, b_most_w, b_sum_w, b_before_w, b_own_w, b_most_h, b_sum_h, b_before_h, b_own_h = find_bin(
        p_raw, o_raw, s_j, m_t, b_x, False, K, SOFTCLIP, LOW, BOTTOM,
        W_LEAST, W_SCALE, H_LEAST, H_SCALE, CLIP, PRESCALE, DTYPE,
    )  # fmt: skip
    b_first, b_second, m_first, m_second = _slope_places(b_index, K, DERIVATIVES)
    b_r0 = tl.load(p_raw + (o_raw + (b_first + 2 * K) * s_j), mask=m_t & m_first, other=0.0).to(DTYPE)
    b_r1 = tl.load(p_raw + (o_raw + (b_second + 2 * K) * s_j), mask=m_t & m_second, other=0.0).to(DTYPE)
    b_d0 = _slope(b_r0, m_first, SOFTCLIP, MIN_D, CLIP)
    b_d1 = _slope(b_r1, m_second, SOFTCLIP, MIN_D, CLIP)
    b_w = W_LEAST + W_SCALE * (b_own_w / b_sum_w)
    b_h = H_LEAST + H_SCALE * (b_own_h / b_sum_h)
    b_s = b_h / b_w
    b_left = LOW + (W_LEAST * b_index.to(DTYPE) + W_SCALE * (b_before_w / b_sum_w))
    b_a = _clamped((b_x - b_left) / b_w)
    b_b = 1.0 - b_a
    b_aa = b_a * b_a
    b_ab = b_a * b_b
    b_bb = b_b * b_b
    b_ends = b_d0 + b_d1
    b_total = b_s * (b_aa + b_bb) + b_ends * b_ab
    b_among = b_d1 * b_aa + 2.0 * b_s * b_ab + b_d0 * b_bb
    b_ratio = b_s / b_total
    b_slope = b_ratio * b_ratio * b_among
    # of the log-derivative, by x
    b_bend = (
        2.0 * (b_d1 * b_a + b_s * (b_b - b_a) - b_d0 * b_b) / b_among
        - 2.0 * (b_b - b_a) * (b_ends - 2.0 * b_s) / b_total
    ) / b_w
    m_before = b_x < LOW
    m_after = b_x > HIGH
    m_out = m_before | m_after
    b_tail = tl.where(m_before, b_d0, b_d1)
    if OUTSIDE:
        b_slope = tl.where(m_out, 1.0, b_slope)
    else:
        b_slope = tl.where(m_out, b_tail, b_slope)
    b_bend = tl.where(m_out, 0.0, b_bend)
    b_gy = b_dy
    if INVERSE:  # x(y, params) by the implicit function theorem: the forward's gradients, from these two
        b_dl = -b_dl
        b_dx = (b_dy + b_dl * b_bend) / b_slope
        b_gy = -b_dx
    else:
        b_dx = b_gy * b_slope + b_dl * b_bend
    if p_draw is not None:
        m_in = m_t & ~m_out
        # by s at a fixed a, by the ends' slopes, then by the bin's place and size
        b_share = b_gy * b_h * b_ab / b_total
        b_e = b_a * (b_s * b_a + b_d0 * b_b) / b_total
        b_f = b_b * (b_s * b_b + b_d1 * b_a) / b_total
        b_gs = b_share * (b_d1 * b_aa - b_d0 * b_bb) / b_total
        b_gs += b_dl * (2.0 / b_s + 2.0 * b_ab / b_among - 2.0 * (b_aa + b_bb) / b_total)
        b_g0 = b_share * b_f + b_dl * (b_bb / b_among - 2.0 * b_ab / b_total)
        b_g1 = -b_share * b_e + b_dl * (b_aa / b_among - 2.0 * b_ab / b_total)
        b_gx = b_gy * b_slope + b_dl * b_bend
        b_gleft = tl.where(m_in, -b_gx, 0.0) * W_SCALE
        b_gw = tl.where(m_in, -(b_gx * b_a + b_gs * b_s / b_w), 0.0) * W_SCALE
        b_gbelow = tl.where(m_in, b_gy, 0.0) * H_SCALE
        b_gh = tl.where(m_in, b_gy * b_e + b_gs / b_w, 0.0) * H_SCALE
        if OUTSIDE:
            m_live = m_in
        else:  # y = start + (x - low) d
            m_live = m_t
            b_gtail = b_gy * tl.where(m_before, b_x - LOW, b_x - HIGH) + b_dl / b_tail
            b_g0 = tl.where(m_before, b_gtail, tl.where(m_after, 0.0, b_g0))
            b_g1 = tl.where(m_after, b_gtail, tl.where(m_before, 0.0, b_g1))
        b_g0 = tl.where(m_live, b_g0 * _slope_derivative(b_r0, m_first, SOFTCLIP, CLIP), 0.0)
        b_g1 = tl.where(m_live, b_g1 * _slope_derivative(b_r1, m_second, SOFTCLIP, CLIP), 0.0)
        for j in range(K - 1 + DERIVATIVES):
            b_g = tl.where(b_first == j, b_g0, 0.0) + tl.where(b_second == j, b_g1, 0.0)
            tl.store(p_draw + (o_draw + (j + 2 * K) * s_dj), b_g.to(p_draw.dtype.element_ty), mask=m_w)
        # A softmax's gradient: share times what is above the mean.
        b_mean_w = (b_gleft * b_before_w + b_gw * b_own_w) / b_sum_w
        b_mean_h = (b_gbelow * b_before_h + b_gh * b_own_h) / b_sum_h
        b_scale_w = PRESCALE / b_sum_w
        b_scale_h = PRESCALE / b_sum_h
        for j in range(K):
            b_ew, b_eh = _exponents(p_raw, o_raw, j, s_j, m_t, K, SOFTCLIP, CLIP, PRESCALE, DTYPE)
            b_dw = tl.where(j < b_index, b_gleft, tl.where(j == b_index, b_gw, 0.0)) - b_mean_w
            b_dh = tl.where(j < b_index, b_gbelow, tl.where(j == b_index, b_gh, 0.0)) - b_mean_h
            b_dw = b_scale_w * tl.exp(b_ew - b_most_w) * b_dw
            b_dh = b_scale_h * tl.exp(b_eh - b_most_h) * b_dh
            if SOFTCLIP:  # 1 / (1 + |r| / c) = 1 - |clip(r)| / c
                b_qw = 1.0 - tl.abs(b_ew) / (0.5 * CLIP)
                b_qh = 1.0 - tl.abs(b_eh) / (0.5 * CLIP)
                b_dw = b_dw * (b_qw * b_qw)
                b_dh = b_dh * (b_qh * b_qh)
            tl.store(p_draw + (o_draw + j * s_dj), b_dw.to(p_draw.dtype.element_ty), mask=m_w)
            tl.store(p_draw + (o_draw + (j + K) * s_dj), b_dh.to(p_draw.dtype.element_ty), mask=m_w)
    return b_dx
