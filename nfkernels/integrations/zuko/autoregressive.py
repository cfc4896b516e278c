"""``zuko.flows.autoregressive``: MAF, NSF, NCSF."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...ops import autoregressive_inverse
from ..registry import register
from .lazy import Lazy
from .made import Plan
from .transforms import Fused, fused_transform, making, zukos
from .univariates import Univariate, univariate_of


class Autoregressive(Fused):
    """One op after the network; the inverse is one op altogether where the network is a plain masked one."""

    _univariate: Univariate
    _plan: Plan | None

    def __init__(self, module: nn.Module, context: Tensor | None) -> None:
        super().__init__(partial(module.meta, context), module.passes)
        self._module, self._context = module, context

    def _arguments(self):
        return self.meta, self.passes

    def _flat(self, x, context, logdet, inverse):
        network, univariate = self._module.hyper, self._univariate
        if not inverse:
            return univariate(x, network(_with(x, context)), logdet, False)
        plan = self._plan
        if plan is not None and plan.serves(network, x) and plan.degrees.passes <= self.passes:
            found, change = autoregressive_inverse(x, **plan.of_call(network, context, univariate))
        else:
            found = torch.zeros_like(x)
            for _ in range(self.passes):  # of the last one the log-determinant is that of what it finds
                found, change = univariate(x, network(_with(found, context)), None, True)
        return found, change if logdet is None else logdet + change


def _with(x: Tensor, context: Tensor | None) -> Tensor:
    return x if context is None else torch.cat((x, context), 1)


@register("zuko.flows.autoregressive.MaskedAutoregressiveTransform")
class MaskedAutoregressive(Lazy):
    """``y_i = f(x_i; p_i(x_before, context))``, affine or spline."""

    class Layer:
        def forward(self, c=None):
            return self._made(self, c)

    def refuse(self, module):
        found = univariate_of(module)
        if isinstance(found, str):
            return found
        wide = getattr(module.hyper, "out_features", None)
        return None if isinstance(wide, int) and wide % found.count == 0 else "its network does not say how wide it is"

    def layer(self, module):
        univariate, features = univariate_of(module), self.width(module)
        made = fused_transform(
            Autoregressive, zukos("transforms.AutoregressiveTransform"), _features=features, _univariate=univariate,
            _plan=Plan.of(module.hyper, features, univariate.count),
        )  # fmt: skip
        return making(self.Layer, made)

    def width(self, module):
        return module.hyper.out_features // univariate_of(module).count
