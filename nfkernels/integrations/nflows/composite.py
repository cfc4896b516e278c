"""nflows' chains of layers: ``nflows.transforms.base``. Layers are called as before; log-determinants run along."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..registry import register
from .steps import Step, StepAdapter, Total, through


@register("nflows.transforms.base.CompositeTransform")
class Composite(StepAdapter):
    """One layer after the other; fused ones take the running log-determinant with them."""

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            layers = tuple(self._transforms._modules.values())
            x = inputs
            for layer in layers[::-1] if inverse else layers:
                x, total = through(layer, x, context, inverse, total)
            return x, total


@register("nflows.transforms.base.InverseTransform")
class Inverse(StepAdapter):
    """A layer the other way round."""

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            return through(self._transform, inputs, context, not inverse, total)
