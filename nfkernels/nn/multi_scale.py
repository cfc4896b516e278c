"""The multi-scale architecture: after every level but the last, half of the channels are done and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bijection import Bijection, refuse_lengths


class MultiScale(Bijection):
    """Levels of a flow; after each but the last, the last ``C // 2`` channels leave. ``[B, *shape] -> [B, D]``.

    Args:
        levels: bijections on ``[B, C, *spatial]``, coarser and coarser.
        shapes: the output shape ``(C, *spatial)`` of every level, before its half leaves.

    Dimension is kept: z is flat, the latents of the first level first; :meth:`split` gives them back in shape. Raises
    ``ValueError`` without one shape for each level, and for ``lengths``.
    Reference: Dinh et al. 2017 (RealNVP), section 3.6.
    """

    levels: Any  # nn.ModuleList, whose elements no type checker knows

    def __init__(self, levels: Sequence[Bijection], shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if not levels or len(levels) != len(shapes):
            raise ValueError(f"MultiScale needs one output shape per level: {len(levels)} levels, {len(shapes)} shapes")
        self.levels = torch.nn.ModuleList(levels)
        self.shapes = [tuple(shape) for shape in shapes]
        self.latent_shapes = [(c // 2, *rest) for c, *rest in self.shapes[:-1]] + [self.shapes[-1]]
        self.sizes = [torch.Size(shape).numel() for shape in self.latent_shapes]

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        refuse_lengths(lengths, "MultiScale")
        total, leaving = None, []
        for level, latent in zip(self.levels, self.latent_shapes, strict=True):
            x, logdet = level(x, context)
            total = logdet if total is None else total + logdet
            kept = x.shape[1] - latent[0]
            leaving.append(x.narrow(1, kept, latent[0]).flatten(1))
            x = x.narrow(1, 0, kept)
        return torch.cat(leaving, 1), total

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        refuse_lengths(lengths, "MultiScale")
        total, x = None, None
        for level, latent in zip(reversed(self.levels), reversed(self.split(z)), strict=True):
            x = latent if x is None else torch.cat([x, latent], 1)
            x, logdet = level.inverse(x, context)
            total = logdet if total is None else total + logdet
        return x, total

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        refuse_lengths(lengths, "MultiScale")
        leaving = []
        for level, latent in zip(self.levels, self.latent_shapes, strict=True):
            x = level.initialize(x, context)
            kept = x.shape[1] - latent[0]
            leaving.append(x.narrow(1, kept, latent[0]).flatten(1))
            x = x.narrow(1, 0, kept)
        return torch.cat(leaving, 1)

    @property
    def uses_context(self) -> bool:
        return any(level.uses_context for level in self.levels)

    def split(self, z: Tensor) -> list[Tensor]:
        """The latents of every level, each ``[B, c, *spatial]`` (views of ``z [B, D]``)."""
        if z.dim() != 2 or z.shape[1] != sum(self.sizes):
            raise ValueError(f"this flow has latents [B, {sum(self.sizes)}], got a tensor of shape {tuple(z.shape)}")
        return [v.unflatten(1, s) for v, s in zip(z.split(self.sizes, 1), self.latent_shapes, strict=True)]
