"""The public affine coupling op: checks, raw schemas, fake rules, autograd. Start reading here."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import affine_coupling as reference
from ..reference.affine_coupling import Form, Identity, Layout, Order, compute_dtype
from ..reference.scale_map import PRESET_TEXT, ScaleMap
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform

LayoutName = Literal["shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved"]
OrderName = Literal["scale_first", "shift_first"]
IdentityName = Literal["none", "first", "second"]

_OPTIONS = "Tensor? channel_map, Tensor? mask, Tensor? gain"
_FORM = "int form, float prescale, float offset, float gain_factor, float clamp, float eps"


# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _reference_forward(x, params, channel_map, mask, gain, logdet, *form):
    return reference.forward(x, params, channel_map, mask, gain, logdet, Form.unpack(*form))


def _reference_backward(y, params, dy, dlogdet, channel_map, mask, gain, *rest):
    *form, rebuild = rest
    form = Form.unpack(*form)
    grads = reference.backward(y, params, dy, dlogdet, channel_map, mask, gain, form)
    return *grads, reference.rebuild(y, params, channel_map, mask, gain, form) if rebuild else y.new_empty(0)


def _like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the strides that ``empty_like(like)`` gives: the output rule that every backend keeps."""
    out = torch.empty_like(like)
    return x if x.stride() == out.stride() else out.copy_(x)


def _composite_forward(*args):
    y, logdet = _reference_forward(*args)
    return _like(y, args[0]), logdet


def _composite_backward(*args):
    dx, dparams, dgain, x = _reference_backward(*args)
    return _like(dx, args[0]), _like(dparams, args[1]), dgain, _like(x, args[0]) if args[-1] else x


def _fake_forward(x, params, channel_map, mask, gain, logdet, *form):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x))


def _fake_backward(y, params, dy, dlogdet, channel_map, mask, gain, *rest):
    dgain = y.new_empty(0 if gain is None else gain.shape[0], dtype=compute_dtype(y))
    x = torch.empty_like(y) if rest[-1] else y.new_empty(0)
    return torch.empty_like(y), torch.empty_like(params), dgain, x


_forward = define(
    "_affine_coupling_forward",
    f"(Tensor x, Tensor params, {_OPTIONS}, Tensor? logdet, {_FORM}) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_affine_coupling_backward",
    f"(Tensor y, Tensor params, Tensor? dy, Tensor? dlogdet, {_OPTIONS}, {_FORM}, bool rebuild)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _AffineCoupling(torch.autograd.Function):
    """Saves output and params, never the input: the gradient needs no division."""

    @staticmethod
    def forward(ctx: Any, x, params, channel_map, mask, gain, logdet, form):
        y, total = _forward(x, params, channel_map, mask, gain, logdet, *form)
        ctx.save_for_backward(y, params, channel_map, mask, gain)
        ctx.set_materialize_grads(False)
        ctx.form = form
        ctx.backend = forced_backend()
        ctx.running = logdet is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, dy, dlogdet):
        y, params, channel_map, mask, gain = ctx.saved_tensors
        if dy is None and dlogdet is None:
            return (None,) * 7
        # Second derivatives and tangents need the closed form in differentiable operations.
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            grads = reference.backward(y, params, dy, dlogdet, channel_map, mask, gain, Form.unpack(*ctx.form))
        else:
            dy = None if dy is None else readable(dy)
            grads = _backward.on(ctx.backend, y, params, dy, dlogdet, channel_map, mask, gain, *ctx.form, False)[:3]
        dx, dparams, dgain = grads
        return dx, dparams, None, None, dgain if gain is not None else None, dlogdet if ctx.running else None, None


