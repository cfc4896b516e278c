"""The coupling of elements in registers and its gradient, for every kernel that holds one."""

import triton
import triton.language as tl

from .scale_map import scale_and_derivatives, scale_and_log


@triton.jit
def couple(
    b_x, b_t, b_r, b_g,  # b_r: only where there is a scale; b_g, the learned gain: only with HAS_GAIN
    HAS_GAIN: tl.constexpr, KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr, SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr,
):  # fmt: skip
    """``(y, log s)`` of transformed elements. SHIFT_FACTOR: what the raw shift is multiplied by, -1 in an inverse."""
    if SHIFT_FACTOR != 1:
        b_t = b_t * SHIFT_FACTOR
    if KIND == 0:
        b_y = b_x + b_t
        b_log_s = tl.zeros(b_x.shape, b_x.dtype)
    else:
        b_s, b_log_s = scale_and_log(
            b_r, GAIN * b_g if HAS_GAIN else b_r,
            KIND, NEGATE, HAS_GAIN, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP,
        )  # fmt: skip
        if SHIFT_FIRST:
            b_y = (b_x + b_t) * b_s
        else:
            b_y = b_x * b_s + b_t
    return b_y, b_log_s


@triton.jit
def couple_backward(
    b_y, b_dy, b_dlogdet, b_t, b_r, b_g,  # b_t: only where the scale comes first
    HAS_GAIN: tl.constexpr, KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr, SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr,
):  # fmt: skip
    """``(dx, dt, dr, the terms of dgain)`` of transformed elements; dr only where there is a scale."""
    b_dx = b_dy
    b_dt = b_dy
    b_dr = b_dy
    b_dgain = b_dy
    if KIND != 0:
        b_s, b_d, b_dg = scale_and_derivatives(
            b_r, b_g, KIND, NEGATE, HAS_GAIN, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP
        )
        b_dx = b_dy * b_s
        if SHIFT_FIRST:
            b_dt = b_dx
            b_u = b_dy * b_y + b_dlogdet
        else:
            b_u = b_dy * (b_y - b_t * SHIFT_FACTOR) + b_dlogdet
        b_dr = b_u * b_d  # the inverse's sign is in NEGATE already
        b_dgain = b_u * b_dg
    if SHIFT_FACTOR != 1:
        b_dt = b_dt * SHIFT_FACTOR
    return b_dx, b_dt, b_dr, b_dgain
