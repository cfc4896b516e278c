"""Grids of images as files, the very pixels of ``nfkernels.plot.image_grid``: one byte for each, or three."""

from __future__ import annotations

import os

from torch import Tensor

from .._atomic import atomic_write
from ..plot.images import tiles
from .data.image_data import need


def write_grid(
    path: str | os.PathLike[str], images: Tensor, *, grey_levels: int = 256, columns: int | None = None
) -> None:
    """Writes uint8 images ``[N, C, H, W]`` side by side as a PNG, atomically; arguments as of ``image_grid``.

    Raises:
        DataError: Pillow is not installed. ValueError: images of another shape. OSError: the file cannot be written.
    """
    pillow = need("PIL.Image", "writing pictures")
    pixels = tiles(images, grey_levels=grey_levels, columns=columns)
    picture = pillow.frombytes("RGB" if pixels.dim() == 3 else "L", pixels.shape[1::-1], pixels.numpy().tobytes())
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
