"""FrEIA's ActNorm: ``FrEIA.modules.invertible_resnet.ActNorm``."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...ops import channel_affine
from ..registry import register
from .layer import FreiaAdapter


@register("FrEIA.modules.invertible_resnet.ActNorm")
class ActNorm(FreiaAdapter):
    """``x exp(scale) + bias`` per channel. Whether a batch still has to initialize it is a plain attribute."""

    def pays_from(self, module: nn.Module) -> float:
        return math.inf

    def refuse(self, module: nn.Module) -> str | None:
        if set(module._parameters) != {"scale", "bias"} or not hasattr(module, "init_on_next_batch"):
            return "an ActNorm of another version, with other parameters than scale and bias"
        return None

    def ready(self, module: nn.Module) -> bool:
        return not module.init_on_next_batch

    class Layer:
        def forward(self, x, rev=False, jac=True):
            data = x[0]
            if self.init_on_next_batch or data.dim() != self.scale.dim() or data.shape[1] != self.scale.shape[1]:
                return super().forward(x, rev, jac)
            pixels = 1
            for size in self.dims_in[1:]:  # of the size that the layer was made for, as in the original
                pixels *= size
            logdet = self.scale.sum() * (-pixels if rev else pixels)
            scale, bias = self.scale.flatten(), self.bias.flatten()
            if rev:
                scale = torch.exp(-scale)
                bias = -bias * scale
            else:
                scale = torch.exp(scale)
            return [channel_affine(data, scale, bias)], logdet.expand(data.shape[0]).clone()
