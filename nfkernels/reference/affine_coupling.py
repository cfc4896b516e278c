"""Affine coupling in plain PyTorch: the specification of the kernels, their fallback, and their double backward.

``y = x * s + t`` or ``y = (x + t) * s`` on the transformed channels, with ``s`` from a scale map, and
``logdet[b] = sum log s``. NICE (Dinh et al. 2014), RealNVP (Dinh et al. 2017, eq. 7-8), Glow (Kingma & Dhariwal 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from .scale_map import KINDS, ScaleMap, log_scale, log_scale_derivatives, scale


class Layout(IntEnum):
    """Where shift and raw scale lie among the channels of ``params``."""

    shift_scale = 0
    scale_shift = 1
    shift_scale_interleaved = 2
    scale_shift_interleaved = 3


class Order(IntEnum):
    """``scale_first``: ``x * s + t``. ``shift_first``: ``(x + t) * s``."""

    scale_first = 0
    shift_first = 1


class Identity(IntEnum):
    """Which channels of ``x`` pass through: none of them, the leading ones or the trailing ones."""

    none = 0
    first = 1
    second = 2


@dataclass(frozen=True)
class Form:
    """All discrete options of one coupling; ``pack`` makes the single int that travels to the kernels.

    Bits: 0-3 scale map kind, 4-5 layout, 6 order, 7-8 identity, 9 inverse, 10 reciprocal, 11 scaled
    shift (mirrored in ``csrc/include/affine_coupling.h``).
    """

    map: ScaleMap
    layout: Layout = Layout.shift_scale
    order: Order = Order.scale_first
    identity: Identity = Identity.none
    inverse: bool = False

    def pack(self) -> tuple[int, float, float, float, float, float]:
        m = self.map
        bits = KINDS.index(m.kind) | self.layout << 4 | self.order << 6 | self.identity << 7
        bits |= int(self.inverse) << 9 | int(m.reciprocal) << 10 | int(m.scaled_shift) << 11
        return bits, m.prescale, m.offset, m.gain, m.clamp, m.eps

    @staticmethod
    def unpack(bits: int, prescale: float, offset: float, gain: float, clamp: float, eps: float) -> Form:
        m = ScaleMap(KINDS[bits & 15], prescale, offset, gain, clamp, eps, bool(bits >> 10 & 1), bool(bits >> 11 & 1))
        return Form(m, Layout(bits >> 4 & 3), Order(bits >> 6 & 1), Identity(bits >> 7 & 3), bool(bits >> 9 & 1))

    @property
    def shift_factor(self) -> float:
        """What the raw shift is multiplied by before it is added."""
        factor = self.map.prescale if self.map.scaled_shift else 1.0
        return -factor if self.inverse else factor

    def transformed_channels(self, params_channels: int) -> int:
        return params_channels // 2 if self.map.has_scale else params_channels


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 data, else float32: the type of the arithmetic and of every log-determinant."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(x, params, channel_map, mask, gain, logdet, form: Form) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``: see :func:`nfkernels.ops.affine_coupling`; every argument already checked."""
    dtype = compute_dtype(x)
    xt, where = _select(x, params, channel_map, mask, form)
    t, r, g = _params(params, channel_map, gain, where, x, form)
    xt = xt.to(dtype)
    log_s, s = _scale(form, r, g, t)
    shift_first = (form.order == Order.shift_first) != form.inverse
    t = t * form.shift_factor if form.shift_factor != 1 else t
    yt = (xt + t) * s if shift_first else xt * s + t
    if where is not None:
        yt = torch.where(where, yt, xt)
        log_s = torch.where(where, log_s, 0.0)
    y = _merge(x, yt.to(x.dtype), form, channel_map)
    total = log_s.flatten(1).sum(1)
    return y, total if logdet is None else logdet + total


def backward(y, params, dy, dlogdet, channel_map, mask, gain, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dparams, dgain)`` from the output alone, without a division by the scale; differentiable itself."""
    dtype = compute_dtype(y)
    dy = torch.zeros_like(y) if dy is None else dy
    yt, where = _select(y, params, channel_map, mask, form)
    dyt, _ = _select(dy, params, channel_map, mask, form)
    t, r, g = _params(params, channel_map, gain, where, y, form)
    yt, dyt = yt.to(dtype), dyt.to(dtype)
    _, s = _scale(form, r, g, t)
    shift_first = (form.order == Order.shift_first) != form.inverse
    sign, factor = -1.0 if form.inverse else 1.0, form.shift_factor
    dxt = dyt * s
    dt = factor * (dxt if shift_first else dyt)
    dlog_s = dyt * (yt if shift_first else yt - factor * t)
    if dlogdet is not None:
        dlog_s = dlog_s + dlogdet.to(dtype).reshape(-1, *[1] * (y.dim() - 1))
    if form.map.has_scale:
        d, dg = log_scale_derivatives(form.map, r, g)
        dr, dg = sign * dlog_s * d, sign * dlog_s * dg
    else:
        dr = dg = torch.zeros_like(dt)
    if where is not None:
        dxt = torch.where(where, dxt, dyt)
        dt, dr, dg = (torch.where(where, v, 0.0) for v in (dt, dr, dg))
    dx = _merge(dy, dxt.to(y.dtype), form, channel_map)
    if channel_map is not None:
        dt, dr, dg = (_to_params(v, params, channel_map, form) for v in (dt, dr, dg))
    dparams = _join(dt, dr, form).to(params.dtype)
    if gain is None:
        return dx, dparams, dy.new_empty(0, dtype=dtype)
    return dx, dparams, dg.transpose(0, 1).flatten(1).sum(1)


def rebuild(y, params, channel_map, mask, gain, form: Form) -> Tensor:
    """The coupling's input from its output, as a reversible backward needs it: the only place that divides."""
    return forward(y, params, channel_map, mask, gain, None, replace(form, inverse=not form.inverse))[0]


