"""nflows' layers that move values and change none: ``nflows.transforms.{permutations, reshape}``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..constants import Constant, specialised
from ..registry import register
from .steps import Step, StepAdapter, Total


class PermutationStep(Step):
    _back: Constant

    def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
        dim = self._dim
        if dim >= inputs.dim() or inputs.shape[dim] != len(self._back):
            return self._original(inputs, context, inverse, total)
        return inputs.index_select(dim, self._back.on(inputs.device) if inverse else self._permutation), total


@register("nflows.transforms.permutations.Permutation")
class Permutation(StepAdapter):
    """A permutation of one dimension; the way back is sorted once, not in every call."""

    def refuse(self, module: nn.Module) -> str | None:
        places = module._permutation.tolist()
        return None if sorted(places) == list(range(len(places))) else "its indices are not a permutation"

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _back=Constant(torch.argsort(module._permutation)))

    class Layer(PermutationStep):
        pass


@register("nflows.transforms.reshape.SqueezeTransform")
class Squeeze(StepAdapter):
    """Pixels to channels: one call."""

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            factor = self.factor
            if inputs.dim() != 4:
                return self._original(inputs, context, inverse, total)
            channels, height, width = inputs.shape[1:]
            if inverse:
                if channels < 4 or channels % 4 or channels % factor**2:
                    return self._original(inputs, context, inverse, total)
                return F.pixel_shuffle(inputs, factor), total
            if height % factor or width % factor:
                return self._original(inputs, context, inverse, total)
            return F.pixel_unshuffle(inputs, factor), total


@register("nflows.transforms.standard.IdentityTransform")
class Identity(StepAdapter):
    """Nothing at all."""

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            return inputs, total
