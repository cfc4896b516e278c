"""nflows' normalizations: ``nflows.transforms.normalization``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import channel_affine
from ..adapter import Call
from ..registry import register
from ..swap import respecialise
from .steps import Step, StepAdapter, Total, added


class _ActNormStep(Step):
    def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
        if inputs.dim() not in (2, 4):
            return self._original(inputs, context, inverse, total)
        log_scale, shift, logdet = self.log_scale, self.shift, self.log_scale.sum()
        if inputs.dim() == 4:
            logdet = logdet * (inputs.shape[2] * inputs.shape[3])
            if not inverse and log_scale.shape[0] == inputs.shape[1]:  # all three gradients in one pass
                return channel_affine(inputs, torch.exp(log_scale), shift), added(total, logdet)
            log_scale, shift = log_scale[:, None, None], shift[:, None, None]
        if inverse:
            return (inputs - shift) * torch.exp(-log_scale), added(total, -logdet)
        return torch.addcmul(shift, inputs, torch.exp(log_scale)), added(total, logdet)


@register("nflows.transforms.normalization.ActNorm")
class ActNorm(StepAdapter):
    """``e^s x + t``. Until its first batch in training has initialised it, the original runs forward; afterwards no
    call looks at the flag."""

    def layer(self, module: nn.Module) -> type:
        return self.Layer if bool(module.initialized) else self.Waiting

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        super().disturb(module, generator)
        module.initialized.fill_(True)

    class Layer(_ActNormStep):
        pass

    class Waiting(_ActNormStep):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if inverse or not self.training:
                return super()._step(inputs, context, inverse, total)
            made = self._original(inputs, context, inverse, total)
            if not torch.compiler.is_compiling() and not getattr(self, "_is_replica", False):
                respecialise(self)
            return made


@register("nflows.transforms.normalization.BatchNorm")
class BatchNorm(StepAdapter):
    """The batch's own mean and variance in training, the running ones in evaluation; one affine map of each feature."""

    def partner(self, module: nn.Module, call: Call, out: Any) -> Call | None:
        return None if module.training else super().partner(module, call, out)

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            if inputs.dim() != 2 or (inverse and self.training):
                return self._original(inputs, context, inverse, total)
            if self.training:
                var, mean = torch.var_mean(inputs, 0)
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(var.detach(), self.momentum)
            else:
                var, mean = self.running_var, self.running_mean
            weight, std = F.softplus(self.unconstrained_weight) + self.eps, torch.sqrt(var + self.eps)
            scale = std / weight if inverse else weight / std
            logdet = torch.log(scale).sum()
            if inverse:
                return torch.addcmul(mean, inputs - self.bias, scale), added(total, logdet)
            return torch.addcmul(self.bias, inputs - mean, scale), added(total, logdet)


@register("nflows.transforms.standard.PointwiseAffineTransform")
class PointwiseAffine(StepAdapter):
    """``scale x + shift`` with fixed numbers, as standardizes data."""

    class Layer(Step):
        def _step(self, inputs: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
            shift, scale = self._shift, self._scale
            each = inputs[0].numel() if inputs.dim() > 1 and inputs.shape[0] else 0
            if not each or scale.numel() not in (1, each):
                return self._original(inputs, context, inverse, total)
            logdet = torch.log(scale).sum() if scale.numel() > 1 else torch.log(scale).reshape(()) * each
            if inverse:
                return (inputs - shift) / scale, added(total, -logdet)
            return torch.addcmul(shift, inputs, scale), added(total, logdet)
