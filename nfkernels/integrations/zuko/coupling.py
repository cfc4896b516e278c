"""``zuko.flows.coupling``: NICE and RealNVP."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..indices import Split
from ..registry import register
from .lazy import Lazy
from .transforms import Fused, fused_transform, making, plain, zukos
from .univariates import Univariate, univariate_of


class Coupling(Fused):
    """The features that the mask marks pass through; the others are transformed in place, by one op."""

    _univariate: Univariate
    _split: Split

    def __init__(self, module: nn.Module, context: Tensor | None) -> None:
        plain(self)
        self._module, self._context, self._mask = module, context, module.mask

    @property
    def meta(self):
        return partial(self._module.meta, self._context)

    @cached_property
    def idx_a(self):
        return self._mask.nonzero().squeeze(-1)

    @cached_property
    def idx_b(self):
        return (~self._mask).nonzero().squeeze(-1)

    def _arguments(self):
        return self.meta, self._mask

    def _flat(self, x, context, logdet, inverse):
        split = self._split
        seen = split.kept(x)
        params = self._module.hyper(seen if context is None else torch.cat((seen, context), 1))
        return self._univariate(x, params, logdet, inverse, split.channel_map(x.device))


@register("zuko.flows.coupling.GeneralCouplingTransform")
class GeneralCoupling(Lazy):
    """``y_b = f(x_b; p(x_a, context))``, affine or spline."""

    class Layer:
        def forward(self, c=None):
            return self._made(self, c)

    def refuse(self, module):
        found = univariate_of(module)
        return found if isinstance(found, str) else None

    def layer(self, module):
        mask = module.mask.detach().cpu()
        split = Split.of((~mask).nonzero().squeeze(-1), mask.nonzero().squeeze(-1))
        made = fused_transform(
            Coupling, zukos("transforms.CouplingTransform"), _features=len(mask), _univariate=univariate_of(module),
            _split=split,
        )  # fmt: skip
        return making(self.Layer, made)

    def width(self, module):
        return len(module.mask)
