"""nflows' linear layers with a triangular or a free matrix: ``nflows.transforms.{linear, lu, conv}``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import channel_mix, lu_layer
from ...ops.lu_linear import WIDEST
from ..adapter import Call
from ..constants import Constant, specialised
from ..packed import Packing, compose_packed
from ..registry import register
from .permutations import PermutationStep
from .steps import Step, StepAdapter, Total, added, observed

# Up to here one matrix, or its inverse, costs less than the calls of a product or a solve with each factor would.
COMPOSED = 64


class LinearAdapter(StepAdapter):
    """What nflows' linear layers share. In evaluation mode with ``using_cache`` the matrices are the cached ones."""

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        super().disturb(module, generator)
        module.cache.invalidate()


class LinearStep(Step):
    """``_matrix(inverse)`` gives the matrix or its inverse with the matrix's log-determinant."""

    def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
        if inputs.dim() != 2 or self.bias.dtype.itemsize < 4:
            return self._original(inputs, context, inverse, total)
        if self.using_cache and not self.training:
            matrix, logdet = self._cached(inverse)
        else:
            made = self._without_matrix(inputs, inverse)
            if made is not None:
                return made[0], added(total, made[1])
            matrix, logdet = self._matrix(inverse)
        if inverse:
            return channel_mix(inputs - self.bias, matrix, None), added(total, -logdet)
        return channel_mix(inputs, matrix, self.bias), added(total, logdet)

    def _without_matrix(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Outputs and their log-determinant where a whole matrix would be the longer way."""
        return None

    def _cached(self, inverse: bool) -> tuple[Tensor, Tensor]:
        cache = self.cache
        name = "inverse" if inverse else "weight"
        if getattr(cache, name) is None or cache.logabsdet is None:
            matrix, logdet = self._matrix(inverse)
            if getattr(cache, name) is None:
                setattr(cache, name, matrix)
            cache.logabsdet = logdet if cache.logabsdet is None else cache.logabsdet
        return getattr(cache, name), cache.logabsdet


class LUStep(LinearStep):
    """On a CPU one call does all; elsewhere the matrix is made from its packed entries in one node, then a product."""

    _packing: Packing

    def _matrix(self, inverse: bool) -> tuple[Tensor, Tensor]:
        made = compose_packed(
            self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self._packing, self.eps,
            weight=not inverse, inverse=inverse,
        )  # fmt: skip
        return made.inverse if inverse else made.weight, made.logdet

    def _without_matrix(
        self, inputs: Tensor, inverse: bool, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """``columns``: of a permutation before the product."""
        one_call = inputs.device.type == "cpu" and self.features <= WIDEST
        if not one_call and (self.features <= COMPOSED or columns is not None):
            return None
        return lu_layer(
            inputs, self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self.bias, columns=columns,
            diagonal="softplus", eps=self.eps, inverse=inverse,
        )  # fmt: skip


def permuted(
    permutation: nn.Module, linear: nn.Module, x: Tensor, inverse: bool, total: Total
) -> tuple[Tensor, Total] | None:
    """A permutation and the LU layer after it in one call (inverted, before it); None where they are not such."""
    if not (isinstance(permutation, PermutationStep) and isinstance(linear, LUStep)) or x.dim() != 2:
        return None
    if permutation._dim != 1 or not len(permutation._back) == linear.features == x.shape[1]:
        return None
    if linear.bias.dtype.itemsize < 4:
        return None
    watched = not inverse and (observed(permutation) or observed(linear))
    if watched or (linear.using_cache and not linear.training):
        return None
    made = linear._without_matrix(x, inverse, permutation._permutation)
    return None if made is None else (made[0], added(total, made[1]))


@register("nflows.transforms.lu.LULinear")
class LULinear(LinearAdapter):
    """``L U x + b``."""

    def pays_from(self, module: nn.Module) -> float:
        return 0 if module.features <= WIDEST else 2**20

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _packing=Packing.of(module.features))

    class Layer(LUStep):
        pass


@register("nflows.transforms.conv.OneByOneConvolution")
class OneByOneConvolution(LinearAdapter):
    """A permutation of the channels, then ``L U``: both are one matrix."""

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.permutation]

    def layer(self, module: nn.Module) -> type:
        back = Constant(torch.argsort(module.permutation._permutation))
        return specialised(self.Layer, _packing=Packing.of(module.features), _back=back)

    class Layer(LUStep):
        _back: Constant

        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if inputs.dim() != 4 or inputs.shape[1] != self.features or self.bias.dtype.itemsize < 4:
                return self._original(inputs, context, inverse, total)
            cached = self.using_cache and not self.training
            if not cached:
                made = self._without_matrix(inputs, inverse, self.permutation._permutation)
                if made is not None:
                    return made[0], added(total, made[1])
            matrix, logdet = self._cached(inverse) if cached else self._matrix(inverse)
            logdet = logdet * (inputs.shape[2] * inputs.shape[3])
            back = self._back.on(inputs.device)
            if inverse:
                matrix = matrix.index_select(0, back)
                return channel_mix(inputs, matrix, -(matrix @ self.bias)), added(total, -logdet)
            return channel_mix(inputs, matrix.index_select(1, back), self.bias), added(total, logdet)


@register("nflows.transforms.linear.NaiveLinear")
class NaiveLinear(LinearAdapter):
    """A free matrix. Its inverse is a solve (the original's fails on today's PyTorch); forward is the original's own
    unless autocast would round it."""

    def trials(self, module: nn.Module, call: Call) -> list[Call]:
        """Where the inverse is what was seen, its values serve as data: the original has the forward alone."""
        return [replace(call, method="forward")]

    class Layer(LinearStep):
        def forward(self, inputs, context=None):
            rounded = torch.is_autocast_enabled(inputs.device.type)
            return super().forward(inputs, context) if rounded else super(Step, self).forward(inputs, context)

        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if inverse or torch.is_autocast_enabled(inputs.device.type):
                return super()._step(inputs, context, inverse, total)
            return self._original(inputs, context, inverse, total)

        def inverse_no_cache(self, inputs):
            x, logdet = self._without_matrix(inputs, True)
            return x, logdet.expand(inputs.shape[0]).clone()

        def _matrix(self, inverse: bool) -> tuple[Tensor, Tensor]:
            matrix = self._weight
            return torch.linalg.inv(matrix) if inverse else matrix, torch.linalg.slogdet(matrix)[1]

        def _without_matrix(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not inverse:
                return None
            factors, pivots = torch.linalg.lu_factor(self._weight)
            x = torch.linalg.lu_solve(factors, pivots, (inputs - self.bias).t()).t()
            return x, -factors.diagonal().abs().log().sum()
