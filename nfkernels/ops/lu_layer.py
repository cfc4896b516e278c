"""The public LU layer: :func:`lu_linear` with its log-determinant, packed triangles and either permutation in one call.

On CPU tensors it is one kernel forward and one backward; elsewhere the pieces are composed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import lu_layer as reference
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import Diagonal
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _choice, _like
from .lu_compose import DiagonalName, check_sign
from .lu_linear import WIDEST, lu_linear

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, *args):
    y, logdet = reference.forward(x, *args)
    return _like(y, x), logdet.clone()


def _composite_backward(dy, dlogdet, saved, lower, *args):
    *options, need_dx, need_dparams, need_dbias = args
    dx, dlower, dupper, dlog_s, dbias = reference.backward(dy, dlogdet, saved, lower, *options)
    return (
        _like(dx, saved) if need_dx else saved.new_empty(0),
        *((dlower, dupper, dlog_s) if need_dparams else (lower.new_empty(0) for _ in range(3))),
        dbias if need_dbias else lower.new_empty(0),
    )


def _fake_forward(x, *args):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x))


def _fake_backward(dy, dlogdet, saved, lower, upper, log_s, *args):
    need_dx, need_dparams, need_dbias = args[-3:]
    return (
        torch.empty_like(saved) if need_dx else saved.new_empty(0),
        *(t.new_empty(t.shape if need_dparams else 0) for t in (lower, upper, log_s)),
        log_s.new_empty(log_s.shape if need_dbias else 0),
    )


_OPTIONS = "Tensor lower, Tensor upper, Tensor log_s, Tensor? sign, Tensor? permutation, Tensor? columns"
_forward = define(
    "_lu_layer_forward",
    f"(Tensor x, {_OPTIONS}, Tensor? bias, int diagonal, float eps, bool inverse) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
    cpu_only="composed of lu_linear and a few calls",
)
# `saved` is the map's x: the input, or with `inverse` the output.
_backward = define(
    "_lu_layer_backward",
    f"(Tensor dy, Tensor? dlogdet, Tensor saved, {_OPTIONS}, int diagonal, float eps, bool inverse, bool need_dx,"
    " bool need_dparams, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
    cpu_only="composed of lu_linear and a few calls",
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _LULayer(torch.autograd.Function):
    """Saves the map's x (its input, or inverted its output) and the parameters as they were given."""

    @staticmethod
    def forward(ctx: Any, x, lower, upper, log_s, bias, sign, permutation, columns, diagonal, eps, inverse):
        factors = (lower, upper, log_s, sign, permutation, columns)
        y, logdet = _forward(x, *factors, bias, diagonal, eps, inverse)
        ctx.save_for_backward(y if inverse else x, *factors)
        ctx.set_materialize_grads(False)
        ctx.options = (diagonal, eps, inverse)
        ctx.backend = forced_backend()
        return y, logdet

    @staticmethod
    def backward(ctx: Any, dy, dlogdet):
        saved, *factors = ctx.saved_tensors
        need = ctx.needs_input_grad
        if dy is None and dlogdet is None:
            return (None,) * 11
        dy = torch.zeros_like(saved) if dy is None else dy
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            grads = reference.backward(dy, dlogdet, saved, *factors, *ctx.options)
        else:
            wanted = need[0], need[1] or need[2] or need[3], need[4]
            grads = _backward.on(ctx.backend, readable(dy), dlogdet, saved, *factors, *ctx.options, *wanted)
        return (*(g if n else None for g, n in zip(grads, need[:5])), *[None] * 6)


# --- public ---------------------------------------------------------------------------------------------------------


