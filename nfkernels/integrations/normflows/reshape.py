"""normflows' layers that only move elements: ``normflows.flows.reshape`` and permutations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter import Adapter
from ..registry import register


@register("normflows.flows.reshape.Squeeze")
class Squeeze(Adapter):
    """Two by two positions and four channels, one copy; ``forward`` undoes the squeeze. The log-determinant is 0."""

    class Layer:
        def forward(self, z):
            if z.dim() != 4 or z.shape[1] % 4 or not z.numel():
                return super().forward(z)
            return F.pixel_shuffle(z, 2), 0

        def inverse(self, z):
            if z.dim() != 4 or z.shape[2] % 2 or z.shape[3] % 2 or not z.numel():
                return super().inverse(z)
            return F.pixel_unshuffle(z, 2), 0


@register("normflows.flows.mixing.Permute")
class Permute(Adapter):
    """A fixed order of channels: a selection in place of advanced indexing, whose gradient accumulates."""

    def refuse(self, module: nn.Module) -> str | None:
        return None if module.mode == "shuffle" else f"mode={module.mode!r}: two slices and one copy, nothing to fuse"

    class Layer:
        def forward(self, z, context=None):
            return z.index_select(1, self.perm), torch.zeros(len(z), device=z.device)

        def inverse(self, z, context=None):
            return z.index_select(1, self.inv_perm), torch.zeros(len(z), device=z.device)