# --- public ---------------------------------------------------------------------------------------------------------


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale_map: ScaleMap | str = "glow",
    layout: LayoutName = "shift_scale",
    order: OrderName = "scale_first",
    identity: IdentityName = "none",
    inverse: bool = False,
    mask: Tensor | None = None,
    channel_map: Tensor | None = None,
    gain: Tensor | None = None,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Affine coupling with its log-determinant, one fused pass: ``y = x * s + t`` or ``(x + t) * s``.

    Args:
        x: data, ``[B, C, *spatial]`` (``[B, D]``, ``[B, C, T]``, ``[B, C, H, W]``), contiguous, channels-last or
            sliced; float32, float64, bfloat16 or float16.
        params: the conditioner's raw output, ``[B, 2 * Ct, *spatial]`` for ``Ct`` transformed channels
            (``[B, Ct, ...]`` for the additive map), in x's dtype or a narrower one, in any layout.
        scale_map: a :class:`~nfkernels.ScaleMap` or a preset's name: how a raw value becomes a scale.
        layout: where shift and raw scale lie among params' channels: two halves, or interleaved.
        order: ``"scale_first"``: ``x * s + t``; ``"shift_first"``: ``(x + t) * s``.
        identity: which channels of x pass through: ``"none"`` (x is the transformed half alone, ``Ct = C``),
            ``"first"`` (the last Ct are transformed) or ``"second"`` (the first Ct are).
        inverse: undo the coupling; the log-determinant is then that of the inverse.
        mask: bool, same rank as x and broadcastable to it; True where an element is transformed (checkerboards,
            sequence lengths). The others pass through, add nothing to the log-determinant and get no gradient.
        channel_map: int64 ``[C]`` for any index set: entry c is the params channel of data channel c, or -1 (or
            anything outside ``0..Ct-1``) where c passes through. Each of ``0..Ct-1`` must occur once. Not with
            ``identity``.
        gain: ``[Ct]`` learned factor per transformed channel, in the log-determinant's dtype (see ScaleMap).
        logdet: running log-determinant ``[B]`` that this one is added to.

    Returns:
        ``(y, logdet)``: y shaped, typed and laid out like x; logdet ``[B]``, float32 (float64 for float64 x).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B C P), one read of x and params and one write of y. Keeps y and params for the backward, not x.
    Reference: Dinh et al. 2017 (RealNVP), eq. 7-8; Kingma & Dhariwal 2018 (Glow), table 1.
    """
    form, packed = form_of(scale_map, layout, order, identity, inverse)
    check_coupling(x, params, form, mask, channel_map, gain, logdet)
    if mask is not None:
        mask = readable(mask.expand(-1, -1, *x.shape[2:]))
    if under_transform():
        return reference.forward(x, params, channel_map, mask, gain, logdet, form)
    x, params = canonical(x), canonical(params)
    gain = None if gain is None else gain.contiguous()
    channel_map = None if channel_map is None else channel_map.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad
        or params.requires_grad
        or (gain is not None and gain.requires_grad)
        or (logdet is not None and logdet.requires_grad)
    ):
        return _AffineCoupling.apply(x, params, channel_map, mask, gain, logdet, packed)
    return _forward(x, params, channel_map, mask, gain, logdet, *packed)


def affine_coupling_from_output(
    y: Tensor,
    params: Tensor,
    dy: Tensor | None,
    dlogdet: Tensor | None,
    *,
    scale_map: ScaleMap | str = "glow",
    layout: LayoutName = "shift_scale",
    order: OrderName = "scale_first",
    identity: IdentityName = "none",
    mask: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A coupling's input and gradients from its output, one pass: what training that keeps no activations needs.

    Args:
        y, params: output of ``affine_coupling(x, params, ...)`` and what it was given; the options likewise.
        dy: the loss's gradient with respect to y, or None for zero; dlogdet: to the log-determinant ``[B]``, or None.

    Returns:
        ``(x, dx, dparams, dgain)``, like y, y, params and gain (None without one). x divides by the scale: a relative
        error of y grows by ``1 / s``. No graph is recorded.

    Raises ``ValueError`` as :func:`affine_coupling`. Cost: reads y, params and dy, writes x, dx and dparams.
    """
    form, packed = form_of(scale_map, layout, order, identity, False)
    check_coupling(y, params, form, mask, None, gain, None)
    if mask is not None:
        mask = readable(mask.expand(-1, -1, *y.shape[2:]))
    gain = None if gain is None else gain.contiguous()
    with torch.no_grad():
        dx, dparams, dgain, x = _backward(
            canonical(y), canonical(params), None if dy is None else readable(dy), dlogdet, None, mask, gain, *packed,
            True,
        )  # fmt: skip
    return x, dx, dparams, None if gain is None else dgain


