"""The public Gaussian log-density op: checks, raw schemas, fake rules, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import gaussian_log_density as reference
from ..reference.affine_coupling import Layout, compute_dtype
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, LayoutName, _choice, _like

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, params, logdet, layout):
    return reference.forward(x, params, logdet, Layout(layout))


def _composite_backward(x, params, dout, layout, need_dx, need_dparams):
    dx, dparams = reference.backward(x, params, dout, Layout(layout))
    return (
        _like(dx, x) if need_dx else x.new_empty(0),
        _like(dparams, params) if need_dparams else x.new_empty(0),
    )


def _fake_forward(x, params, logdet, layout):
    return x.new_empty(x.shape[0], dtype=compute_dtype(x))


def _fake_backward(x, params, dout, layout, need_dx, need_dparams):
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(params) if need_dparams else x.new_empty(0),
    )


_forward = define(
    "_gaussian_log_density_forward",
    "(Tensor x, Tensor? params, Tensor? logdet, int layout) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_gaussian_log_density_backward",
    "(Tensor x, Tensor? params, Tensor dout, int layout, bool need_dx, bool need_dparams) -> (Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _GaussianLogDensity(torch.autograd.Function):
    """Saves the input and params; the standardised values are made again, which costs no pass."""

    @staticmethod
    def forward(ctx: Any, x, params, logdet, layout):
        ctx.save_for_backward(x, params)
        ctx.layout = layout
        ctx.backend = forced_backend()
        return _forward(x, params, logdet, layout)

    @staticmethod
    def backward(ctx: Any, dout):
        x, params = ctx.saved_tensors
        need_dx, need_dparams, need_dlogdet, _ = ctx.needs_input_grad
        dx = dparams = None
        if need_dx or need_dparams:
            # Second derivatives and tangents need the closed form in differentiable operations.
            if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
                dx, dparams = reference.backward(x, params, dout, Layout(ctx.layout))
            else:
                dx, dparams = _backward.on(ctx.backend, x, params, dout, ctx.layout, need_dx, need_dparams)
        return dx if need_dx else None, dparams if need_dparams else None, dout if need_dlogdet else None, None


# --- public ---------------------------------------------------------------------------------------------------------


def gaussian_log_density(
    x: Tensor,
    params: Tensor | None = None,
    *,
    layout: LayoutName = "shift_scale",
    logdet: Tensor | None = None,
) -> Tensor:
    """Log-density of each sample under a diagonal Gaussian, in one pass: ``sum log N(x; mean, exp(log_scale)^2)``.

    Args:
        x: data, ``[B, C, *spatial]`` (``[B, D]``, ``[B, C, T]``, ``[B, C, H, W]``), contiguous, channels-last or
            sliced; float32, float64, bfloat16 or float16.
        params: mean and log standard deviation of every element, ``[B, 2 * C, *spatial]``, in x's dtype or a narrower
            one, in any layout; None for the standard normal.
        layout: where means and log standard deviations lie among params' channels, named as for
            :func:`affine_coupling` with the mean as shift and the log standard deviation as scale.
        logdet: running total ``[B]``, in the result's dtype, that this one is added to (a flow's log-determinant).

    Returns:
        ``[B]`` in nats (divide by ``-D ln 2`` for bits per dimension), float32 (float64 for float64 x).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B C P). For N elements of s bytes the forward reads Ns (3Ns with params of x's dtype), the backward moves
    2Ns (6Ns). Keeps x and params for the backward and nothing else: Ns bytes (3Ns), most often another layer's already.
    """
    form = int(_choice(Layout, layout, "layout"))
    _check(x, params, logdet)
    if under_transform():
        return reference.forward(x, params, logdet, Layout(form))
    grad = torch.is_grad_enabled()
    # Only what gets a gradient has an output laid out like it.
    x = canonical(x) if grad and x.requires_grad else readable(x)
    if params is not None:
        params = canonical(params) if grad and params.requires_grad else readable(params)
    if grad and (
        x.requires_grad
        or (params is not None and params.requires_grad)
        or (logdet is not None and logdet.requires_grad)
    ):
        return _GaussianLogDensity.apply(x, params, logdet, form)
    return _forward(x, params, logdet, form)


def _check(x, params, logdet) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if params is not None:
        if params.dtype not in _FLOATS:
            raise ValueError(f"params must be floating point, got {params.dtype}")
        if params.dtype == torch.float64 and x.dtype != torch.float64:
            raise ValueError(f"params are float64 but x is {x.dtype}: params may be narrower than the data, not wider")
        wanted = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if params.shape != wanted:
            raise ValueError(
                f"params must be {list(wanted)}, a mean and a log standard deviation for each element of x, "
                f"got {list(params.shape)}"
            )
    dtype = compute_dtype(x)
    if logdet is not None and (logdet.shape != (x.shape[0],) or logdet.dtype != dtype):
        raise ValueError(f"logdet must be {dtype} [{x.shape[0]}], got {logdet.dtype} {tuple(logdet.shape)}")
    for name, other in (("params", params), ("logdet", logdet)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
