"""The scale maps in Triton: registers in, registers out (``nfkernels/reference/scale_map.py`` is the specification).

fp32 exp, log, log1p, tanh and atan are polynomials of our own, within about two units in the last place: Triton's are
the GPU's approximate instructions, whose error in ``log`` near 1 alone would show in a log-determinant, and
``libdevice`` has no meaning under Triton's interpreter. fp64 takes ``tl.exp`` and ``tl.log``, which are accurate there.
Coefficients: Cephes (Moshier 1989). Comparisons are written so that NaN passes through.
"""

import triton
import triton.language as tl

# The order of KINDS in the reference; the low bits of the packed form.
ADDITIVE: tl.constexpr = tl.constexpr(0)
EXP: tl.constexpr = tl.constexpr(1)
SIGMOID: tl.constexpr = tl.constexpr(2)
TANH: tl.constexpr = tl.constexpr(3)
ATAN: tl.constexpr = tl.constexpr(4)
SOFTPLUS: tl.constexpr = tl.constexpr(5)
SOFTCLIP: tl.constexpr = tl.constexpr(6)

SOFTPLUS_TAIL: tl.constexpr = tl.constexpr(-15.0)


# --- elementary functions --------------------------------------------------------------------------------------------


@triton.jit
def _exp_32(x):
    # e^x = 2^k e^f with |f| <= ln(2)/2. Only k is clamped, so that NaN passes through f.
    k = tl.floor(x * 1.44269504088896341 + 0.5)
    k = tl.minimum(tl.maximum(k, -150.0), 129.0)
    f = x - k * 0.693359375
    f = f + k * 2.12194440e-4
    q = 1.9875691500e-4 * f + 1.3981999507e-3
    q = q * f + 8.3334519073e-3
    q = q * f + 4.1665795894e-2
    q = q * f + 1.6666665459e-1
    q = q * f + 5.0000001201e-1
    e = q * (f * f) + f + 1.0
    # 2^k in two factors: one alone leaves the exponent's range before the result does.
    i = k.to(tl.int32)
    half = i >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((i - half + 127) << 23).to(tl.float32, bitcast=True)
    e = (e * low) * high
    e = tl.where(x > 89.0, float("inf"), e)  # the polynomial of inf would be NaN
    return tl.where(x < -104.0, 0.0, e)


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = _exp_32(x)
    return y


@triton.jit
def _log1p_polynomial(f):
    """log(1 + f) - f for f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    q = 7.0376836292e-2 * f - 1.1514610310e-1
    q = q * f + 1.1676998740e-1
    q = q * f - 1.2420140846e-1
    q = q * f + 1.4249322787e-1
    q = q * f - 1.6668057665e-1
    q = q * f + 2.0000714765e-1
    q = q * f - 2.4999993993e-1
    q = q * f + 3.3333331174e-1
    z = f * f
    return q * f * z - 0.5 * z


@triton.jit
def _log_32(x):
    tiny = x < 1.17549435e-38
    bits = tl.where(tiny, x * 8388608.0, x).to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    e = k.to(tl.float32) - tl.where(tiny, 23.0, 0.0)
    y = (_log1p_polynomial(f) - e * 2.12194440e-4 + f) + e * 0.693359375
    y = tl.where(x < float("inf"), y, x)  # inf and NaN
    return tl.where(x > 0.0, y, tl.where(x == 0.0, float("-inf"), float("nan")))


@triton.jit
def log(x):
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        y = _log_32(x)
    return y


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1], without losing the digits of a small u."""
    if u.dtype == tl.float64:
        w = 1.0 + u
        kept = w - 1.0  # what of u survived the rounding; log(w) / kept is smooth (Goldberg 1991, theorem 4)
        y = tl.where(kept == 0.0, u, tl.log(w) * (u / tl.where(kept == 0.0, 1.0, kept)))
    else:
        upper = u > 0.41421356
        f = tl.where(upper, 0.5 * (u - 1.0), u)
        e = tl.where(upper, 1.0, 0.0)
        y = (_log1p_polynomial(f) - e * 2.12194440e-4 + f) + e * 0.693359375
    return y