def _scale(form: Form, r: Tensor | None, g: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if r is None:
        return torch.zeros_like(like), torch.ones_like(like)
    log_s, s = log_scale(form.map, r, g), scale(form.map, r, g)
    return (-log_s, 1 / s) if form.inverse else (log_s, s)


def _select(x, params, channel_map, mask, form: Form) -> tuple[Tensor, Tensor | None]:
    """The channels that may be transformed, and where among them they are (None: everywhere)."""
    if channel_map is not None:
        count = form.transformed_channels(params.shape[1])
        where = ((channel_map >= 0) & (channel_map < count)).reshape(1, -1, *[1] * (x.dim() - 2))
        return x, where if mask is None else where & mask
    count = form.transformed_channels(params.shape[1])
    start = x.shape[1] - count if form.identity == Identity.first else 0
    if mask is not None and mask.shape[1] != 1:
        mask = mask.narrow(1, start, count)
    return x.narrow(1, start, count), mask


def _params(params, channel_map, gain, where, x, form: Form) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Shift, raw scale and gain in the arithmetic's type, one per selected channel, quiet where nothing transforms."""
    dtype = compute_dtype(x)
    parts: list[Tensor | None]
    if not form.map.has_scale:
        parts = [params, None]
    elif form.layout in (Layout.shift_scale, Layout.scale_shift):
        half = params.shape[1] // 2
        parts = [params.narrow(1, 0, half), params.narrow(1, half, half)]
    else:
        parts = [params[:, 0::2], params[:, 1::2]]
    if form.layout in (Layout.scale_shift, Layout.scale_shift_interleaved) and form.map.has_scale:
        parts.reverse()
    if gain is not None:
        gain = gain.reshape(1, -1, *[1] * (x.dim() - 2))
    parts.append(gain)
    if channel_map is not None:
        count = form.transformed_channels(params.shape[1])
        rows = channel_map.clamp(0, max(count - 1, 0))
        if count == 0:  # nothing to select from; a row of zeros that no channel uses
            parts = [None if v is None else v.new_zeros(v.shape[0], 1, *v.shape[2:]) for v in parts]
        parts = [None if v is None else v.index_select(1, rows) for v in parts]
    t, r, g = (None if v is None else v.to(dtype) for v in parts)
    if where is not None:
        # A raw value that is not used must not reach exp: inf * 0 would poison the gradient.
        t = torch.where(where, t, 0.0)
        r = None if r is None else torch.where(where, r, 0.0)
    return t, r, g


def _merge(x: Tensor, yt: Tensor, form: Form, channel_map: Tensor | None) -> Tensor:
    """Puts the transformed channels back beside those that pass through."""
    rest = x.shape[1] - yt.shape[1]
    if channel_map is not None or rest == 0:
        return yt
    if form.identity == Identity.first:
        return torch.cat([x.narrow(1, 0, rest), yt], 1)
    return torch.cat([yt, x.narrow(1, yt.shape[1], rest)], 1)


def _to_params(v: Tensor, params: Tensor, channel_map: Tensor, form: Form) -> Tensor:
    """Gradients per data channel, moved to the params channel each came from."""
    count = form.transformed_channels(params.shape[1])
    rows = torch.where((channel_map >= 0) & (channel_map < count), channel_map, count)
    out = v.new_zeros(v.shape[0], count + 1, *v.shape[2:])
    return out.index_add(1, rows, v).narrow(1, 0, count)


def _join(dt: Tensor, dr: Tensor, form: Form) -> Tensor:
    if not form.map.has_scale:
        return dt
    pair = [dt, dr]
    if form.layout in (Layout.scale_shift, Layout.scale_shift_interleaved):
        pair.reverse()
    if form.layout in (Layout.shift_scale, Layout.scale_shift):
        return torch.cat(pair, 1)
    return torch.stack(pair, 2).flatten(1, 2)
