"""The public channel mix op (invertible 1x1 convolution): checks, raw schemas, fake rules, autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import channel_mix as reference
from ..reference.affine_coupling import compute_dtype
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _like

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, weight, bias):
    return _like(reference.forward(x, weight, bias), x)


def _composite_backward(x, weight, dy, inverse, bias, need_dx, need_dweight, need_dbias):
    like, rebuilt = x, x.new_empty(0)
    if inverse is not None:
        x = reference.rebuild(x, inverse, bias)
        rebuilt = _like(x, like)
    dx, dweight, dbias = reference.backward(x, weight, dy)
    empty = weight.new_empty(0)
    return (
        _like(dx, like) if need_dx else x.new_empty(0),
        dweight.to(weight.dtype) if need_dweight else empty,
        dbias.to(weight.dtype) if need_dbias else weight.new_empty(0),
        rebuilt,
    )


def _fake_forward(x, weight, bias):
    return torch.empty_like(x)


def _fake_backward(x, weight, dy, inverse, bias, need_dx, need_dweight, need_dbias):
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape[0] if need_dbias else 0),
        x.new_empty(0) if inverse is None else torch.empty_like(x),
    )


_forward = define(
    "_channel_mix_forward",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_channel_mix_backward",
    "(Tensor x, Tensor weight, Tensor dy, Tensor? inverse, Tensor? bias, bool need_dx, bool need_dweight,"
    " bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# Beyond this many channels the library's blocking over k wins, and partial sums of the weight's gradient grow large.
WIDEST = 256


def _backend(x: Tensor) -> str | None:
    """Who computes. On the CPU row-major data (tables, channels-last) and wide mixes go to the library: one matrix
    product needs no help there, and packing would cost more than it. The rest goes to the dispatcher."""
    forced = forced_backend()
    if forced is None and x.device.type == "cpu" and (reference.row_major(x) or x.shape[1] > WIDEST):
        # Which a user may have allowed to round to bfloat16; a compiled graph cannot ask.
        exact = torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest"
        return "reference" if exact else None
    return forced


def _is_product(x: Tensor) -> bool:
    """Whether PyTorch's own product, its own gradients included, is all there is to do: a table on the CPU. On a small
    one our calls would cost more than the work."""
    return (
        x.dim() == 2
        and x.dtype.itemsize >= 4
        and x.is_contiguous()
        and _backend(x) == "reference"
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


# --- autograd -------------------------------------------------------------------------------------------------------


class _ChannelMix(torch.autograd.Function):
    """Saves the input (the weight's gradient needs it) and the weight."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.backend = _backend(x)
        return _forward.on(ctx.backend, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            grads = reference.backward(x, weight, dy)
            return tuple(g if n else None for g, n in zip(grads, need, strict=True))
        grads = _backward.on(ctx.backend, x, weight, readable(dy), None, None, need[0], need[1], need[2])
        dx, dweight, dbias, _ = grads
        return dx if need[0] else None, dweight if need[1] else None, dbias if need[2] else None


# --- public ---------------------------------------------------------------------------------------------------------


def channel_mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mixes channels at every position: ``y[b, :, p] = weight @ x[b, :, p] + bias`` (an invertible 1x1 convolution).

    Args:
        x: ``[B, C, *spatial]``, float32, float64, bfloat16 or float16; contiguous, channels-last or sliced.
        weight: ``[C, C]``. The product is computed in float32 (float64 for float64 x), autocast or not.
        bias: ``[C]`` or None.

    Returns:
        y, shaped, typed and laid out like x. Its log-determinant, ``P * log|det weight|`` for P positions, is the
        caller's: it follows from the weight alone.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.

    Cost: O(B C^2 P) operations, one read of x and one write of y. The backward reads x and dy once and makes the
    gradients of x, weight and bias in that pass. Reference: Kingma & Dhariwal 2018 (Glow), section 3.2.
    """
    check_mix(x, weight, bias)
    dtype = compute_dtype(x)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    if under_transform():
        return reference.forward(x, weight, bias)
    if _is_product(x):
        return F.linear(x, weight.contiguous(), bias)
    x, weight = canonical(x), weight.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _ChannelMix.apply(x, weight, bias)
    return _forward.on(_backend(x), x, weight, bias)


def channel_mix_from_output(
    y: Tensor, weight: Tensor, inverse_weight: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A mix's input ``inverse_weight (y - bias)`` and gradients from its output, one pass, for training that keeps no
    activations.

    Args:
        y: output of ``channel_mix(x, weight, bias)``; dy: the loss's gradient with respect to it.
        inverse_weight: ``weight``'s inverse, ``[C, C]``.

    Returns:
        ``(x, dx, dweight, dbias)``, like y, y, weight and bias (None without one). x carries y's relative error times
        weight's condition number. No graph is recorded.

    Raises ``ValueError`` as :func:`channel_mix`. Cost: reads y and dy, writes x and dx.
    """
    check_mix(y, weight, bias)
    dtype = compute_dtype(y)
    y = canonical(y)
    weight, inverse = weight.to(dtype).contiguous(), inverse_weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    with torch.no_grad():
        dx, dweight, dbias, x = _backward.on(
            _backend(y), y, weight, readable(dy), inverse, bias, True, True, bias is not None
        )
    return x, dx, dweight, None if bias is None else dbias


def check_mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *spatial], got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if weight.shape != (channels, channels):
        raise ValueError(
            f"weight must be [{channels}, {channels}] for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], got {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