def lu_layer(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_s: Tensor,
    bias: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    columns: Tensor | None = None,
    diagonal: DiagonalName = "exp",
    eps: float = 1e-3,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = P (L + I) (U + diag s) x[:, columns] + bias`` at every position with its log-determinant, or the inverse.

    Args:
        x: ``[B, D, *spatial]``, float32, float64, bfloat16 or float16; contiguous, channels-last or sliced. With
            ``inverse`` it is y.
        lower, upper: ``[D, D]``, of which the strict triangles are read, or these alone, packed row by row:
            ``[D (D - 1) / 2]``, as nflows' and normflows' ``lower_entries`` and ``upper_entries`` are. Their gradients
            are shaped like them.
        log_s, bias, sign, permutation, diagonal, eps: as for :func:`lu_linear`; nflows' ``unconstrained_upper_diag`` is
            ``log_s`` with ``diagonal="softplus"`` and the layer's ``eps``.
        columns: int64 ``[D]`` or None: the product begins with ``x[:, columns]``, and the inverse ends with undoing it
            (nflows' and normflows' permutation before the product).
        inverse: x from y, by two triangular solves.

    Returns:
        ``(y, logdet)``: y shaped, typed and laid out like x; logdet ``[B]`` in float32 (float64 for float64 x):
        positions times ``sum log|s|``, with ``inverse`` its negative.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.

    Cost: as :func:`lu_linear`; on the CPU one call forward and one backward whatever the options, so that a small layer
    costs little more than an addition. The parameters' order is their storage: nothing is indexed in Python.
    """
    kind = int(_choice(Diagonal, diagonal, "diagonal"))
    dtype = compute_dtype(x)
    _check(x, lower, upper, log_s, bias, sign, permutation, columns, kind)
    if log_s.dtype != dtype or lower.dtype != dtype or upper.dtype != dtype:
        lower, upper, log_s = lower.to(dtype), upper.to(dtype), log_s.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if sign is not None and sign.dtype != dtype:
        sign = sign.to(dtype)
    forced = forced_backend()
    eps, inverse = float(eps), bool(inverse)
    if x.device.type != "cpu" or x.shape[1] > WIDEST or forced == "triton" or under_transform():
        return _composed(x, lower, upper, log_s, bias, sign, permutation, columns, diagonal, eps, inverse)
    factors = [None if t is None else t.contiguous() for t in (lower, upper, log_s, sign, permutation, columns)]
    x, bias = canonical(x), None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad
        or log_s.requires_grad
        or lower.requires_grad
        or upper.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _LULayer.apply(x, *factors[:3], bias, *factors[3:], kind, eps, inverse)
    return _forward(x, *factors, bias, kind, eps, inverse)


def _composed(x, lower, upper, log_s, bias, sign, permutation, columns, diagonal, eps, inverse):
    width = x.shape[1]
    factors = reference.dense(lower, width, False), reference.dense(upper, width, True), log_s, bias
    z = x if columns is None or inverse else x.index_select(1, columns)
    z = lu_linear(z, *factors, sign=sign, permutation=permutation, diagonal=diagonal, eps=eps, inverse=inverse)
    if columns is not None and inverse:
        z = z.index_select(1, torch.argsort(columns))
    return z, reference.log_abs_det(x, log_s, int(Diagonal[diagonal]), eps, inverse)


def _check(x, lower, upper, log_s, bias, sign, permutation, columns, diagonal) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if x.dim() < 2:
        raise ValueError(f"x must be [B, D, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    width = x.shape[1]
    count = width * (width - 1) // 2
    for name, t in (("lower", lower), ("upper", upper)):
        if t.shape != (width, width) and t.shape != (count,):
            raise ValueError(
                f"{name} must be [{width}, {width}] or packed [{count}], one strict triangle for the {width} channels "
                f"of x, got shape {tuple(t.shape)}"
            )
    vectors = (("log_s", log_s), ("bias", bias), ("sign", sign), ("permutation", permutation), ("columns", columns))
    for name, t in vectors:
        if t is not None and t.shape != (width,):
            raise ValueError(f"{name} must be [{width}], one entry per channel of x, got shape {tuple(t.shape)}")
    for name, t in vectors[3:]:
        if t is not None and t.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {t.dtype}")
    check_sign(sign)
    if sign is not None and diagonal != Diagonal.exp:
        raise ValueError("a softplus diagonal is positive: sign goes with diagonal='exp'")
    device = x.device
    for name, t in (("lower", lower), ("upper", upper), *vectors):
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device} but x is on {device}")
        if t is not None and t.dtype not in _FLOATS and t.dtype != torch.int64:
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
