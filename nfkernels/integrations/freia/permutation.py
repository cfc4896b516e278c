"""FrEIA's fixed transforms of the channels: ``FrEIA.modules.fixed_transforms``."""

from __future__ import annotations

import torch
from torch import nn

from ...ops import channel_mix
from ...ops.channel_affine import permute_channels
from ..registry import register
from .layer import FreiaAdapter


@register("FrEIA.modules.fixed_transforms.PermuteRandom")
class PermuteRandom(FreiaAdapter):
    """An order of the channels: its gradient is gathered by the inverse order, not scattered."""

    def refuse(self, module: nn.Module) -> str | None:
        if not torch.equal(module.perm.argsort(), module.perm_inv):
            return "perm_inv is not the inverse of perm"
        return None

    class Layer:
        def forward(self, x, rev=False, jac=True):
            order, inverse = (self.perm_inv, self.perm) if rev else (self.perm, self.perm_inv)
            return [permute_channels(x[0], order, inverse)], 0.0


@register("FrEIA.modules.fixed_transforms.Fixed1x1Conv")
class Fixed1x1Conv(FreiaAdapter):
    """A matrix at every position, kept with its inverse; its log-determinant is one number for the whole batch."""

    class Layer:
        def forward(self, x, rev=False, jac=True):
            data = x[0]
            if data.dim() != 4:
                return super().forward(x, rev, jac)
            logdet = self.logDetM * data.shape[2:].numel()
            matrix = self.M_inv if rev else self.M
            return (channel_mix(data, matrix.flatten(1)),), -logdet if rev else logdet
