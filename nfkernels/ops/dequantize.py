"""The public dequantisation op: checks, raw schemas, fake rules, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import dequantize as reference
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _like
from .philox_uniform import check_key

MOST_LEVELS = 65536  # float32 has to hold a level and some noise

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, key, logdet, levels, alpha, dtype):
    y, total = reference.forward(x, key, logdet, levels, alpha, _FLOATS[dtype])
    out = torch.empty_like(x, dtype=y.dtype)
    return y if y.stride() == out.stride() else out.copy_(y), total


def _composite_backward(y, dy, dlogdet, levels, alpha):
    return _like(reference.backward(y, dy, dlogdet, levels, alpha), y)


def _fake_forward(x, key, logdet, levels, alpha, dtype):
    y = torch.empty_like(x, dtype=_FLOATS[dtype])
    return y, x.new_empty(x.shape[0], dtype=reference.arithmetic(y.dtype))


def _fake_backward(y, dy, dlogdet, levels, alpha):
    return torch.empty_like(y)


_forward = define(
    "_dequantize_forward",
    "(Tensor x, Tensor key, Tensor? logdet, float levels, float alpha, int dtype) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_dequantize_backward",
    "(Tensor y, Tensor? dy, Tensor? dlogdet, float levels, float alpha) -> Tensor",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _Dequantize(torch.autograd.Function):
    """Saves the output: the gradient needs neither the images nor the noise."""

    @staticmethod
    def forward(ctx: Any, x, key, logdet, levels, alpha, dtype):
        y, total = _forward(x, key, logdet, levels, alpha, dtype)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        ctx.levels, ctx.alpha = levels, alpha
        ctx.backend = forced_backend()
        ctx.running = logdet is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, dy, dlogdet):
        (y,) = ctx.saved_tensors
        running = dlogdet if ctx.running else None
        if not ctx.needs_input_grad[0] or (dy is None and dlogdet is None):
            return None, None, running, None, None, None
        # Second derivatives and tangents need the closed form in differentiable operations.
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            dx = reference.backward(y, dy, dlogdet, ctx.levels, ctx.alpha)
        else:
            dy = None if dy is None else readable(dy)
            dx = _backward.on(ctx.backend, y, dy, dlogdet, ctx.levels, ctx.alpha)
        return dx, None, running, None, None, None


# --- public ---------------------------------------------------------------------------------------------------------


def dequantize(
    images: Tensor,
    key: Tensor,
    *,
    levels: int = 256,
    alpha: float | None = None,
    logdet: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Uniform dequantisation, and the logit that opens ``[0, 1)`` to the whole line, in one fused pass.

    ``v = (images + u) / levels`` with u uniform in ``[0, 1)``; with an ``alpha``, ``w = alpha + (1 - 2 alpha) v`` and
    the output is ``log w - log(1 - w)``.

    Args:
        images: ``[B, C, *spatial]``, whole grey levels ``0 .. levels - 1``, uint8 or floating point (which passes
            gradients), in any layout. Values are not checked.
        key: int64 ``[seed, offset]`` on the images' device: see :func:`~nfkernels.ops.random_key`. The same key gives
            the same noise, on every device; :func:`~nfkernels.ops.advance_` makes the next.
        levels: how many grey levels there are, 2 to 65536.
        alpha: between 0 and 1/2 (exclusive), how far the logit stays from its poles; None for no logit.
        logdet: running log-determinant ``[B]`` that this one is added to, float32 (float64 for float64 output).
        dtype: of the output; by default float32 for uint8 images, else theirs.

    Returns:
        ``(y, logdet)``: y shaped and laid out like the images. Without a logit it is in ``[0, 1)``, and for up to 256
        levels ``floor(y * levels)`` gives the images back exactly (float32 and float64). The log-determinant ``[B]`` is
        with respect to v: the logit's, zero without one. The constant ``-D log(levels)`` is not in it.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B C P), one read of the images and one write of y. Reference: Theis et al. 2016, section 3.1; Dinh et al.
    2017 (RealNVP), section 4.1.
    """
    given = -1.0 if alpha is None else float(alpha)
    dtype = dtype or (images.dtype if images.dtype in _FLOATS else torch.float32)
    _check(images, key, levels, alpha, logdet, dtype)
    if images.dtype != torch.uint8:
        images = images.to(dtype)
    count = float(levels)
    if under_transform():
        return reference.forward(images, key, logdet, count, given, dtype)
    images, key = canonical(images), key.contiguous()
    if torch.is_grad_enabled() and (images.requires_grad or (logdet is not None and logdet.requires_grad)):
        return _Dequantize.apply(images, key, logdet, count, given, _FLOATS.index(dtype))
    return _forward(images, key, logdet, count, given, _FLOATS.index(dtype))


def _check(images, key, levels, alpha, logdet, dtype) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if images.dim() < 2:
        raise ValueError(f"images must be [B, C, *spatial], got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8 and images.dtype not in _FLOATS:
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    if dtype not in _FLOATS:
        raise ValueError(f"the output's dtype must be floating point, got {dtype}")
    if levels != int(levels) or not 2 <= levels <= MOST_LEVELS:
        raise ValueError(f"levels must be a whole number from 2 to {MOST_LEVELS}, got {levels}")
    if alpha is not None and not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be between 0 and 1/2, or None for no logit; got {alpha}")
    check_key(key, images.device)
    if logdet is None:
        return
    wanted = reference.arithmetic(dtype)
    if logdet.shape != (images.shape[0],) or logdet.dtype != wanted:
        raise ValueError(f"logdet must be {wanted} [{images.shape[0]}], got {logdet.dtype} {tuple(logdet.shape)}")
    if logdet.device != images.device:
        raise ValueError(f"logdet is on {logdet.device} but images are on {images.device}")