@triton.jit
def tanh(x):
    size = tl.abs(x)
    z = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        small = x + x * (z * (p / q))
    else:
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        small = x + x * (z * p)
    large = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def atan(x):
    # Reduced to [-0.42, 0.42] (fp32) or [-0.66, 0.66] (fp64) around 0, pi/4 or pi/2 by one division.
    size = tl.abs(x)
    if x.dtype == tl.float64:
        near: tl.constexpr = 0.66
    else:
        near: tl.constexpr = 0.4142135623730950
    far = size > 2.414213562373095
    mid = (size > near) & (size <= 2.414213562373095)
    top = tl.where(far, -1.0, tl.where(mid, size - 1.0, size))
    w = top / tl.where(far, size, tl.where(mid, size + 1.0, 1.0))
    base = tl.where(far, 2.0, tl.where(mid, 1.0, 0.0)).to(x.dtype) * 0.785398163397448310
    z = w * w
    if x.dtype == tl.float64:
        p = -8.750608600031904122785e-1 * z - 1.615753718733365076637e1
        p = p * z - 7.500855792314704667340e1
        p = p * z - 1.228866684490136173410e2
        p = p * z - 6.485021904942025371773e1
        q = z + 2.485846490142306297962e1
        q = q * z + 1.650270098316988542046e2
        q = q * z + 4.328810604912902668951e2
        q = q * z + 4.853903996359136964868e2
        q = q * z + 1.945506571482613964425e2
        y = w + w * (z * (p / q))
    else:
        p = 8.05374449538e-2 * z - 1.38776856032e-1
        p = p * z + 1.99777106478e-1
        p = p * z - 3.33329491539e-1
        y = w + w * (z * p)
    y = base + y
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _sigmoid(a, u):
    """sigmoid(a) with u = exp(-|a|)."""
    return tl.where(a < 0.0, u, 1.0) / (1.0 + u)


# --- the family ------------------------------------------------------------------------------------------------------


@triton.jit
def _argument(r, PRESCALE: tl.constexpr, OFFSET: tl.constexpr):
    if PRESCALE != 1.0:
        r = r * PRESCALE
    if OFFSET != 0.0:
        r = r + OFFSET
    return r


@triton.jit
def _clip(a, CLAMP: tl.constexpr):
    if CLAMP != 0.0:
        a = tl.where(a > CLAMP, CLAMP, tl.where(a < -CLAMP, -CLAMP, a))
    return a


@triton.jit
def scale_and_log(
    r, k,  # raw values, and gain_factor times the learned gain (only read with HAS_GAIN)
    KIND: tl.constexpr, NEGATE: tl.constexpr, HAS_GAIN: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
):  # fmt: skip
    """``(s, log s)``, or those of ``1 / s`` with NEGATE (reciprocal or inverse, not both). CLAMP 0 stands for none."""
    a = _argument(r, PRESCALE, OFFSET)
    if KIND == SIGMOID:
        u = exp(-tl.abs(a))
        if EPS == 0.0:
            log_s = tl.where(a < 0.0, a, 0.0) - log1p(u)
            if HAS_GAIN:
                log_s = log(k) + log_s
            elif LOG_GAIN != 0.0:
                log_s = LOG_GAIN + log_s
        if EPS == 0.0 and not HAS_GAIN and GAIN == 1.0 and NEGATE:
            s = (1.0 + u) / tl.where(a < 0.0, u, 1.0)
        else:
            s = _sigmoid(a, u)
            if HAS_GAIN:
                s = k * s
            elif GAIN != 1.0:
                s = GAIN * s
            if EPS != 0.0:
                s = s + EPS
                log_s = log(s)
            if NEGATE:
                s = 1.0 / s
    elif KIND == SOFTPLUS:
        plus = tl.where(a > 0.0, a, 0.0) + log1p(exp(-tl.abs(a)))
        s = plus
        if HAS_GAIN:
            s = k * s
        elif GAIN != 1.0:
            s = GAIN * s
        if EPS == 0.0:
            # Far to the left softplus(a) = e^a to working precision, and its logarithm is a itself.
            v = exp(tl.where(a < SOFTPLUS_TAIL, a, SOFTPLUS_TAIL))
            tail = a - v * 0.5 + (5.0 / 24.0) * (v * v)
            log_s = tl.where(a < SOFTPLUS_TAIL, tail, log(tl.where(a < SOFTPLUS_TAIL, 1.0, plus)))
            if HAS_GAIN:
                log_s = log(k) + log_s
            elif LOG_GAIN != 0.0:
                log_s = LOG_GAIN + log_s
        else:
            s = s + EPS
            log_s = log(s)
        if CLAMP != 0.0:
            log_s = tl.where(log_s > LOG_CLAMP, LOG_CLAMP, log_s)
            s = tl.where(s > CLAMP, CLAMP, s)
        if NEGATE:
            s = 1.0 / s
    else:
        if KIND == EXP:
            log_s = _clip(a, CLAMP)
        elif KIND == TANH:
            log_s = CLAMP * tanh(a)
        elif KIND == ATAN:
            log_s = CLAMP * atan(a)
        else:
            log_s = a / (1.0 + tl.abs(a) / CLAMP)
        if HAS_GAIN:
            log_s = k * log_s
        elif GAIN != 1.0:
            log_s = GAIN * log_s
        s = exp(-log_s if NEGATE else log_s)
    return s, -log_s if NEGATE else log_s


