"""The rational-quadratic spline in plain PyTorch: specification of the kernels, their fallback and double backward.

In a bin of width w, height h, slope ``s = h / w`` and end slopes d0, d1, with ``a = (x - x_k) / w`` and ``b = 1 - a``:

    D    = s (a^2 + b^2) + (d0 + d1) a b
    y    = y_k + h a (s a + d0 b) / D
    y'   = s^2 M / D^2,   M = d1 a^2 + 2 s a b + d0 b^2

which is Durkan et al. 2019, equations 4 and 5, with nothing left to cancel: every term is positive. The inverse solves
a quadratic (their equations 6 to 8); with ``e = (y - y_k) / h``, ``f = 1 - e``, ``u = d0 f - d1 e`` its discriminant is

    u^2 + 4 s^2 e f

and so is never negative, whatever rounding does; ``a = 2 s e / (u + 2 s e + sqrt(..))``, and b likewise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine_coupling import compute_dtype
from .spline import ELEMENTWISE, HALF_TURN, IDENTITY_OUTSIDE, INVERSE, SOFTCLIP, Derivatives, Spline


class Form(NamedTuple):
    """A spline's numbers, and what to do with it: what the raw ops take, in their order."""

    bins: int
    form: int
    low: float
    high: float
    bottom: float
    top: float
    min_width: float
    min_height: float
    min_derivative: float
    clip: float
    prescale: float

    @staticmethod
    def pack(spline: Spline, inverse: bool, elementwise: bool) -> Form:
        bins, form, *numbers = spline.packed
        return Form(bins, form | INVERSE * inverse | ELEMENTWISE * elementwise, *numbers)

    @property
    def derivatives(self) -> Derivatives:
        return Derivatives(self.form & 3)

    @property
    def softclip(self) -> bool:
        return bool(self.form & SOFTCLIP)

    @property
    def identity_outside(self) -> bool:
        return bool(self.form & IDENTITY_OUTSIDE)

    @property
    def half_turn(self) -> bool:
        return bool(self.form & HALF_TURN)

    @property
    def inverse(self) -> bool:
        return bool(self.form & INVERSE)

    @property
    def elementwise(self) -> bool:
        return bool(self.form & ELEMENTWISE)

    @property
    def slopes(self) -> int:
        """Raw slopes per element."""
        return self.bins - 1 + self.derivatives

    @property
    def count(self) -> int:  # type: ignore[override]  # of tuple
        """Raw values per element."""
        return 2 * self.bins + self.slopes


class Bin(NamedTuple):
    """The bin an element falls into, each ``[B, Ct, *spatial]``."""

    index: Tensor  # type: ignore[assignment]  # of tuple
    x: Tensor
    w: Tensor
    y: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor


# --- public to the ops ------------------------------------------------------------------------------------------------


def forward(x, params, mask, channel_map, logdet, form: Form) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``: see :func:`nfkernels.ops.rational_quadratic_spline`; every argument already checked."""
    dtype = compute_dtype(x)
    data = x.to(dtype)
    given = _raw(params, x, channel_map, form).to(dtype)
    y, each = _transform(data, given, form)
    moved = _moved(x, mask, channel_map, form, params)
    if moved is not None:
        y, each = torch.where(moved, y, data), torch.where(moved, each, 0.0)
    if not form.elementwise:
        each = each.flatten(1).sum(1)
        each = each if logdet is None else logdet + each
    return y.to(x.dtype), each


def backward(saved, params, dy, dlogdet, mask, channel_map, form: Form) -> tuple[Tensor, Tensor]:
    """``(dx, dparams)`` from the spline's x: the input, or of an inverse the output. Differentiable itself."""
    dtype = compute_dtype(saved)
    x = saved.to(dtype)
    zero = torch.zeros_like(x)
    dy = zero if dy is None else dy.to(dtype)
    if dlogdet is None:
        dl = zero
    else:
        dl = dlogdet if form.elementwise else dlogdet.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    moved = _moved(saved, mask, channel_map, form, params)
    given = _raw(params, saved, channel_map, form).to(dtype)
    dx, dgiven = _gradients(x, given, dy, dl, moved, form)
    if moved is not None:
        dx = torch.where(moved, dx, dy)
    return dx.to(saved.dtype), _scattered(dgiven, channel_map, params, form).to(params.dtype)


# --- channels ---------------------------------------------------------------------------------------------------------


def _raw(params: Tensor, x: Tensor, channel_map: Tensor | None, form: Form) -> Tensor:
    """``[B, C, P, *spatial]``: a channel that passes through has some other's."""
    raw = params.unflatten(1, (-1, form.count))
    if channel_map is None:
        return raw
    return raw.index_select(1, channel_map.clamp(0, raw.shape[1] - 1))


def _scattered(dgiven: Tensor, channel_map: Tensor | None, params: Tensor, form: Form) -> Tensor:
    """The reverse of :func:`_raw`: channels that pass through have zeros to add."""
    if channel_map is not None:
        count = params.shape[1] // form.count
        shape = (dgiven.shape[0], count, *dgiven.shape[2:])
        dgiven = dgiven.new_zeros(shape).index_add(1, channel_map.clamp(0, count - 1), dgiven)
    return dgiven.flatten(1, 2)


