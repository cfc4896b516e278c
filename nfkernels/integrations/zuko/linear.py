"""``zuko.lazy.UnconditionalTransform`` of a matrix or a permutation."""

from __future__ import annotations

import contextlib
from functools import cached_property

import torch
from torch import Tensor, nn

from ...reference.lu_compose import no_autocast
from ..registry import qualified, register
from .lazy import Lazy
from .transforms import Fused, fused_transform, making, plain


class LULinear(Fused):
    """``y = L U x`` from one matrix: L its lower triangle, U its strictly upper one with ones on the diagonal.

    Two products with triangles, O(N D^2); the original makes L U first, and inverts by one small solve a row.
    """

    def __init__(self, matrix: Tensor) -> None:
        plain(self)
        self._matrix = matrix

    @cached_property
    def L(self):
        return torch.tril(self._matrix)

    @cached_property
    def U(self):
        eye = torch.eye(self._features, dtype=self._matrix.dtype, device=self._matrix.device)
        return torch.triu(self._matrix, diagonal=1) + eye

    def _arguments(self):
        return (self._matrix,)

    def _fits(self, x):
        return super()._fits(x) and x.dtype == self._matrix.dtype

    def _flat(self, x, context, logdet, inverse):
        lu = self._matrix
        exact = torch.is_autocast_enabled(x.device.type)
        with no_autocast(x.device.type) if exact else contextlib.nullcontext():
            if inverse:
                y = torch.linalg.solve_triangular(lu.mT, x, upper=True, left=False)
                y = torch.linalg.solve_triangular(lu.mT, y, upper=False, left=False, unitriangular=True)
            else:
                y = torch.addmm(x, x, lu.triu(1).mT) @ lu.tril().mT
        own = lu.diagonal().abs().log().sum()
        own = -own if inverse else own
        return y, own.expand(x.shape[0]) if logdet is None else logdet + own


class Permutation(Fused):
    """``y = x[order]``."""

    def _arguments(self):
        return (self.order,)

    def _flat(self, x, context, logdet, inverse):
        order = torch.argsort(self.order) if inverse else self.order
        return x.index_select(1, order), x.new_zeros(x.shape[0]) if logdet is None else logdet


_KNOWN = {"zuko.transforms.LULinearTransform": (LULinear, 2), "zuko.transforms.PermutationTransform": (Permutation, 1)}


@register("zuko.lazy.UnconditionalTransform")
class Unconditional(Lazy):
    class Layer:
        def forward(self, c=None):
            return self._made(*self.args, *self.kwargs.values())

    def refuse(self, module):
        name = qualified(module.f) if isinstance(module.f, type) else type(module.f).__name__
        if name not in _KNOWN:
            return f"{name.rpartition('.')[2]} (nothing to fuse)"
        given = self._given(module)
        dims = _KNOWN[name][1]
        if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() != dims:
            return f"{name.rpartition('.')[2]} of something else than one tensor of {dims} axes"
        return None

    def layer(self, module):
        mixin = _KNOWN[qualified(module.f)][0]
        return making(self.Layer, fused_transform(mixin, module.f, _features=self.width(module)))

    def width(self, module):
        return self._given(module)[0].shape[-1]

    @staticmethod
    def _given(module: nn.Module) -> list:
        return [*module.args, *module.kwargs.values()]
