"""The public LU-factored linear op: checks, raw schemas, fake rules, autograd, and which way serves which sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import lu_linear as reference
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import Diagonal
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _choice, _like
from .channel_mix import _backend as mix_backend
from .channel_mix import _backward as mix_backward
from .channel_mix import _forward as mix_forward
from .lu_compose import DiagonalName, check_sign
from .lu_compose import _backend as compose_backend
from .lu_compose import _backward as compose_backward
from .lu_compose import _forward as compose_forward

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, *args):
    return _like(reference.forward(x, *args), x)


def _composite_backward(dy, saved, lower, *args):
    *options, need_dx, need_dparams, need_dbias = args
    dx, dlower, dupper, dlog_s, dbias = reference.backward(dy, saved, lower, *options)
    return (
        _like(dx, saved) if need_dx else saved.new_empty(0),
        *((dlower, dupper, dlog_s) if need_dparams else (lower.new_empty(0) for _ in range(3))),
        dbias if need_dbias else lower.new_empty(0),
    )


def _fake_forward(x, *args):
    return torch.empty_like(x)


def _fake_backward(dy, saved, lower, upper, log_s, *args):
    need_dx, need_dparams, need_dbias = args[-3:]
    return (
        torch.empty_like(saved) if need_dx else saved.new_empty(0),
        *(t.new_empty(t.shape if need_dparams else 0) for t in (lower, upper, log_s)),
        log_s.new_empty(log_s.shape if need_dbias else 0),
    )


_OPTIONS = "Tensor lower, Tensor upper, Tensor log_s, Tensor? sign, Tensor? permutation"
_forward = define(
    "_lu_linear_forward",
    f"(Tensor x, {_OPTIONS}, Tensor? bias, int diagonal, float eps, bool inverse) -> Tensor",
    reference=_composite_forward,
    fake=_fake_forward,
)
# `saved` is the map's x: the input, or with `inverse` the output.
_backward = define(
    "_lu_linear_backward",
    f"(Tensor dy, Tensor saved, {_OPTIONS}, int diagonal, float eps, bool inverse, bool need_dx, bool need_dparams,"
    " bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- which way -------------------------------------------------------------------------------------------------------

# Up to here a tile of columns and both triangles fit a block of threads; above, the library's products and solves.
WIDEST = 128
COMPOSED = "composed"


def _way(x: Tensor, inverse: bool) -> str | None:
    """A backend that is forced or None for whichever serves; above ``WIDEST`` the reference, or ``COMPOSED``: the
    matrix once, then one product with it. That costs D^3 whatever the batch: fewer columns than D never pay for it."""
    width = x.shape[1]
    if width <= WIDEST:
        return forced_backend()
    return COMPOSED if forced_backend() is None and not inverse and x.numel() >= width * width else "reference"


def _composed_forward(x, factors, bias, options) -> tuple[Tensor, Tensor]:
    """``(y, W)``."""
    stacked = [None if t is None else t[None] for t in factors]
    weight, _, _ = compose_forward.on(compose_backend(stacked[0]), *stacked, *options, True, False)
    weight = weight[0]
    return mix_forward.on(mix_backend(x), x, weight, bias), weight


def _composed_backward(dy, x, weight, factors, options, need) -> tuple:
    dx, dweight, dbias, _ = mix_backward.on(mix_backend(x), x, weight, dy, None, None, *need)
    return dx, *(_factor_gradients(dweight, factors, options) if need[1] else (None,) * 3), dbias


def _factor_gradients(dweight, factors, options) -> list[Tensor]:
    """``(dlower, dupper, dlog_s)`` from the dense matrix's gradient."""
    stacked = [None if t is None else t[None] for t in factors]
    backend = compose_backend(stacked[0])
    return [t[0] for t in compose_backward.on(backend, *stacked, None, dweight[None], None, None, *options)]


# --- autograd -------------------------------------------------------------------------------------------------------


