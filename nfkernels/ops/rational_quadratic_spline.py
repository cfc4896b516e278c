"""The public rational-quadratic spline: checks, raw schemas, fake rules, autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..reference import rational_quadratic_spline as reference
from ..reference.affine_coupling import compute_dtype
from ..reference.rational_quadratic_spline import Form
from ..reference.spline import Spline
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _like

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, params, channel_map, mask, logdet, *form):
    y, total = reference.forward(x, params, mask, channel_map, logdet, Form(*form))
    return _like(y, x), _like(total, x.to(total.dtype)) if total.dim() == x.dim() else total


def _composite_backward(saved, params, dy, dlogdet, channel_map, mask, *rest):
    *form, need_dx, need_dparams = rest
    dx, dparams = reference.backward(saved, params, dy, dlogdet, mask, channel_map, Form(*form))
    return (
        _like(dx, saved) if need_dx else saved.new_empty(0),
        _like(dparams, params) if need_dparams else params.new_empty(0),
    )


def _fake_forward(x, params, channel_map, mask, logdet, *form):
    dtype = compute_dtype(x)
    total = torch.empty_like(x, dtype=dtype) if Form(*form).elementwise else x.new_empty(x.shape[0], dtype=dtype)
    return torch.empty_like(x), total


def _fake_backward(saved, params, dy, dlogdet, channel_map, mask, *rest):
    need_dx, need_dparams = rest[-2:]
    return (
        torch.empty_like(saved) if need_dx else saved.new_empty(0),
        torch.empty_like(params) if need_dparams else params.new_empty(0),
    )


_OPTIONS = "Tensor? channel_map, Tensor? mask"
_FORM = (
    "int bins, int form, float low, float high, float bottom, float top, float min_width, float min_height,"
    " float min_derivative, float clip, float prescale"
)
_forward = define(
    "_rational_quadratic_spline_forward",
    f"(Tensor x, Tensor params, {_OPTIONS}, Tensor? logdet, {_FORM}) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)
# `saved` is the spline's x: the input, or of an inverse the output.
_backward = define(
    "_rational_quadratic_spline_backward",
    f"(Tensor saved, Tensor params, Tensor? dy, Tensor? dlogdet, {_OPTIONS}, {_FORM}, bool need_dx, bool need_dparams)"
    " -> (Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _RationalQuadraticSpline(torch.autograd.Function):
    """Saves the spline's x (its input, or inverted its output) and params; the bins are made again."""

    @staticmethod
    def forward(ctx: Any, x, params, channel_map, mask, logdet, form):
        y, total = _forward(x, params, channel_map, mask, logdet, *form)
        ctx.save_for_backward(y if form.inverse else x, params, channel_map, mask)
        ctx.set_materialize_grads(False)
        ctx.form = form
        ctx.backend = forced_backend()
        return y, total

    @staticmethod
    def backward(ctx: Any, dy, dlogdet):
        saved, params, channel_map, mask = ctx.saved_tensors
        need_dx, need_dparams, _, _, need_dlogdet, _ = ctx.needs_input_grad
        dx = dparams = None
        if (need_dx or need_dparams) and not (dy is None and dlogdet is None):
            # Second derivatives and tangents need the closed form in differentiable operations.
            if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
                dx, dparams = reference.backward(saved, params, dy, dlogdet, mask, channel_map, ctx.form)
            else:
                dy = None if dy is None else readable(dy)
                dl = readable(dlogdet) if dlogdet is not None and ctx.form.elementwise else dlogdet
                needs = need_dx, need_dparams
                dx, dparams = _backward.on(
                    ctx.backend, saved, params, dy, dl, channel_map, mask, *ctx.form, *needs
                )  # fmt: skip
        return (
            dx if need_dx else None, dparams if need_dparams else None, None, None,
            dlogdet if need_dlogdet else None, None,
        )  # fmt: skip


