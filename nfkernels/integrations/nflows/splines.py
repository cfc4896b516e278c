"""nflows' rational-quadratic splines: which they are, their domain, and those without a network."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import Spline, rational_quadratic_spline
from ..constants import specialised
from ..registry import qualified, register
from .steps import Step, StepAdapter, Total, joined

CDF = "nflows.transforms.nonlinearities.PiecewiseRationalQuadraticCDF"


@functools.cache
def spline_of(
    bins: int, tails: str | None, bound: float, width: float, height: float, derivative: float, hidden: float
) -> Spline:
    """nflows' spline: raw widths and heights divided by the root of the network's width, where it tells one. Without
    tails it is one of the unit interval. ``ValueError`` for what is none."""
    if tails not in (None, "linear"):
        raise ValueError(f"tails={tails!r}")
    low, high = (0.0, 1.0) if tails is None else (-float(bound), float(bound))
    return Spline(
        bins=bins, tails="none" if tails is None else "linear", low=low, high=high, min_width=width, min_height=height,
        min_derivative=derivative, prescale=1 / math.sqrt(hidden),
    )  # fmt: skip


def spline_of_module(module: nn.Module, network: Any, bins: int, names: tuple[str, ...]) -> Spline:
    """The spline of a layer whose raw values come from ``network``, which may tell its width by one of ``names``."""
    hidden = next((getattr(network, name) for name in names if hasattr(network, name)), 1)
    return spline_of(
        bins, module.tails, module.tail_bound, module.min_bin_width, module.min_bin_height, module.min_derivative,
        hidden,
    )  # fmt: skip


def cdf_spline(module: nn.Module) -> Spline:
    return spline_of_module(module, None, module.unnormalized_widths.shape[-1], ())


def outside(spline: Spline, x: Tensor) -> bool:
    """Whether nflows might have to raise ``InputOutsideDomain``, as only a spline without tails does."""
    if spline.tails != "none" or not x.numel():
        return False
    low, high = torch.aminmax(x)
    return bool(low < spline.low) or bool(high > spline.high)


def cdf_params(module: nn.Module, x: Tensor) -> Tensor:
    """The raw values of a spline without a network, for every row of x: ``[B, C P, *spatial]``."""
    raw = torch.cat((module.unnormalized_widths, module.unnormalized_heights, module.unnormalized_derivatives), -1)
    if raw.dim() > 2:
        raw = raw.movedim(-1, 1)
    return raw.reshape(1, -1, *x.shape[2:]).expand(x.shape[0], *[-1] * (x.dim() - 1))


def cdf_fits(module: nn.Module, x: Tensor, channels: int) -> bool:
    return tuple(module.unnormalized_widths.shape[:-1]) == (channels, *x.shape[2:])


def is_cdf(module: Any) -> bool:
    return qualified(type(module)) == CDF or qualified(getattr(type(module), "__nfkernels_original__", object)) == CDF


@register(CDF)
class RationalQuadraticCDF(StepAdapter):
    """A rational-quadratic spline of each element that depends on nothing."""

    def refuse(self, module: nn.Module) -> str | None:
        try:
            cdf_spline(module)
        except ValueError as error:
            return str(error)
        return None

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _curve=cdf_spline(module))

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            fits = inputs.dim() > 1 and cdf_fits(self, inputs, inputs.shape[1])
            if not fits or outside(self._curve, inputs):
                return self._original(inputs, context, inverse, total)
            params = cdf_params(self, inputs)
            return joined(rational_quadratic_spline, inputs, params, total, spline=self._curve, inverse=inverse)
