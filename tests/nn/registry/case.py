"""A layer of the registry: how it is made, and the data it is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nfkernels import nn as N

# Where data or latents are: what takes any number there, and one of its points to another (padding stays zero).
_PLACES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "real": (lambda v: v, lambda z: z + 0.1 * z.square()),
    "positive": (torch.exp, lambda z: z + 0.1 * z.square()),
    "unit": (torch.sigmoid, lambda z: z + 0.1 * z * (1 - z)),
    "symmetric": (torch.tanh, lambda z: z + 0.1 * z * (1 - z.square())),
}


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], N.Bijection]
    shape: tuple[int, ...]  # with the batch
    context: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    domain: str = "real"  # where its data are: "real", "positive", "unit" (0 to 1) or "symmetric" (-1 to 1)
    latent: str = "real"  # and its latents

    def make(self, seed: int = 0) -> N.Bijection:
        """The layer in eval mode, every parameter moved off its start (zero-initialised ones would hide mistakes)."""
        torch.manual_seed(seed)
        layer = self.build().eval()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return layer

    def data(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, dict]:
        generator = torch.Generator().manual_seed(seed)
        x = _PLACES[self.domain][0](torch.randn(self.shape, generator=generator, dtype=torch.float64))
        given: dict = {}
        if self.context is not None:
            given["context"] = torch.randn(self.context, generator=generator, dtype=torch.float64).to(dtype)
        if self.lengths is not None:
            given["lengths"] = torch.tensor(self.lengths)
            x = x * (torch.arange(x.shape[-1]) < given["lengths"][:, None])[:, None]
        return x.to(dtype), given

    def moved(self, z: Tensor) -> Tensor:
        """Latents that no data made."""
        return _PLACES[self.latent][1](z)
