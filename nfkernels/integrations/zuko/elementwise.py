"""``zuko.flows.gaussianization.ElementWiseTransform``: every feature by itself, the context deciding or nothing."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..registry import register
from .lazy import Lazy
from .transforms import Fused, fused_transform, making, plain, zukos
from .univariates import Univariate, univariate_of


class Elementwise(Fused):
    """One op. Its params ``[*, D P]`` were made with it; those of a context are broadcast with the data."""

    _univariate: Univariate
    reinterpreted = 1

    def __init__(self, module: nn.Module, params: Tensor, contextual: bool) -> None:
        plain(self)
        self._function, self._shapes, self._params = module.univariate, module.shapes, params
        self._context = params if contextual else None

    @cached_property
    def base(self):
        raw = self._params.unflatten(-1, (self._features, -1))
        sizes = [math.prod(s) for s in self._shapes]
        return self._function(
            *(p.unflatten(-1, (*s, 1)).squeeze(-1) for p, s in zip(raw.split(sizes, -1), self._shapes))
        )

    @property
    def domain(self):
        return self._univariate.domain

    @property
    def codomain(self):
        return constraints.independent(constraints.real, 1)

    def forward_shape(self, shape):
        return shape

    inverse_shape = forward_shape

    def _arguments(self):
        return self.base, 1

    def _flat(self, x, context, logdet, inverse):
        params = self._params.expand(x.shape[0], -1) if context is None else context
        return self._univariate(x, params, logdet, inverse)


@register("zuko.flows.gaussianization.ElementWiseTransform")
class ElementWise(Lazy):
    """``y_i = f(x_i; p_i(context))``, affine or spline."""

    class Layer:
        def forward(self, c=None):
            if c is not None:
                return self._made(self, self.hyper(c), True)
            return self._made(self, torch.cat([p.reshape(p.shape[0], -1) for p in self.phi], 1).flatten(), False)

    def refuse(self, module):
        found = univariate_of(module)
        return found if isinstance(found, str) else None

    def layer(self, module):
        made = fused_transform(
            Elementwise, zukos("transforms.DependentTransform"), _features=self.width(module),
            _univariate=univariate_of(module),
        )  # fmt: skip
        return making(self.Layer, made)

    def width(self, module):
        if hasattr(module, "phi"):
            return module.phi[0].shape[0]
        return module.hyper.out_features // univariate_of(module).count