@triton.jit
def scale_and_derivatives(
    r, g,  # raw values, and the learned gain (only read with HAS_GAIN)
    KIND: tl.constexpr, NEGATE: tl.constexpr, HAS_GAIN: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr,
):  # fmt: skip
    """``(s, d log s / d r, d log s / d g)``, of ``1 / s`` with NEGATE; the last means nothing without a gain."""
    a = _argument(r, PRESCALE, OFFSET)
    if HAS_GAIN:
        k = GAIN * g
    else:
        k = tl.full([1, 1], GAIN, r.dtype)
    if KIND == SIGMOID:
        u = exp(-tl.abs(a))
        p = _sigmoid(a, u)
        s = k * p + EPS
        if EPS == 0.0:
            d = tl.where(a < 0.0, 1.0, u) / (1.0 + u)
            dg = tl.broadcast_to(1.0 / g, d.shape) if HAS_GAIN else d
        else:
            d = k * p * (tl.where(a < 0.0, 1.0, u) / (1.0 + u)) / s
            dg = GAIN * p / s
        if NEGATE:
            s = 1.0 / s
    elif KIND == SOFTPLUS:
        u = exp(-tl.abs(a))
        p = _sigmoid(a, u)
        plus = tl.where(a > 0.0, a, 0.0) + log1p(u)
        s = k * plus + EPS
        if EPS == 0.0:
            v = exp(tl.where(a < SOFTPLUS_TAIL, a, SOFTPLUS_TAIL))
            d = tl.where(a < SOFTPLUS_TAIL, 1.0 - 0.5 * v, p / tl.where(a < SOFTPLUS_TAIL, 1.0, plus))
            dg = tl.broadcast_to(1.0 / g, d.shape) if HAS_GAIN else d
        else:
            d = k * p / s
            dg = GAIN * plus / s
        if CLAMP != 0.0:
            over = s > CLAMP
            d = tl.where(over, 0.0, d)
            dg = tl.where(over, 0.0, dg)
            s = tl.where(over, CLAMP, s)
        if NEGATE:
            s = 1.0 / s
    else:
        if KIND == EXP:
            value = _clip(a, CLAMP)
            slope = tl.full(a.shape, 1.0, a.dtype)
            if CLAMP != 0.0:
                slope = tl.where(tl.abs(a) <= CLAMP, 1.0, 0.0).to(a.dtype)
        elif KIND == TANH:
            u = exp(-2.0 * tl.abs(a))  # 1 - tanh^2 = 4u / (1 + u)^2 keeps its digits where tanh saturates
            value = CLAMP * tanh(a)
            slope = CLAMP * (4.0 * u / ((1.0 + u) * (1.0 + u)))
        elif KIND == ATAN:
            value = CLAMP * atan(a)
            slope = CLAMP / (1.0 + a * a)
        else:
            q = 1.0 + tl.abs(a) / CLAMP
            value = a / q
            slope = 1.0 / (q * q)
        log_s = k * value
        s = exp(-log_s if NEGATE else log_s)
        d = k * slope
        dg = GAIN * value
    d = d * PRESCALE
    return s, -d if NEGATE else d, -dg if NEGATE else dg
