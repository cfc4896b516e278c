"""nflows' couplings: ``nflows.transforms.coupling``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling, rational_quadratic_spline
from ..constants import specialised
from ..indices import Split
from ..registry import register
from .splines import cdf_fits, cdf_params, cdf_spline, is_cdf, outside, spline_of_module
from .steps import Step, StepAdapter, Total, joined


class _Coupling(StepAdapter):
    """What the couplings share: the split, and the network that is left alone."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.unconditional_transform is not None:
            return f"an unconditional transform of its own ({type(module.unconditional_transform).__name__})"
        return self._refuse_split(module)

    @staticmethod
    def _refuse_split(module: nn.Module) -> str | None:
        if Split.of(module.transform_features, module.identity_features) is None:
            return "its features are not the two parts of one whole"
        return None

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.transform_net]


def _split(module: nn.Module) -> Split:
    return Split.of(module.transform_features, module.identity_features)


def _fits(module: nn.Module, inputs: Tensor) -> bool:
    return inputs.dim() in (2, 4) and inputs.shape[1] == module.features


@register("nflows.transforms.coupling.AffineCouplingTransform")
class AffineCoupling(_Coupling):
    """``x (sigmoid(r + 2) + 1e-3) + t``, params ``[shift, scale]``: one pass in place of the gathers and scatters."""

    scale_map = ScaleMap.nflows()

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _split=_split(module), _map=self.scale_map)

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if not _fits(self, inputs):
                return self._original(inputs, context, inverse, total)
            params = self.transform_net(self._split.kept(inputs), context)
            where = self._split.channel_map(inputs.device)
            return joined(
                affine_coupling, inputs, params, total, scale_map=self._map, channel_map=where, inverse=inverse
            )


@register("nflows.transforms.coupling.AdditiveCouplingTransform")
class AdditiveCoupling(AffineCoupling):
    """``x + t``."""

    scale_map = ScaleMap.additive()


@register("nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform")
class RationalQuadraticCoupling(_Coupling):
    """A rational-quadratic spline of each transformed feature (Durkan et al. 2019), linear tails or none; and of the
    other features by a spline that depends on nothing, where there is one."""

    def refuse(self, module: nn.Module) -> str | None:
        other = module.unconditional_transform
        if other is not None and not is_cdf(other):
            return super().refuse(module)
        try:
            self.layer(module)
        except ValueError as error:
            return str(error)
        return self._refuse_split(module)

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [] if module.unconditional_transform is None else [module.unconditional_transform]

    def layer(self, module: nn.Module) -> type:
        names = ("hidden_features", "hidden_channels")
        spline = spline_of_module(module, module.transform_net, module.num_bins, names)
        other = module.unconditional_transform
        first = None if other is None else cdf_spline(other)
        return specialised(self.Layer, _split=_split(module), _curve=spline, _other=first)

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            split = self._split
            fits = _fits(self, inputs) and (
                self._other is None or cdf_fits(self.unconditional_transform, inputs, len(split.identity))
            )
            if not fits or outside(self._curve, inputs):
                return self._original(inputs, context, inverse, total)
            x = inputs
            if inverse:
                x, total = _unconditional(self, x, True, total)
            params = self.transform_net(split.kept(x), context)
            where = split.channel_map(inputs.device)
            x, total = joined(
                rational_quadratic_spline, x, params, total, spline=self._curve, channel_map=where, inverse=inverse
            )
            return (x, total) if inverse else _unconditional(self, x, False, total)


def _unconditional(self: Any, x: Tensor, inverse: bool, total: Total) -> tuple[Tensor, Total]:
    """The spline of the features that the network sees."""
    if self._other is None or not self._split.identity:
        return x, total
    return joined(
        rational_quadratic_spline, x, cdf_params(self.unconditional_transform, x), total, spline=self._other,
        channel_map=self._split.other_map(x.device), inverse=inverse,
    )  # fmt: skip
