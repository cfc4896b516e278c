"""nflows' couplings: ``nflows.transforms.coupling``."""

from __future__ import annotations

import functools
import math

from torch import Tensor, nn

from ...ops import ScaleMap, Spline, affine_coupling, rational_quadratic_spline
from ..adapter import Adapter
from ..indices import Split
from ..registry import register


class _Coupling(Adapter):
    """What the couplings share: the split, and the network that is left alone."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.unconditional_transform is not None:
            return "an unconditional transform of the identity half"
        if Split.of(module.transform_features, module.identity_features) is None:
            return "its features are not the two parts of one whole"
        return None

    def layer(self, module: nn.Module) -> type:
        return _with_split(self.Layer, Split.of(module.transform_features, module.identity_features))

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.transform_net]


@functools.cache
def _with_split(layer: type, split: Split) -> type:
    return type(layer.__name__, (layer,), {"_split": split})


def _fits(module: nn.Module, inputs: Tensor) -> bool:
    return inputs.dim() in (2, 4) and inputs.shape[1] == module.features


@register("nflows.transforms.coupling.AffineCouplingTransform")
class AffineCoupling(_Coupling):
    """``x sigmoid(r + 2) + 1e-3 x + t``, params ``[shift, scale]``: one pass in place of the gathers and scatters."""

    class Layer:
        def forward(self, inputs, context=None):
            if not _fits(self, inputs):
                return super().forward(inputs, context)
            return _affine(self, inputs, context, False)

        def inverse(self, inputs, context=None):
            if not _fits(self, inputs):
                return super().inverse(inputs, context)
            return _affine(self, inputs, context, True)


@register("nflows.transforms.coupling.AdditiveCouplingTransform")
class AdditiveCoupling(AffineCoupling):
    """``x + t``."""


_NFLOWS, _ADDITIVE = ScaleMap.nflows(), ScaleMap.additive()


def _affine(self: nn.Module, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    params = self.transform_net(self._split.kept(inputs), context)
    return affine_coupling(
        inputs, params, scale_map=_ADDITIVE if self._transform_dim_multiplier() == 1 else _NFLOWS,
        channel_map=self._split.channel_map(inputs.device), inverse=inverse,
    )  # fmt: skip


@register("nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform")
class RationalQuadraticCoupling(_Coupling):
    """A rational-quadratic spline of each transformed feature (Durkan et al. 2019), linear tails or none."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.tails not in (None, "linear"):
            return f"tails={module.tails!r}"
        if not 2 <= module.num_bins <= 64:
            return f"num_bins={module.num_bins} (2 to 64 are fused)"
        return super().refuse(module)

    class Layer:
        def forward(self, inputs, context=None):
            if not _fits(self, inputs) or self.tails is None:
                return super().forward(inputs, context)
            return _spline(self, inputs, context, False)

        def inverse(self, inputs, context=None):
            if not _fits(self, inputs) or self.tails is None:
                return super().inverse(inputs, context)
            return _spline(self, inputs, context, True)


def _spline(self: nn.Module, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    net = self.transform_net
    hidden = getattr(net, "hidden_features", None) or getattr(net, "hidden_channels", None) or 1
    spline = spline_of(
        self.num_bins, self.tail_bound, self.min_bin_width, self.min_bin_height, self.min_derivative, hidden
    )
    params = net(self._split.kept(inputs), context)
    return rational_quadratic_spline(
        inputs, params, spline=spline, channel_map=self._split.channel_map(inputs.device), inverse=inverse
    )


@functools.cache
def spline_of(bins: int, bound: float, width: float, height: float, derivative: float, hidden: int) -> Spline:
    """nflows' spline: raw widths and heights divided by the root of the network's width, where it tells one."""
    bound = float(bound)
    return Spline(
        bins=bins, low=-bound, high=bound, min_width=width, min_height=height, min_derivative=derivative,
        prescale=1 / math.sqrt(hidden),
    )  # fmt: skip
