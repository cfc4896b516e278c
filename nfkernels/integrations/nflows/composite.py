"""nflows' chains of layers: ``nflows.transforms.base``. Layers that are watched by hooks are called as before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..registry import register
from .linear import permuted
from .steps import Step, StepAdapter, Total, through


@register("nflows.transforms.base.CompositeTransform")
class Composite(StepAdapter):
    """One layer after the other; fused ones take the running log-determinant with them."""

    kind = "container"

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            layers = tuple(self._transforms._modules.values())
            layers = layers[::-1] if inverse else layers
            x, count, n = inputs, len(layers), 0
            while n < count:
                made = None
                if n + 1 < count:
                    pair = (layers[n + 1], layers[n]) if inverse else (layers[n], layers[n + 1])
                    made = permuted(*pair, x, inverse, total)
                x, total = made if made is not None else through(layers[n], x, context, inverse, total)
                n += 1 if made is None else 2
            return x, total


@register("nflows.transforms.base.InverseTransform")
class Inverse(StepAdapter):
    """A layer the other way round."""

    kind = "container"

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            return through(self._transform, inputs, context, not inverse, total)
