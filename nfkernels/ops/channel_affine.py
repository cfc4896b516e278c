"""The public channel affine op: a scale and a shift per channel, and an order of the channels, in one pass.

On CPU images and sequences it is one kernel forward and one backward; on tables PyTorch's ``addcmul``; elsewhere its
batch normalization with running statistics 0 and 1, which sums the gradients of scale and shift in one pass too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import channel_affine as reference
from ..reference.affine_coupling import compute_dtype
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _like

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, scale, shift, order):
    return _like(reference.forward(x, scale, shift, order), x)


def _composite_backward(x, dy, scale, order):
    dx, dscale, dshift = reference.backward(x, dy, scale, order)
    return _like(dx, x), dscale, dshift


def _fake_forward(x, scale, shift, order):
    return torch.empty_like(x)


def _fake_backward(x, dy, scale, order):
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


_forward = define(
    "_channel_affine_forward",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? order) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
    cpu_only="PyTorch's batch normalization and a gather",
)
_backward = define(
    "_channel_affine_backward",
    "(Tensor x, Tensor dy, Tensor scale, Tensor? order) -> (Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
    cpu_only="PyTorch's batch normalization and a gather",
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _ChannelAffine(torch.autograd.Function):
    """Saves the input and the scale."""

    @staticmethod
    def forward(ctx: Any, x, scale, shift, order):
        ctx.save_for_backward(x, scale, order)
        ctx.backend = forced_backend()
        return _forward(x, scale, shift, order)

    @staticmethod
    def backward(ctx: Any, dy):
        x, scale, order = ctx.saved_tensors
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            grads = reference.backward(x, dy, scale, order)
        else:
            grads = _backward.on(ctx.backend, x, readable(dy), scale, order)
        return (*(g if n else None for g, n in zip(grads, ctx.needs_input_grad[:3], strict=True)), None)


class _Permute(torch.autograd.Function):
    """A gather whose gradient is a gather, by the inverse order, where index_select's is a scatter."""

    @staticmethod
    def forward(ctx: Any, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, dy):
        order, inverse = ctx.saved_tensors
        return permute_channels(dy, inverse, order), None, None


def permute_channels(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``y[:, i] = x[:, order[i]]``; ``inverse`` is the inverse of ``order``, both int64 ``[C]``."""
    if x.requires_grad and torch.is_grad_enabled() and not under_transform():
        return _Permute.apply(x, order, inverse)
    return x.index_select(1, order)


# --- public ---------------------------------------------------------------------------------------------------------


def channel_affine(
    x: Tensor, scale: Tensor, shift: Tensor, order: Tensor | None = None, inverse_order: Tensor | None = None
) -> Tensor:
    """``y[:, i] = x[:, order[i]] * scale[i] + shift[i]``: an actnorm, and a permutation of the channels before it.

    Args:
        x: ``[B, C, *spatial]``, float32, float64, bfloat16 or float16; contiguous, channels-last or sliced.
        scale, shift: ``[C]``, one per channel of y.
        order: int64 ``[C]``, a permutation of the channels, or None for none.
        inverse_order: the inverse of ``order``, where the caller has it; else it is made where a gradient needs it.

    Returns:
        y, shaped, typed and laid out like x. Its log-determinant, ``P * sum log|scale|`` for P positions, is the
        caller's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.

    Cost: one read of x and one write of y; the backward reads x and dy once and makes all three gradients.
    """
    _check(x, scale, shift, order)
    dtype = compute_dtype(x)
    scale = scale if scale.dtype == dtype else scale.to(dtype)
    shift = shift if shift.dtype == dtype else shift.to(dtype)
    forced = forced_backend()
    if under_transform() or forced == "triton":
        return reference.forward(x, scale, shift, order)
    # Tables and channels-last images have their channels side by side: a row's loop would be a stride's. PyTorch rounds
    # the sums of narrow types, so those come here all the same.
    along = x.dim() > 2 and x.is_contiguous()
    if x.device.type != "cpu" or not (along or x.dtype.itemsize < 4 or forced == "reference"):
        return _composed(x, scale, shift, order, inverse_order)
    x, scale, shift = canonical(x), scale.contiguous(), shift.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or shift.requires_grad):
        return _ChannelAffine.apply(x, scale, shift, order)
    return _forward(x, scale, shift, order)


def _composed(x, scale, shift, order, inverse):
    if order is not None:
        x = permute_channels(x, order, torch.argsort(order) if inverse is None else inverse)
    if x.dim() == 2:
        return torch.addcmul(shift, x, scale)
    kind = x.shape[1], scale.dtype, x.device
    if kind not in _STANDARD:
        with torch.inference_mode(False):  # a later call may save them for a backward
            _STANDARD[kind] = tuple(torch.full(kind[:1], v, dtype=kind[1], device=kind[2]) for v in (0.0, 1.0))
    mean, variance = _STANDARD[kind]
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, 0.0)


_STANDARD: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}


def _check(x: Tensor, scale: Tensor, shift: Tensor, order: Tensor | None) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    channels = x.shape[1]
    for name, t in (("scale", scale), ("shift", shift), ("order", order)):
        if t is None:
            continue
        if t.shape != (channels,):
            raise ValueError(f"{name} must be [{channels}], one entry per channel of x, got shape {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
        if (t.dtype == torch.int64) != (name == "order") or (name != "order" and t.dtype not in _FLOATS):
            raise ValueError(f"{name} must be {'int64' if name == 'order' else 'floating point'}, got {t.dtype}")
