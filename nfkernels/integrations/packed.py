"""LU factors that a library keeps as packed entries: strict triangles as two vectors, row by row."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import LUMatrices, lu_compose
from ..ops._library import under_transform
from ..ops.lu_compose import _backend, _backward, _forward
from ..reference.lu_compose import Diagonal
from .constants import Constant


@dataclass(frozen=True)
class Packing:
    """Where the entries of a width's two triangles lie; ``Packing.of(D)`` when a layer is swapped."""

    both: Constant  # [D, D], in cat(lower, upper, diagonal)
    below: Constant  # of the entries, in the matrix row by row
    above: Constant

    @staticmethod
    def of(width: int) -> Packing:
        return _packing(width)

    def matrix(self, lower: Tensor, upper: Tensor, diagonal: Tensor) -> Tensor:
        """``[D, D]`` with all entries in their places."""
        return torch.cat((lower, upper, diagonal)).take(self.both.on(diagonal.device))


@functools.cache
def _packing(width: int) -> Packing:
    count = width * (width - 1) // 2
    both = torch.empty(width, width, dtype=torch.int64)
    below, above = torch.tril_indices(width, width, -1), torch.triu_indices(width, width, 1)
    both[below[0], below[1]] = torch.arange(count)
    both[above[0], above[1]] = torch.arange(count, 2 * count)
    both.diagonal().copy_(torch.arange(2 * count, 2 * count + width))
    return Packing(Constant(both), Constant(below[0] * width + below[1]), Constant(above[0] * width + above[1]))


def compose_packed(
    lower: Tensor,
    upper: Tensor,
    log_s: Tensor,
    packing: Packing,
    eps: float,
    *,
    weight: bool = False,
    inverse: bool = False,
) -> LUMatrices:
    """``W = (L + I) (U + diag(softplus(log_s) + eps))``, ``[D, D]``, its inverse and ``log|det W|``, as
    :func:`nfkernels.ops.lu_compose` makes them: gathering the entries, and the gradients back, is part of one node.

    Args:
        lower, upper: ``[D (D - 1) / 2]``, the entries below and above the diagonal, row by row.
        log_s: ``[D]``.
    """
    narrow = log_s.dtype not in (torch.float32, torch.float64)
    plain = narrow or torch.compiler.is_compiling() or under_transform()
    if not plain and torch.is_grad_enabled() and (lower.requires_grad or upper.requires_grad or log_s.requires_grad):
        return LUMatrices(*_Packed.apply(lower, upper, log_s, packing, eps, weight, inverse))
    return _composed(lower, upper, log_s, packing, eps, weight, inverse)


def _composed(lower, upper, log_s, packing, eps, weight, inverse) -> LUMatrices:
    both = packing.matrix(lower, upper, log_s)
    return lu_compose(both, both, log_s, diagonal="softplus", eps=eps, weight=weight, inverse=inverse)


class _Packed(torch.autograd.Function):
    """Saves the matrix of entries, and the inverse where it was made."""

    @staticmethod
    def forward(ctx: Any, lower, upper, log_s, packing, eps, weight, inverse):
        both = packing.matrix(lower, upper, log_s)[None]
        ctx.backend, ctx.options, ctx.made = _backend(both), (int(Diagonal.softplus), eps), (weight, inverse)
        ctx.packing = packing
        made = _forward.on(ctx.backend, both, both, log_s[None], None, None, *ctx.options, weight, inverse)
        w, inv = (t[0] if wanted else None for t, wanted in zip(made[:2], ctx.made, strict=True))
        ctx.save_for_backward(lower, upper, log_s, both, inv)
        ctx.set_materialize_grads(False)
        return w, inv, made[2]

    @staticmethod
    def backward(ctx: Any, dweight, dinverse, dlogdet):
        lower, upper, log_s, both, inverse = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        given = (dweight, dinverse, dlogdet)
        if all(g is None for g in given):
            return (None,) * 7
        if torch.is_grad_enabled() or under_transform():  # second derivatives, in differentiable operations
            leaves = [t for t, n in zip((lower, upper, log_s), need, strict=True) if n]
            with torch.enable_grad():
                made = _composed(lower, upper, log_s, ctx.packing, ctx.options[1], *ctx.made)
                pairs = [(m, g) for m, g in zip(made, given, strict=True) if g is not None]
                outputs, cotangents = zip(*pairs, strict=True)
                found = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True))
            return (*(next(found) if n else None for n in need), *[None] * 4)
        given = [None if g is None else g.contiguous() for g in given]
        stacked = [g if g is None else g[None] for g in (inverse if dinverse is not None else None, *given[:2])]
        dlower, dupper, dlog_s = _backward.on(
            ctx.backend, both, both, log_s[None], None, None, *stacked, given[2], *ctx.options
        )
        below, above = (table.on(log_s.device) for table in (ctx.packing.below, ctx.packing.above))
        return dlower.take(below), dupper.take(above), dlog_s[0], None, None, None, None