def form_of(scale_map, layout, order, identity, inverse) -> tuple[Form, tuple]:
    """A coupling's options, validated, and packed for the raw ops."""
    if torch.compiler.is_compiling():
        text = PRESET_TEXT.get(scale_map, scale_map) if isinstance(scale_map, str) else scale_map.text
        return _make_form(ScaleMap.from_text(text), layout, order, identity, inverse)
    return _cached_form(scale_map, layout, order, identity, inverse)


def _make_form(scale_map, layout, order, identity, inverse) -> tuple[Form, tuple]:
    form = Form(
        ScaleMap.parse(scale_map),
        _choice(Layout, layout, "layout"),
        _choice(Order, order, "order"),
        _choice(Identity, identity, "identity"),
        bool(inverse),
    )
    return form, form.pack()


# Validating options costs more than a small coupling does; a model has a handful of combinations.
_cached_form = functools.lru_cache(maxsize=1024)(_make_form)


def _choice(enum, value: str, name: str):
    try:
        return enum[value]
    except KeyError:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(e.name for e in enum)}") from None


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_coupling(x, params, form: Form, mask, channel_map, gain, logdet) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS or params.dtype not in _FLOATS:
        raise ValueError(f"x and params must be floating point, got {x.dtype} and {params.dtype}")
    if params.dtype == torch.float64 and x.dtype != torch.float64:
        raise ValueError(f"params are float64 but x is {x.dtype}: params may be narrower than the data, not wider")
    if params.dim() != x.dim() or params.shape[0] != x.shape[0] or params.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"params of shape {tuple(params.shape)} do not fit x of shape {tuple(x.shape)}: all but axis 1 must agree"
        )
    channels, given = x.shape[1], params.shape[1]
    if form.map.has_scale and given % 2:
        raise ValueError(f"params have {given} channels: a {form.map.kind} coupling needs a shift and a scale each")
    count = form.transformed_channels(given)
    if channel_map is not None:
        if form.identity != Identity.none:
            raise ValueError('give either channel_map or identity, not both: channel_map goes with identity="none"')
        if channel_map.dtype != torch.int64 or channel_map.shape != (channels,):
            raise ValueError(
                f"channel_map must be int64 [{channels}], one entry per channel of x, "
                f"got {channel_map.dtype} {tuple(channel_map.shape)}"
            )
    elif count > channels or (form.identity == Identity.none and count != channels):
        wanted = f"{channels}" if form.identity == Identity.none else f"at most {channels}"
        raise ValueError(
            f"params of {given} channels transform {count} channels, but x has {channels} and identity="
            f"{form.identity.name!r}: expected {wanted}"
        )
    if mask is not None:
        fits = mask.dim() == x.dim() and all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be bool and broadcastable to x {tuple(x.shape)} at equal rank, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    dtype = compute_dtype(x)
    if gain is not None and (gain.shape != (count,) or gain.dtype != dtype):
        raise ValueError(f"gain must be {dtype} [{count}], got {gain.dtype} {tuple(gain.shape)}")
    if gain is not None and not form.map.has_scale:
        raise ValueError("an additive coupling has no scale for a gain to act on")
    if logdet is not None and (logdet.shape != (x.shape[0],) or logdet.dtype != dtype):
        raise ValueError(f"logdet must be {dtype} [{x.shape[0]}], got {logdet.dtype} {tuple(logdet.shape)}")
    for name, other in (("params", params), ("mask", mask), ("channel_map", channel_map), ("gain", gain)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
    if logdet is not None and logdet.device != x.device:
        raise ValueError(f"logdet is on {logdet.device} but x is on {x.device}")
