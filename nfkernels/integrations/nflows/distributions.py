"""nflows' Gaussian bases: ``nflows.distributions.normal``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import gaussian_log_density
from ..adapter import Adapter
from ..registry import register


class _Density:
    """``_density(inputs, context)``; None for what is unusual."""

    def log_prob(self, inputs, context=None):
        if not isinstance(inputs, Tensor) or not _rows_fit(inputs, context):
            return super().log_prob(inputs, context)
        found = self._density(inputs, context)
        return super().log_prob(inputs, context) if found is None else found


def _rows_fit(inputs: Tensor, context: Any) -> bool:
    return context is None or (isinstance(context, Tensor) and inputs.shape[0] == context.shape[0])


def _fits(self: nn.Module, inputs: Tensor) -> bool:
    wide = inputs.dtype == torch.float32 or inputs.dtype == torch.float64
    return wide and inputs.dim() > 1 and inputs.shape[1:] == self._shape


def _log_z(module: nn.Module) -> float:
    return 0.5 * math.prod(module._shape) * math.log(2 * math.pi)


class _DensityAdapter(Adapter):
    def methods(self) -> tuple[str, ...]:
        return ("log_prob",)

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        """The original's constant is a float64 buffer, which ``module.to(torch.float32)`` has rounded."""
        super().disturb(module, generator)
        for part in module.modules():
            if isinstance(getattr(part, "_log_z", None), Tensor):
                part._log_z = part._log_z.new_tensor(_log_z(part), dtype=torch.float64)


@register("nflows.distributions.normal.StandardNormal")
class StandardNormal(_DensityAdapter):
    """One pass over the data."""

    class Layer(_Density):
        def _density(self, inputs: Tensor, context: Any) -> Tensor | None:
            return gaussian_log_density(inputs) if _fits(self, inputs) else None


@register("nflows.distributions.normal.ConditionalDiagonalNormal")
class ConditionalDiagonalNormal(_DensityAdapter):
    """Means and log standard deviations from a network of the context."""

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        encoder = module._context_encoder
        return [encoder] if isinstance(encoder, nn.Module) else []

    class Layer(_Density):
        def _density(self, inputs: Tensor, context: Any) -> Tensor | None:
            if context is None or not _fits(self, inputs):
                return None
            means, log_stds = self._compute_params(context)
            if means.shape != inputs.shape:
                return None
            return gaussian_log_density(inputs, torch.cat((means, log_stds), 1))


@register("nflows.distributions.normal.DiagonalNormal")
class DiagonalNormal(_DensityAdapter):
    """Learned means and standard deviations."""

    def refuse(self, module: nn.Module) -> str | None:
        return None if len(module._shape) == 1 else f"its shape is {tuple(module._shape)}, not (D,)"

    class Layer(_Density):
        def _density(self, inputs: Tensor, context: Any) -> Tensor | None:
            if not _fits(self, inputs):
                return None
            params = torch.cat((self.mean_, self.log_std_), 1).expand(inputs.shape[0], -1)
            return gaussian_log_density(inputs, params)
