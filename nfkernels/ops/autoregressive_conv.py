"""The public autoregressive convolution op and its inverse: checks, raw schema, fake rule, autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import autoregressive_conv as reference
from ..reference.affine_coupling import compute_dtype
from ..reference.autoregressive_conv import Form
from ._layout import canonical
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _like
from .channel_mix import WIDEST
from .channel_mix import _backward as _mix_backward

OrderName = Literal["forward", "reverse"]
MaskName = Literal["square", "raster"]

WIDEST_KERNEL = 1023  # the kernels count in 32 bits

# --- raw op: schema, reference, fake --------------------------------------------------------------------------------


def _composite_forward(x, weight, bias, rows, columns, raster, reverse, solve):
    return _like(reference.forward(x, weight, bias, Form(rows, columns, raster, reverse), solve), x)


def _fake_forward(x, weight, bias, rows, columns, raster, reverse, solve):
    return torch.empty_like(x)


# weight [taps, C, C] in the order of Form.offsets; out_p = weight[0] x_p + sum_t weight[t] s_{p - t} + bias, where s is
# x, or the output itself if solve (what divides by the triangle is in the weight already).
_forward = define(
    "_autoregressive_conv_forward",
    "(Tensor x, Tensor weight, Tensor? bias, int rows, int columns, bool raster, bool reverse, bool solve) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
)


def _run(backend: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, solve: bool) -> Tensor:
    """The convolution (or, with solve, its inverse) by ``weight [taps, C, C]``, without a gradient."""
    if solve:
        weight, bias = reference.premultiplied(weight, bias, form)
    return _forward.on(backend, x, weight.contiguous(), bias, *form, solve)


def _weight_gradient(backend: str | None, dy: Tensor, x: Tensor, form: Form) -> Tensor:
    """As the reference's, by the channel mix's kernels, which no setting of PyTorch turns to TF32."""
    if backend == "reference" or x.shape[1] > WIDEST:
        return reference.weight_gradient(dy, x, form)
    dy, grads = canonical(dy), []
    unit = dy.new_zeros((), dtype=compute_dtype(x)).expand(x.shape[1], x.shape[1]).contiguous()
    for tap in form.offsets():
        moved = reference.shifted(x, tap, form.reverse)
        if moved is None:
            grads.append(torch.zeros_like(unit))
        else:
            grads.append(_mix_backward.on(backend, canonical(moved), unit, dy, None, None, False, True, False)[1])
    return torch.stack(grads)


# --- autograd -------------------------------------------------------------------------------------------------------


class _AutoregressiveConv(torch.autograd.Function):
    """Saves the convolution's input (its output where it is solved: that is the same tensor) and the weight.

    The gradient of either direction is that direction with the taps transposed and the order turned round.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, form, solve):
        ctx.form, ctx.solve, ctx.backend = form, solve, forced_backend()
        out = _run(ctx.backend, x, weight, bias, form, solve)
        ctx.save_for_backward(out if solve else x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        x, weight = ctx.saved_tensors
        form, solve, need, dtype = ctx.form, ctx.solve, ctx.needs_input_grad, x.dtype
        if solve and any(need[1:3]):  # they are sums of what is solved for: it is rounded for dx alone
            x, dout = x.to(weight.dtype), dout.to(weight.dtype)
        transposed = weight.mT
        dx = dweight = dbias = None
        if under_transform():
            given, bias = reference.premultiplied(transposed, None, form.flipped()) if solve else (transposed, None)
            moved = reference.forward(dout, given, bias, form.flipped(), solve)
            gradient = reference.weight_gradient
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            moved = _AutoregressiveConv.apply(canonical(dout), transposed, None, form.flipped(), solve)
            gradient = reference.weight_gradient
        else:
            moved = None
            if need[0] or solve:
                moved = _run(ctx.backend, canonical(dout), transposed, None, form.flipped(), solve)

            def gradient(dy, x, form):
                return _weight_gradient(ctx.backend, dy, x, form)

        dx = moved.to(dtype) if need[0] else None
        dy = moved if solve else dout  # solve: minus the gradient of the convolution that was undone
        if need[1]:
            dweight = gradient(dy, x, form)
            dweight = -dweight if solve else dweight
        if need[2]:
            dbias = dy.to(weight.dtype).sum((0, 2, 3))
            dbias = -dbias if solve else dbias
        return dx, dweight, dbias, None, None


# --- public ---------------------------------------------------------------------------------------------------------


def autoregressive_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderName = "forward",
    mask: MaskName = "square",
    inverse: bool = False,
) -> Tensor:
    """A convolution whose Jacobian is triangular, or its inverse: ``y_p = W_0 x_p + sum_t W_t x_{p - t} + bias``.

    Args:
        x: ``[B, C, H, W]`` or ``[B, C, T]``, float32, float64, bfloat16 or float16, contiguous or not.
        weight: ``[C, C, k, k]`` (``[C, C, k]``), k odd, laid out as for ``torch.nn.functional.conv2d`` with padding
            ``k // 2``. Entries outside the mask are ignored and get zero gradients.
        bias: ``[C]`` or None.
        order: ``"forward"``: a pixel depends on itself and on earlier ones, and the centre ``W_0 = weight[:, :, k//2,
            k//2]`` is lower triangular. ``"reverse"``: the mirror image, later pixels and an upper triangle.
        mask: which taps there are besides the centre. ``"square"``: those up and left of it (down and right in
            reverse), its own row and column included; ``"raster"``: all that come before it line by line.
        inverse: solves for x given y.

    Returns:
        y (x for the inverse), shaped, typed and laid out like x. ``log|det| = H W sum_c log|W_0[c, c]|``, minus that
        for the inverse, is the caller's. A zero on the diagonal gives an inverse that is not finite.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B C^2 H W) times the taps, both ways, in float32 (float64 for float64 x), autocast or not. The inverse takes
    ``W + H - 1`` dependent steps (square) or ``W + (k//2 + 1) (H - 1)`` (raster). Reference: Hoogeboom, van den Berg &
    Welling 2019 (Emerging Convolutions), section 3.
    """
    _check(x, weight, bias, order, mask)
    if x.dim() == 3:
        return _apply(x[:, :, None], weight[:, :, None], bias, order, mask, inverse)[:, :, 0]
    return _apply(x, weight, bias, order, mask, inverse)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, order: str, mask: str, inverse: bool) -> Tensor:
    dtype = compute_dtype(x)
    form = Form(weight.shape[2], weight.shape[3], mask == "raster", order == "reverse")
    stack = stacked_taps(weight.to(dtype), form)
    bias = None if bias is None else bias.to(dtype).contiguous()
    if under_transform():
        stack, bias = reference.premultiplied(stack, bias, form) if inverse else (stack, bias)
        return reference.forward(x, stack, bias, form, inverse)
    x = canonical(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or stack.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _AutoregressiveConv.apply(x, stack, bias, form, inverse)
    return _run(forced_backend(), x, stack, bias, form, inverse)


def stacked_taps(weight: Tensor, form: Form) -> Tensor:
    """``[taps, C, C]`` in the order of ``form.offsets`` from ``weight [C, C, kh, kw]``, its centre a triangle."""
    if form.reverse:
        weight = weight.flip(2, 3)
    half_h, half_w = form.rows // 2, form.columns // 2
    # Towards earlier pixels, offsets grow as indices fall.
    if form.raster:
        taps = weight.flatten(2)[..., : half_h * form.columns + half_w + 1].flip(2)
    else:
        taps = weight[..., : half_h + 1, : half_w + 1].flip(2, 3).flatten(2)
    taps = taps.permute(2, 0, 1)
    return torch.cat([taps[:1].triu() if form.reverse else taps[:1].tril(), taps[1:]])


def _check(x, weight, bias, order, mask) -> None:
    """Shapes, dtypes, devices and options; no data is read."""
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [B, C, T], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    channels, size = x.shape[1], weight.shape[-1] if weight.dim() else 0
    if weight.shape != (channels, channels, *[size] * (x.dim() - 2)) or size % 2 == 0:
        kernel = ", ".join("k" * (x.dim() - 2))
        raise ValueError(
            f"weight must be [{channels}, {channels}, {kernel}], k odd, for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if size > WIDEST_KERNEL:
        raise ValueError(f"weight must have a kernel of at most {WIDEST_KERNEL} taps a side, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], got {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.dtype not in _FLOATS:
            raise ValueError(f"{name} must be floating point, got {other.dtype}")
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
    for name, given, known in (("order", order, ("forward", "reverse")), ("mask", mask, ("square", "raster"))):
        if given not in known:
            raise ValueError(f"unknown {name} {given!r}: expected one of {', '.join(known)}")
