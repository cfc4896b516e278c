"""nflows' linear layers with orthogonal factors: ``nflows.transforms.{orthogonal, qr, svd}``.

K reflections one after the other are one matrix: ``H_1 .. H_K = I - V^T S V`` with the reflections' vectors as the rows
of V and S the inverse of ``triu(V V^T, 1) + diag(V V^T) / 2``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import channel_mix
from ..constants import Constant, specialised
from ..registry import register
from .linear import LinearAdapter, LinearStep
from .steps import Step, StepAdapter, Total

WIDEST = 256  # of a matrix that is made in every call


def reflections(vectors: Tensor) -> Tensor:
    """``H_1 .. H_K`` of ``vectors [K, D]``: rows ``x [B, D]`` are reflected as ``x @ H``."""
    with torch.autocast(vectors.device.type, enabled=False):
        products = vectors @ vectors.t()
        factor = products.triu() - torch.diag(products.diagonal() / 2)
        solved = torch.linalg.solve_triangular(factor, vectors, upper=True)
        eye = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        return torch.addmm(eye, vectors.t(), solved, alpha=-1)


class _Reflecting(LinearAdapter):
    def refuse(self, module: nn.Module) -> str | None:
        width = module.features
        return None if width <= WIDEST else f"{width} features (up to {WIDEST} are fused)"


@register("nflows.transforms.orthogonal.HouseholderSequence")
class Householder(StepAdapter):
    """The reflections as one matrix."""

    def refuse(self, module: nn.Module) -> str | None:
        return _Reflecting.refuse(self, module)

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if inputs.dim() != 2 or self.q_vectors.dtype.itemsize < 4:
                return self._original(inputs, context, inverse, total)
            matrix = reflections(self.q_vectors)
            return channel_mix(inputs, matrix if inverse else matrix.t()), total


@register("nflows.transforms.qr.QRLinear")
class QRLinear(_Reflecting):
    """``Q R x + b``."""

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.orthogonal]

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _places=_upper_places(module.features))

    class Layer(LinearStep):
        _places: Constant

        def _matrix(self, inverse: bool) -> tuple[Tensor, Tensor]:
            q, upper = reflections(self.orthogonal.q_vectors), _upper(self)
            with torch.autocast(q.device.type, enabled=False):
                # Rows: x R^T H, so that the matrix is (R^T H)^T = H^T R; its inverse R^-1 H.
                made = torch.linalg.solve_triangular(upper, q, upper=True) if inverse else q.t() @ upper
            return made, self.log_upper_diag.sum()


def _upper(self: Any) -> Tensor:
    flat = torch.cat((self.upper_entries, torch.exp(self.log_upper_diag), self.bias.new_zeros(1)))
    places = self._places.on(flat.device)
    return flat.index_select(0, places).view(self.features, self.features)


@functools.cache
def _upper_places(width: int) -> Constant:
    """Where each entry of an upper triangle lies in ``cat(entries above the diagonal, diagonal, zero)``."""
    count = width * (width - 1) // 2
    places = torch.full((width, width), count + width, dtype=torch.int64)
    rows, columns = torch.triu_indices(width, width, 1)
    places[rows, columns] = torch.arange(count)
    places.diagonal().copy_(torch.arange(count, count + width))
    return Constant(places.flatten())


@register("nflows.transforms.svd.SVDLinear")
class SVDLinear(_Reflecting):
    """``U S V x + b``, U and V of reflections."""

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.orthogonal_1, module.orthogonal_2]

    class Layer(LinearStep):
        def _matrix(self, inverse: bool) -> tuple[Tensor, Tensor]:
            # Rows: x H2 S H1, so that the matrix is H1^T S H2^T; its inverse H2 S^-1 H1.
            one, two = reflections(self.orthogonal_1.q_vectors), reflections(self.orthogonal_2.q_vectors)
            diagonal = F.softplus(self.unconstrained_diagonal) + self.eps
            with torch.autocast(one.device.type, enabled=False):
                made = (two / diagonal) @ one if inverse else (one.t() * diagonal) @ two.t()
            return made, torch.log(diagonal).sum()