class _LULinear(torch.autograd.Function):
    """Saves the map's x (its input, or inverted its output) and the factors, never an inverse."""

    @staticmethod
    def forward(ctx: Any, x, lower, upper, log_s, bias, sign, permutation, diagonal, eps, inverse):
        factors, weight = (lower, upper, log_s, sign, permutation), None
        ctx.way, ctx.options = _way(x, inverse), (diagonal, eps)
        ctx.inverse = inverse
        if ctx.way == COMPOSED:
            y, weight = _composed_forward(x, factors, bias, ctx.options)
        else:
            y = _forward.on(ctx.way, x, *factors, bias, diagonal, eps, inverse)
        ctx.save_for_backward(y if inverse else x, weight, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, *factors = ctx.saved_tensors
        need = ctx.needs_input_grad
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            lower, upper, log_s, sign, permutation = factors
            diagonal, eps = ctx.options
            grads = reference.backward(dy, x, lower, upper, log_s, sign, permutation, diagonal, eps, ctx.inverse)
        else:
            dy, wanted = readable(dy), (need[0], any(need[1:4]), need[4])
            if ctx.way == COMPOSED:
                grads = _composed_backward(dy, x, weight, factors, ctx.options, wanted)
            else:
                grads = _backward.on(ctx.way, dy, x, *factors, *ctx.options, ctx.inverse, *wanted)
        return (*(g if n else None for g, n in zip(grads, need[:5], strict=True)), *[None] * 5)


# --- public ---------------------------------------------------------------------------------------------------------


def lu_linear(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_s: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    diagonal: DiagonalName = "exp",
    eps: float = 1e-3,
    inverse: bool = False,
) -> Tensor:
    """The linear map ``y = P (L + I) (U + diag s) x + bias`` of axis 1 at every position, or its inverse.

    Args:
        x: ``[B, D, *spatial]``, float32, float64, bfloat16 or float16; contiguous, channels-last or sliced. With
            ``inverse`` it is y.
        lower, upper: ``[D, D]``; L and U are their strict triangles, the rest is never read (its gradient is zero).
        log_s: ``[D]``, the diagonal of U before ``diagonal``.
        bias: ``[D]`` or None.
        sign: ``[D]`` of +1 and -1, or None for +1; with the ``"exp"`` diagonal alone.
        permutation: int64 ``[D]`` or None: row i of the matrix is row ``permutation[i]`` of the product of the factors.
        diagonal: ``"exp"``: ``s = sign * exp(log_s)``; ``"softplus"``: ``s = softplus(log_s) + eps``, as in nflows.
        inverse: x from y, by two triangular solves; no inverse is ever made.

    The factors are cast to the arithmetic's type, float32 (float64 for float64 x), autocast or not.

    Returns:
        y, or with ``inverse`` x, shaped, typed and laid out like the argument. The log-determinant per position,
        ``sum log|s|`` (its negative inverted), is the caller's. A singular diagonal gives inf or NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.

    Cost: O(B P D^2) operations either way, for P positions; the backward as much again for each of the gradients of x
    and of the factors, plus O(D^3) once. Reference: Kingma & Dhariwal 2018 (Glow), section 3.2, equation 10.
    """
    kind = int(_choice(Diagonal, diagonal, "diagonal"))
    _check(x, lower, upper, log_s, bias, sign, permutation, kind)
    dtype = compute_dtype(x)
    lower, upper, log_s = (t.to(dtype) for t in (lower, upper, log_s))
    bias = None if bias is None else bias.to(dtype).contiguous()
    sign = None if sign is None else sign.to(dtype).contiguous()
    options = (kind, float(eps), bool(inverse))
    if under_transform():
        return reference.forward(x, lower, upper, log_s, sign, permutation, bias, *options)
    x, lower, upper, log_s = canonical(x), lower.contiguous(), upper.contiguous(), log_s.contiguous()
    permutation = None if permutation is None else permutation.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lower, upper, log_s, bias)):
        return _LULinear.apply(x, lower, upper, log_s, bias, sign, permutation, *options)
    way = _way(x, inverse)
    if way == COMPOSED:
        return _composed_forward(x, (lower, upper, log_s, sign, permutation), bias, options[:2])[0]
    return _forward.on(way, x, lower, upper, log_s, sign, permutation, bias, *options)


def _check(x, lower, upper, log_s, bias, sign, permutation, diagonal) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, D, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if sign is not None and diagonal == Diagonal.softplus:
        raise ValueError("a softplus diagonal is positive: sign goes with diagonal='exp'")
    check_sign(sign)
    if permutation is not None and permutation.dtype != torch.int64:
        raise ValueError(f"permutation must be int64, got {permutation.dtype}")
    width = x.shape[1]
    for name, t, shape in (
        ("lower", lower, (width, width)),
        ("upper", upper, (width, width)),
        ("log_s", log_s, (width,)),
        ("bias", bias, (width,)),
        ("sign", sign, (width,)),
        ("permutation", permutation, (width,)),
    ):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
        if name not in ("sign", "permutation") and t.dtype not in _FLOATS:
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