# --- public ---------------------------------------------------------------------------------------------------------


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    spline: Spline | str = "linear",
    inverse: bool = False,
    mask: Tensor | None = None,
    channel_map: Tensor | None = None,
    logdet: Tensor | None = None,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """A monotonic rational-quadratic spline of every element, with its log-derivative, in one fused pass.

    Args:
        x: data, ``[B, C, *spatial]``, contiguous, channels-last or sliced; float32, float64, bfloat16 or float16.
        params: the conditioner's raw output, ``[B, Ct * P, *spatial]`` for Ct transformed channels, in x's dtype or a
            narrower one, in any layout. Channel by channel P = ``spline.params_per_element`` values: K raw widths, K
            raw heights, then the raw slopes (as nflows, normflows and zuko order them).
        spline: a :class:`~nfkernels.Spline` or a preset's name: bins, interval, tails, and how raw values are read.
        inverse: undo the spline; the log-derivative is then that of the inverse.
        mask: bool, same rank as x and broadcastable to it; True where an element is transformed. The others pass
            through, add nothing to the log-determinant and give their params no gradient.
        channel_map: int64 ``[C]`` for any index set: entry c is the place among params' channels of data channel c, or
            -1 (or anything outside ``0..Ct-1``) where c passes through. Each of ``0..Ct-1`` must occur once.
        logdet: running log-determinant ``[B]`` that this one is added to.
        elementwise: give the log-derivative of every element rather than its sum over each sample.

    Returns:
        ``(y, logdet)``: y shaped, typed and laid out like x; logdet ``[B]``, or like x if elementwise, in float32
        (float64 for float64 x).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Values outside of the interval are no error: the tails say what becomes of them. A NaN stays one. No discriminant is
    ever negative and nothing is ever 0 / 0: gradients are finite wherever slopes and results are far from overflow.

    Cost: O(B C P K), one read of x and params and one write of y, in either direction; the backward reads them again
    and writes their gradients. Keeps params and the spline's x (of an inverse: its output).
    Reference: Durkan et al. 2019 (Neural Spline Flows), section 3.1, equations 4 to 8.
    """
    form = form_of(spline, inverse, elementwise)
    check_spline(x, params, form, mask, channel_map, logdet)
    if mask is not None:
        mask = readable(mask.expand(-1, -1, *x.shape[2:]))
    if under_transform():
        return reference.forward(x, params, mask, channel_map, logdet, form)
    x, params = canonical(x), canonical(params)
    channel_map = None if channel_map is None else channel_map.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or params.requires_grad or (logdet is not None and logdet.requires_grad)
    ):
        return _RationalQuadraticSpline.apply(x, params, channel_map, mask, logdet, form)
    return _forward(x, params, channel_map, mask, logdet, *form)


def form_of(spline: Spline | str, inverse: bool, elementwise: bool) -> Form:
    """A spline's options, validated, and packed for the raw ops."""
    make = _make_form if torch.compiler.is_compiling() else _cached_form
    return make(spline, bool(inverse), bool(elementwise))


def _make_form(spline: Spline | str, inverse: bool, elementwise: bool) -> Form:
    return Form.pack(Spline.parse(spline), inverse, elementwise)


# Packing costs more than a small spline does; a model has a handful of forms.
_cached_form = functools.lru_cache(maxsize=1024)(_make_form)


def check_spline(x, params, form: Form, mask, channel_map, logdet) -> None:
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
    if given % form.count or (channel_map is None and given != channels * form.count):
        among = "a multiple of " if channel_map is not None else f"{channels} times "
        raise ValueError(
            f"params have {given} channels, expected {among}{form.count}: {form.bins} widths, {form.bins} heights and "
            f"{form.slopes} slopes for every transformed channel"
        )
    if channel_map is not None and (channel_map.dtype != torch.int64 or channel_map.shape != (channels,)):
        raise ValueError(
            f"channel_map must be int64 [{channels}], one entry per channel of x, "
            f"got {channel_map.dtype} {tuple(channel_map.shape)}"
        )
    if channel_map is not None and given == 0:
        raise ValueError("params have no channels: a channel_map needs at least one transformed channel")
    if mask is not None:
        fits = mask.dim() == x.dim() and all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be bool and broadcastable to x {tuple(x.shape)} at equal rank, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    if logdet is not None:
        if form.elementwise:
            raise ValueError("logdet [B] is a running sum over samples: it does not go with elementwise=True")
        dtype = compute_dtype(x)
        if logdet.shape != (x.shape[0],) or logdet.dtype != dtype:
            raise ValueError(f"logdet must be {dtype} [{x.shape[0]}], got {logdet.dtype} {tuple(logdet.shape)}")
    for name, other in (("params", params), ("mask", mask), ("channel_map", channel_map), ("logdet", logdet)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
