"""The public LU composition op: a stack of matrices, their inverses and their log-determinant from LU parameters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..reference import lu_compose as reference
from ..reference.lu_compose import Diagonal
from ._library import define, forced_backend, under_transform
from .affine_coupling import _FLOATS, _choice

DiagonalName = Literal["exp", "softplus"]

# Beyond this many channels a block's columns no longer fit the shared memory of every GPU.
LARGEST_ON_GPU = 512


class LUMatrices(NamedTuple):
    """What :func:`lu_compose` makes and raises: ``weight`` and ``inverse [K, C, C]`` (``[C, C]`` of one matrix), None
    where not asked for, and ``logdet``, a scalar."""

    weight: Tensor | None
    inverse: Tensor | None
    logdet: Tensor


# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(lower, upper, log_s, *options):
    weight, inverse, logdet = reference.forward(lower, upper, log_s, *options)
    made = [lower.new_empty(0) if t is None else t.contiguous() for t in (weight, inverse)]
    return made[0], made[1], logdet


def _composite_backward(lower, *rest):
    return tuple(t.contiguous() for t in reference.backward(lower, *rest))


def _fake_forward(lower, upper, log_s, sign, permutation, diagonal, eps, need_weight, need_inverse):
    weight, inverse = (lower.new_empty(lower.shape if need else 0) for need in (need_weight, need_inverse))
    return weight, inverse, lower.new_empty(())


def _fake_backward(lower, upper, log_s, *rest):
    return torch.empty_like(lower), torch.empty_like(upper), torch.empty_like(log_s)


_forward = define(
    "_lu_compose_forward",
    "(Tensor lower, Tensor upper, Tensor log_s, Tensor? sign, Tensor? permutation, int diagonal, float eps,"
    " bool need_weight, bool need_inverse) -> (Tensor, Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_lu_compose_backward",
    "(Tensor lower, Tensor upper, Tensor log_s, Tensor? sign, Tensor? permutation, Tensor? inverse, Tensor? dweight,"
    " Tensor? dinverse, Tensor? dlogdet, int diagonal, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


def _backend(lower: Tensor) -> str | None:
    forced = forced_backend()
    return "reference" if forced is None and lower.is_cuda and lower.shape[-1] > LARGEST_ON_GPU else forced


# --- autograd -------------------------------------------------------------------------------------------------------


class _LUCompose(torch.autograd.Function):
    """Saves the parameters and the inverse where it was made: its gradient needs it, and no new one."""

    @staticmethod
    def forward(ctx: Any, lower, upper, log_s, sign, permutation, diagonal, eps, need_weight, need_inverse):
        ctx.backend = _backend(lower)
        weight, inverse, logdet = _forward.on(
            ctx.backend, lower, upper, log_s, sign, permutation, diagonal, eps, need_weight, need_inverse
        )
        ctx.save_for_backward(lower, upper, log_s, sign, permutation, inverse if need_inverse else None)
        ctx.set_materialize_grads(False)
        ctx.diagonal, ctx.eps, ctx.made = diagonal, eps, (need_weight, need_inverse)
        return weight, inverse, logdet

    @staticmethod
    def backward(ctx: Any, dweight, dinverse, dlogdet):
        lower, upper, log_s, sign, permutation, inverse = ctx.saved_tensors
        dweight, dinverse = (g if made else None for g, made in zip((dweight, dinverse), ctx.made, strict=True))
        if dweight is None and dinverse is None and dlogdet is None:
            return (None,) * 9
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            grads = reference.backward(
                lower, upper, log_s, sign, permutation, inverse, dweight, dinverse, dlogdet, ctx.diagonal, ctx.eps
            )
        else:
            given = (None if g is None else g.contiguous() for g in (dweight, dinverse, dlogdet))
            inverse = None if dinverse is None else inverse
            grads = _backward.on(
                ctx.backend, lower, upper, log_s, sign, permutation, inverse, *given, ctx.diagonal, ctx.eps
            )
        return (*(g if n else None for g, n in zip(grads, ctx.needs_input_grad[:3], strict=True)), *(None,) * 6)


# --- public ---------------------------------------------------------------------------------------------------------


def lu_compose(
    lower: Tensor,
    upper: Tensor,
    log_s: Tensor,
    *,
    sign: Tensor | None = None,
    permutation: Tensor | None = None,
    diagonal: DiagonalName = "exp",
    eps: float = 1e-3,
    inverse: bool = True,
    weight: bool = True,
) -> LUMatrices:
    """K matrices ``W = P (L + I) (U + diag(s))``, their inverses and their log-determinant, at once.

    Args:
        lower, upper: ``[K, C, C]`` or ``[C, C]``; only the strict triangles are read, and get a gradient. float32 or
            float64; bfloat16 and float16 become float32.
        log_s: ``[K, C]`` or ``[C]``, what the diagonal s is made of.
        sign: of s, +-1, shaped like log_s; None for +1. It gets no gradient, and goes with ``"exp"`` alone.
        permutation: int64, shaped like log_s: row i of W is row ``permutation[i]`` of ``(L + I)(U + diag(s))``, so
            ``torch.linalg.lu``'s P is ``permutation = P.argmax(-1)``. None for none. Its values are taken on trust.
        diagonal: ``"exp"`` for ``s = sign exp(log_s)`` (Glow), ``"softplus"`` for ``s = softplus(log_s) + eps``
            (nflows).
        inverse, weight: whether those matrices are made.

    Returns:
        ``LUMatrices(weight, inverse, logdet)``: matrices shaped like lower, None where not asked for; logdet, a
        scalar, is the sum of ``log|s|`` over all K matrices. A zero or overflowing s shows in them as what is not
        finite.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(K C^3), in float64 whatever the dtype, by sums and substitution; the backward costs about as much and
    inverts nothing. Reference: Kingma & Dhariwal 2018 (Glow), section 3.2, eq. 10-11.
    """
    kind = int(_choice(Diagonal, diagonal, "diagonal"))
    check_factors(lower, upper, log_s, sign, permutation, kind)
    dtype = torch.float64 if lower.dtype == torch.float64 else torch.float32
    one = lower.dim() == 2
    found: list[Any] = [None if t is None else t.to(dtype).contiguous() for t in (lower, upper, log_s, sign)]
    found.append(None if permutation is None else permutation.contiguous())
    if one:
        found = [None if t is None else t[None] for t in found]
    options = (kind, float(eps), weight, inverse)
    if under_transform():
        lower, upper, log_s, sign, permutation = found
        made = reference.forward(lower, upper, log_s, sign, permutation, *options)
    else:
        if torch.is_grad_enabled() and any(t.requires_grad for t in found[:3]):
            made = _LUCompose.apply(*found, *options)
        else:
            made = _forward.on(_backend(found[0]), *found, *options)
        made = (made[0] if weight else None, made[1] if inverse else None, made[2])
    matrices = [t[0] if one and t is not None else t for t in made[:2]]
    return LUMatrices(matrices[0], matrices[1], made[2])


def check_factors(
    lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor | None, permutation: Tensor | None, diagonal: int
) -> None:
    """Shapes, dtypes and devices; no data is read."""
    if lower.dim() not in (2, 3) or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower must be [K, C, C] or [C, C], got shape {tuple(lower.shape)}")
    if lower.dtype not in _FLOATS:
        raise ValueError(f"lower must be floating point, got {lower.dtype}")
    shapes = {"upper": tuple(lower.shape), "log_s": tuple(lower.shape[:-1])}
    shapes |= {"sign": shapes["log_s"], "permutation": shapes["log_s"]}
    for name, other in (("upper", upper), ("log_s", log_s), ("sign", sign), ("permutation", permutation)):
        if other is None:
            continue
        if other.shape != shapes[name]:
            raise ValueError(
                f"{name} must be {list(shapes[name])} for lower of shape {tuple(lower.shape)}, got {tuple(other.shape)}"
            )
        if name == "permutation":
            if other.dtype != torch.int64:
                raise ValueError(f"permutation must be int64, got {other.dtype}")
        elif name != "sign" and other.dtype != lower.dtype:
            raise ValueError(f"{name} is {other.dtype} but lower is {lower.dtype}")
        if other.device != lower.device:
            raise ValueError(f"{name} is on {other.device} but lower is on {lower.device}")
    check_sign(sign)
    if sign is not None and diagonal == Diagonal.softplus:
        raise ValueError("a softplus diagonal is positive: sign goes with diagonal='exp'")


def check_sign(sign: Tensor | None) -> None:
    """Whole numbers serve; True and False would be +1 and 0."""
    if sign is not None and (sign.is_complex() or sign.dtype == torch.bool):
        raise ValueError(f"sign must be +1 and -1 in a real type, got {sign.dtype}")
