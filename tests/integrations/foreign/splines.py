"""A rational-quadratic spline with linear tails as plain tensor operations (Durkan et al. 2019, section 3.1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LEAST = 1e-3


def _knots(raw, bound):
    sizes = LEAST + (1 - LEAST * raw.shape[-1]) * F.softmax(raw, -1)
    knots = F.pad(sizes.cumsum(-1), (1, 0)) * 2 * bound - bound
    knots = torch.cat([knots[..., :-1], torch.full_like(knots[..., -1:], bound)], -1)
    return knots, knots.diff(dim=-1)


def rational_quadratic(x, widths, heights, slopes, bound, inverse):
    """``(y, log|dy/dx|)``, elementwise; raw widths and heights ``[..., K]``, slopes ``[..., K - 1]``."""
    inside = (x >= -bound) & (x <= bound)
    v = x.clamp(-bound, bound)
    slopes = LEAST + F.softplus(F.pad(slopes, (1, 1), value=math.log(math.expm1(1 - LEAST))))
    xs, w = _knots(widths, bound)
    ys, h = _knots(heights, bound)
    at = (ys if inverse else xs)[..., 1:-1].contiguous()
    k = torch.searchsorted(at.detach(), v.detach()[..., None].contiguous(), right=True)
    x0, y0, w, h = (t.gather(-1, k)[..., 0] for t in (xs, ys, w, h))
    d0, d1 = slopes.gather(-1, k)[..., 0], slopes.gather(-1, k + 1)[..., 0]
    s = h / w
    curve = d0 + d1 - 2 * s
    if inverse:
        a, b, c = (v - y0) * curve + h * (s - d0), h * d0 - (v - y0) * curve, -s * (v - y0)
        t = 2 * c / (-b - (b * b - 4 * a * c).sqrt())
        out = t * w + x0
    else:
        t = (v - x0) / w
        out = y0 + h * (s * t * t + d0 * t * (1 - t)) / (s + curve * t * (1 - t))
    slope = s * s * (d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2)
    log = slope.log() - 2 * (s + curve * t * (1 - t)).log()
    log = torch.where(inside, -log if inverse else log, 0.0)
    return torch.where(inside, out, x), log