def _moved(x, mask, channel_map, form: Form, params) -> Tensor | None:
    """Where an element is transformed, broadcastable to x; None: everywhere."""
    if channel_map is None:
        return mask
    count = params.shape[1] // form.count
    chosen = ((channel_map >= 0) & (channel_map < count)).reshape(-1, *[1] * (x.dim() - 2))
    return chosen if mask is None else chosen & mask


# --- the spline -------------------------------------------------------------------------------------------------------


def _clip(r: Tensor, c: float) -> Tensor:
    return r / (1 + r.abs() / c)


def _clip_derivative(r: Tensor, c: float) -> Tensor:
    return (1 + r.abs() / c).square().reciprocal()


def _shares(raw: Tensor, form: Form) -> Tensor:
    """softmax over axis 2: the shares of the bins before a minimum."""
    scaled = raw * form.prescale
    return torch.softmax(_clip(scaled, form.clip / 2) if form.softclip else scaled, 2)


def _sizes(shares: Tensor, low: float, high: float, least: float) -> tuple[Tensor, Tensor]:
    """``(start, size)`` of every bin along axis 2."""
    sizes = (high - low) * (least + (1 - least * shares.shape[2]) * shares)
    return low + torch.cumsum(sizes, 2) - sizes, sizes


def _slopes(raw: Tensor, form: Form) -> Tensor:
    """The K + 1 knots' slopes along axis 2."""
    d = torch.exp(_clip(raw, form.clip)) if form.softclip else form.min_derivative + F.softplus(raw)
    if form.derivatives == Derivatives.periodic:
        return torch.cat([d, d[:, :, :1]], 2)
    if form.derivatives == Derivatives.all:
        return d
    one = torch.ones_like(d[:, :, :1])
    return torch.cat([one, d, one], 2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index.unsqueeze(2)).squeeze(2)


def _bin(v: Tensor, given: Tensor, form: Form, by_y: bool) -> Bin:
    """The bin of v, an x (or by_y a y): ends belong to the last and the first bin."""
    widths, heights, raw = given.split([form.bins, form.bins, form.slopes], 2)
    left, w = _sizes(_shares(widths, form), form.low, form.high, form.min_width)
    below, h = _sizes(_shares(heights, form), form.bottom, form.top, form.min_height)
    slopes = _slopes(raw, form)
    knots = below if by_y else left
    index = (v.unsqueeze(2) >= knots[:, :, 1:]).sum(2)
    x, w, y, h = (_pick(t, index) for t in (left, w, below, h))
    return Bin(index, x, w, y, h, _pick(slopes, index), _pick(slopes, index + 1))


def _turned(x: Tensor, form: Form) -> Tensor:
    """Half a turn on: its own inverse on the interval."""
    length = form.high - form.low
    return form.low + torch.remainder(x - form.low + length / 2, length)


