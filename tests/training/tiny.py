"""Flows and image sets small enough that a test trains them in a second."""

from __future__ import annotations

import torch

from nfkernels.models import Glow
from nfkernels.nn import MLP, AffineCoupling, Chain, Flow, StandardNormal
from nfkernels.training import ImageData

QUICK = {"batch_size": 8, "validate_every": 5, "validation_draws": 2, "log_every": 3, "warmup": 3, "lr": 5e-3}


def stripes(count: int, *, seed: int = 0, labels: bool = False) -> ImageData:
    """Images 1 x 4 x 4 of 5 grey levels: bright rows or bright columns (the class), with noise."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 2, (count,), generator=generator)
    line = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randint(0, 2, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    for image, k, at in zip(images[:, 0], kind.tolist(), line.tolist(), strict=True):
        (image if k == 0 else image.T)[at] += 3
    if labels:
        return ImageData(images, kind, 5, ("rows", "columns"), "stripes")
    return ImageData(images, None, 5, None, "stripes")


def glow(*, seed: int = 0, classes: int | None = None, dropout: float = 0.2) -> Glow:
    torch.manual_seed(seed)
    return Glow((1, 4, 4), levels=1, steps=2, hidden=8, grey_levels=5, dropout=dropout, classes=classes)


def tabular(*, seed: int = 0, context: int = 0) -> Flow:
    torch.manual_seed(seed)
    layers = [AffineCoupling(MLP(1, 16, 2, context_channels=context), identity=side) for side in ("first", "second")]
    return Flow(Chain(layers), StandardNormal(2))
