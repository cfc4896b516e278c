"""nflows' Gaussian bases and the flow around them: ``nflows.{distributions.normal, flows.base}``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import gaussian_log_density
from ..adapter import Adapter
from ..registry import register
from .steps import NOTHING, observed, through, whole


class _Density:
    """``_density(inputs, context, logdet)`` adds a flow's log-determinant on the way; None for what is unusual."""

    def log_prob(self, inputs, context=None):
        if not isinstance(inputs, Tensor) or not _rows_fit(inputs, context):
            return super().log_prob(inputs, context)
        found = self._density(inputs, context, None)
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
        def _density(self, inputs: Tensor, context: Any, logdet: Tensor | None) -> Tensor | None:
            return gaussian_log_density(inputs, logdet=logdet) if _fits(self, inputs) else None


@register("nflows.distributions.normal.ConditionalDiagonalNormal")
class ConditionalDiagonalNormal(_DensityAdapter):
    """Means and log standard deviations from a network of the context."""

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        encoder = module._context_encoder
        return [encoder] if isinstance(encoder, nn.Module) else []

    class Layer(_Density):
        def _density(self, inputs: Tensor, context: Any, logdet: Tensor | None) -> Tensor | None:
            if context is None or not _fits(self, inputs):
                return None
            means, log_stds = self._compute_params(context)
            if means.shape != inputs.shape:
                return None
            return gaussian_log_density(inputs, torch.cat((means, log_stds), 1), logdet=logdet)


@register("nflows.distributions.normal.DiagonalNormal")
class DiagonalNormal(_DensityAdapter):
    """Learned means and standard deviations."""

    def refuse(self, module: nn.Module) -> str | None:
        return None if len(module._shape) == 1 else f"its shape is {tuple(module._shape)}, not (D,)"

    class Layer(_Density):
        def _density(self, inputs: Tensor, context: Any, logdet: Tensor | None) -> Tensor | None:
            if not _fits(self, inputs):
                return None
            params = torch.cat((self.mean_, self.log_std_), 1).expand(inputs.shape[0], -1)
            return gaussian_log_density(inputs, params, logdet=logdet)


@register("nflows.flows.base.Flow")
class Flow(_DensityAdapter):
    """The base's density takes the log-determinant of the layers with it."""

    kind = "container"

    class Layer:
        def log_prob(self, inputs, context=None):
            if not isinstance(inputs, Tensor) or not _rows_fit(inputs, context):
                return super().log_prob(inputs, context)
            context = self._embedding_net(context)
            transform, base = self._transform, self._distribution
            if hasattr(type(transform), "_step") and not observed(transform):
                noise, total = through(transform, inputs, context, False, NOTHING)
                logdet = whole(total, inputs)
            else:
                noise, logdet = transform(inputs, context=context)
            if hasattr(type(base), "_density") and _rows_fit(noise, context) and logdet.dtype == noise.dtype:
                found = type(base)._density(base, noise, context, None)
                if found is not None:  # added here, as sample_and_log_prob adds it: to the last bit
                    return found + logdet
            return base.log_prob(noise, context=context) + logdet
