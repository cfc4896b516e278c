"""Rational-quadratic splines by their submodules: VITS' ConvFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ops import Spline, rational_quadratic_spline
from ..registry import register
from .family import Core, Family


@dataclass(frozen=True)
class ConvSpline(Core):
    """The second half by a spline whose bins come from the first; all of it masked, by zeros and ones."""

    factors: ClassVar[tuple[str, ...]] = ("batch",)

    channels: int
    spline: Spline

    def fits(self, x):
        return x.dim() == 3 and x.shape[1] == self.channels

    def apply(self, module, x, undo, mask, given, wanted):
        half = self.channels // 2
        same, changed = x.narrow(1, 0, half), x.narrow(1, half, half)
        params = module.proj(module.convs(module.pre(same), mask, g=given["g"])) * mask
        changed, logdet = rational_quadratic_spline(changed, params, spline=self.spline, mask=mask != 0, inverse=undo)
        return torch.cat([same, changed], 1) * mask, logdet


@register()
class ConvSplines(Family):
    """VITS' ConvFlow: widths and heights divided by the root of the network's width, linear tails."""

    unknown = "looks like VITS' ConvFlow by its submodules, but computes another spline"

    def looks_like(self, module):
        children = {n for n, m in module._modules.items() if m is not None}
        known = vars(module)
        return (
            children == {"pre", "convs", "proj"}
            and not any(p is not None for p in (*module._parameters.values(), *module._buffers.values()))
            and isinstance(known.get("num_bins"), int)
            and isinstance(known.get("tail_bound"), (int, float))
            and isinstance(known.get("half_channels"), int)
        )

    def refuse(self, module):
        if not 2 <= module.num_bins <= 64:
            return f"num_bins={module.num_bins} (2 to 64 are fused)"
        return None

    def conditioners(self, module):
        return [module.proj]

    def cores(self, module, seen):
        known = vars(module)
        bound, channels = float(known["tail_bound"]), 2 * known["half_channels"]
        for width in (known.get("filter_channels"), known.get("hidden_channels"), 1):
            if isinstance(width, int):
                prescale = 1 / math.sqrt(width)
                yield ConvSpline(channels, Spline(known["num_bins"], low=-bound, high=bound, prescale=prescale))