def _log_slope(a: Tensor, b: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    ab = a * b
    total = s * (a * a + b * b) + (d0 + d1) * ab
    return 2 * (torch.log(s) - torch.log(total)) + torch.log(d1 * a * a + 2 * s * ab + d0 * b * b)


def _transform(v: Tensor, given: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """``(result, log-derivative)`` of every element."""
    if form.half_turn and not form.inverse:
        v = _turned(v, form)
    k = _bin(v, given, form, form.inverse)
    s = k.h / k.w
    if form.inverse:
        e = ((v - k.y) / k.h).clamp(0, 1)
        f = ((k.y + k.h - v) / k.h).clamp(0, 1)
        u, q = k.d0 * f - k.d1 * e, 4 * s * s * e * f
        larger = torch.sqrt(u * u + q) + u.abs()  # of the roots of the two quadratics, for a and for b
        smaller = q / larger
        to_a, to_b = torch.where(u >= 0, larger, smaller), torch.where(u >= 0, smaller, larger)
        a, b = 2 * s * e / (to_a + 2 * s * e), 2 * s * f / (to_b + 2 * s * f)
        result, each = k.x + k.w * a, -_log_slope(a, b, s, k.d0, k.d1)
        low, high, start, end = form.bottom, form.top, form.low, form.high
        first, last = 1 / k.d0, 1 / k.d1
    else:
        a = ((v - k.x) / k.w).clamp(0, 1)
        b = 1 - a
        total = s * (a * a + b * b) + (k.d0 + k.d1) * a * b
        result, each = k.y + k.h * (a * (s * a + k.d0 * b) / total), _log_slope(a, b, s, k.d0, k.d1)
        low, high, start, end = form.low, form.high, form.bottom, form.top
        first, last = k.d0, k.d1
    before, after = v < low, v > high
    if form.identity_outside:
        outside = before | after
        result, each = torch.where(outside, v, result), torch.where(outside, 0.0, each)
    else:
        result = torch.where(before, start + (v - low) * first, torch.where(after, end + (v - high) * last, result))
        each = torch.where(before, torch.log(first), torch.where(after, torch.log(last), each))
    if form.half_turn and form.inverse:
        result = _turned(result, form)
    return result, each


def _gradients(x, given, dy, dl, moved, form: Form) -> tuple[Tensor, Tensor]:
    """``(dx, dgiven)`` of elements, ``dy`` and ``dl`` of the result and its log-derivative. x: the spline's input."""
    x = _turned(x, form) if form.half_turn else x
    k = _bin(x, given, form, False)
    s = k.h / k.w
    a = ((x - k.x) / k.w).clamp(0, 1)
    b = 1 - a
    ab = a * b
    ends = k.d0 + k.d1
    total = s * (a * a + b * b) + ends * ab
    among = k.d1 * a * a + 2 * s * ab + k.d0 * b * b
    e, f = a * (s * a + k.d0 * b) / total, b * (s * b + k.d1 * a) / total
    slope = s * s * among / (total * total)
    # of the log-derivative, by x
    bend = (2 * (k.d1 * a + s * (b - a) - k.d0 * b) / among - 2 * (b - a) * (ends - 2 * s) / total) / k.w
    before, after = x < form.low, x > form.high
    outside = before | after
    tail = torch.where(before, k.d0, k.d1)
    slope = torch.where(outside, 1.0 if form.identity_outside else tail, slope)
    bend = torch.where(outside, 0.0, bend)
    if form.inverse:  # x(y, params) by the implicit function theorem: the forward's gradients, from these two
        dl = -dl
        gy = -(dy + dl * bend) / slope
        dx = -gy
    else:
        gy = dy
        dx = gy * slope + dl * bend
    zero = torch.zeros_like(x)
    dead = zero.bool() if moved is None else ~moved
    inside = ~(outside | dead)
    # by s at a fixed a, by the ends' slopes, then by the bin's place and size
    gs = gy * k.h * ab * (k.d1 * a * a - k.d0 * b * b) / (total * total)
    gs = gs + dl * (2 / s + 2 * ab / among - 2 * (a * a + b * b) / total)
    g0 = gy * k.h * ab * f / total + dl * (b * b / among - 2 * ab / total)
    g1 = -gy * k.h * ab * e / total + dl * (a * a / among - 2 * ab / total)
    gx = gy * slope + dl * bend
    gleft, gw, gbelow, gh = -gx, -(gx * a + gs * s / k.w), gy, gy * e + gs / k.w
    if not form.identity_outside:  # y = start + (x - low) d
        reach = torch.where(before, x - form.low, x - form.high)
        gtail = gy * reach + dl / tail
        g0 = torch.where(before, gtail, torch.where(after, 0.0, g0))
        g1 = torch.where(after, gtail, torch.where(before, 0.0, g1))
        live = ~dead
    else:
        live = inside
    g0, g1 = (torch.where(live, g, 0.0) for g in (g0, g1))
    gleft, gw, gbelow, gh = (torch.where(inside, g, 0.0) for g in (gleft, gw, gbelow, gh))
    widths, heights, raw = given.split([form.bins, form.bins, form.slopes], 2)
    dgiven = torch.cat(
        [
            _sizes_gradient(widths, k.index, gleft, gw, form.high - form.low, form.min_width, form),
            _sizes_gradient(heights, k.index, gbelow, gh, form.top - form.bottom, form.min_height, form),
            _slopes_gradient(raw, k.index, g0, g1, form),
        ],
        2,
    )
    return dx, dgiven


def _sizes_gradient(raw, index, gstart, gsize, length: float, least: float, form: Form) -> Tensor:
    """From the gradients of the chosen bin's start and size to those of the raw sizes."""
    shares = _shares(raw, form)
    bins = torch.arange(form.bins, device=raw.device).reshape(1, 1, -1, *[1] * (raw.dim() - 3))
    at = index.unsqueeze(2)
    g = torch.where(bins < at, gstart.unsqueeze(2), 0.0) + torch.where(bins == at, gsize.unsqueeze(2), 0.0)
    g = g * (length * (1 - least * form.bins))
    g = shares * (g - (shares * g).sum(2, keepdim=True))
    if form.softclip:
        g = g * _clip_derivative(raw * form.prescale, form.clip / 2)
    return g * form.prescale


def _slopes_gradient(raw, index, g0, g1, form: Form) -> Tensor:
    """From the gradients of the chosen bin's end slopes to those of the raw slopes."""
    count = form.slopes
    first = index - int(form.derivatives == Derivatives.inner)  # raw slope of the bin's first knot
    second = first + 1
    if form.derivatives == Derivatives.periodic:
        second = torch.where(second == count, 0, second)
    places = torch.arange(count, device=raw.device).reshape(1, 1, -1, *[1] * (raw.dim() - 3))
    g = torch.where(places == first.unsqueeze(2), g0.unsqueeze(2), 0.0)
    g = g + torch.where(places == second.unsqueeze(2), g1.unsqueeze(2), 0.0)
    if form.softclip:
        return g * torch.exp(_clip(raw, form.clip)) * _clip_derivative(raw, form.clip)
    return g * torch.sigmoid(raw)
