"""``zuko.lazy.LazyComposedTransform`` and ``zuko.lazy.Flow``: the layers in a row, and the base at their end."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributions import Independent

from ...ops import gaussian_log_density
from ..registry import find, qualified, register
from ..swap import is_swapped, original_of
from .lazy import Lazy
from .transforms import Fused, Step, fused_transform, making, zukos


class Composed(Fused):
    """Fused transforms in a row: the data is flattened once, and their log-determinants are one running sum."""

    def __init__(self, context: Tensor | None, *transforms) -> None:
        super().__init__(*transforms)
        self._context = context
        fused = all(isinstance(t, Step) for t in transforms)
        self._features = transforms[0]._features if fused and len({t._features for t in transforms}) == 1 else -1

    @property
    def inv(self):
        return type(self)(self._context, *(t.inv for t in reversed(self.transforms)))

    def _fits(self, x):
        """One shape for data and context; else each transform broadcasts them by itself."""
        return self._features > 0 and _alike(x, self._context) and all(t._fits(x) for t in self.transforms)

    def _flat(self, x, context, logdet, inverse):
        for t in reversed(self.transforms) if inverse else self.transforms:
            own = context if t._context is self._context else _flat(t._context)
            x, logdet = t._flat(x, own, logdet, inverse)
        return x, logdet

    def _unfused(self, x, inverse):
        if inverse:
            return self.inv.call_and_ladj(x)
        return self.__nfkernels_original__.call_and_ladj(self, x)

    def _arguments(self):
        return tuple(self.transforms)


@register("zuko.lazy.LazyComposedTransform")
class LazyComposed(Lazy):
    """The layers' transforms in a row."""

    class Layer:
        def forward(self, c=None):
            return self._made(c, *(t(c) for t in self.transforms))

    def layer(self, module):
        return making(self.Layer, fused_transform(Composed, zukos("transforms.ComposedTransform")))

    def width(self, module):
        first = module.transforms[0]
        first = first.transform if _turned(first) else first
        return find(first)[0].width(first)

    def refuse(self, module):
        return None if _fused(module) else "not all of its layers are fused"

    def trials(self, module, call):
        return super().trials(module, call)[:1]


class Density:
    """``log_prob`` of a flow whose base is a diagonal normal: one op after the transform's."""

    __nfkernels_original__: type

    def __init__(self, transform, base, context: Tensor | None) -> None:
        torch.distributions.Distribution.__init__(self)
        self.transform = transform
        self._normal, self._loc, self._scale, self._context = base.f, base.loc, base.scale, context

    @cached_property
    def base(self):
        base = self._normal(loc=self._loc, scale=self._scale)
        base = base if self._context is None else base.expand(self._context.shape[:-1])
        more = self.transform.codomain.event_dim - len(base.event_shape)
        return Independent(base, more) if more > 0 else base

    @cached_property
    def reinterpreted(self):
        return max(len(self.base.event_shape) - self.transform.codomain.event_dim, 0)

    def log_prob(self, x):
        t = self.transform
        if not (isinstance(t, Step) and _alike(x, self._context) and x.dtype == self._loc.dtype and t._fits(x)):
            return super().log_prob(x)
        z, logdet = t._flat(_flat(x), _flat(t._context), None, False)
        params = torch.cat((self._loc, self._scale.log())).expand(z.shape[0], -1)
        return gaussian_log_density(z, params, logdet=logdet).reshape(x.shape[:-1])

    def expand(self, batch_shape, new=None):
        return self.__nfkernels_original__(self.transform, self.base).expand(batch_shape, new)

    def __reduce_ex__(self, protocol):
        return self.__nfkernels_original__, (self.transform, self.base)


def _fused(module: nn.Module) -> bool:
    """Whether each layer in a row is one that is fused: else there is nothing to gain around them."""
    if _turned(module):
        return _fused(module.transform)
    if qualified(original_of(type(module))) == "zuko.lazy.LazyComposedTransform":
        return all(_fused(t) for t in module.transforms)
    if is_swapped(module):
        return True
    adapter, reason = find(module)
    return isinstance(adapter, Lazy) and reason is None and adapter.refuse(module) is None


def _turned(module: nn.Module) -> bool:
    return qualified(type(module)) == "zuko.lazy.LazyInverse"


def _alike(x: Tensor, context: Tensor | None) -> bool:
    return context is None or context.shape[:-1] == x.shape[:-1]


def _flat(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


@register("zuko.lazy.Flow")
class Flow(Lazy):
    """``base(f(x)) + log|det f'(x)|`` with the log-determinants summed on the way."""

    bypassed = ("base",)

    class Layer:
        def forward(self, c=None):
            return self._made(self.transform(c), self.base, c)

    def refuse(self, module):
        base = module.base
        normal = qualified(type(base)) == "zuko.lazy.UnconditionalDistribution" and isinstance(base.f, type)
        if (
            not normal
            or qualified(base.f) != "zuko.distributions.DiagNormal"
            or base.args
            or set(base.kwargs) != {"loc", "scale"}
        ):
            return "its base is no DiagNormal(loc=, scale=)"
        if base.loc.dim() != 1 or base.scale.dim() != 1:
            return "its base's loc and scale are no vectors"
        return None if _fused(module.transform) else "not all of its layers are fused"

    def layer(self, module):
        return making(self.Layer, fused_transform(Density, zukos("distributions.NormalizingFlow")))

    def width(self, module):
        return len(module.base.loc)

    def trials(self, module, call):
        return [replace(call, then=_density, more=(self._data(module, call),))]


def _density(distribution, x):
    return distribution.log_prob(x)
