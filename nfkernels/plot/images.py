"""Images side by side, pixel for pixel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PIXELS = 640  # small images are enlarged by whole factors until the grid is about this large


@style.drawing()
def image_grid(images: Any, *, columns: int | None = None, grey_levels: int = 256, title: str | None = None) -> Figure:
    """Images side by side, row by row: RGB of three channels or more, else grey.

    Of two channels the first is drawn, of more than three the first three. Values 0 .. grey_levels - 1 become black ..
    white. Small images are enlarged by a whole factor; without a title `save` writes exactly these pixels, no other.

    Args:
        images: uint8 ``[N, C, H, W]``, tensor or array: what an image flow's ``sample`` returns.
        columns: images in a row; by default such that the grid is about square.
        grey_levels: of the images, as ``flow.grey_levels``.
        title: above the picture.

    Raises:
        ValueError: another shape or type, values that are not below ``grey_levels``.
        ImportError: no matplotlib.
    """
    pixels = tiles(images, columns=columns, grey_levels=grey_levels)
    made, axes = _pixel_figure(pixels, top=40 if title else 0)
    if title:
        axes.set_title(style.short(title, pixels.shape[1] / style.DPI, 11), parse_math=False)
    return made


@style.drawing()
def interpolation(rows: Any, *, grey_levels: int = 256, title: str | None = None) -> Figure:
    """Ways between pairs of images, a row for each pair; below, how much of the way lies behind.

    Args:
        rows: uint8 ``[R, M, C, H, W]``, tensor or array: R ways of M images each, such as those that a flow decodes on
            the straight line between two latents.
        grey_levels, title: as in `image_grid`.

    Raises:
        ValueError: another shape or type, values that are not below ``grey_levels``.
        ImportError: no matplotlib.
    """
    images = _tensor(rows)
    if images.dim() != 5 or not images.numel():
        raise ValueError(f"rows are {list(images.shape)}: expected [R, M, C, H, W], none of them 0")
    count = images.shape[1]
    pixels = tiles(images.flatten(0, 1), columns=count, grey_levels=grey_levels)
    made, axes = _pixel_figure(pixels, bottom=58, top=40 if title else 0)
    if title:
        axes.set_title(style.short(title, pixels.shape[1] / style.DPI, 11), parse_math=False)
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    every = range(0, count, max(1, -(-count // 12)))
    cell = pixels.shape[1] / count
    shares = [at / max(count - 1, 1) for at in every]
    axes.set_xticks([(at + 0.5) * cell - 0.5 for at in every], [f"{share:.3g}" for share in shares])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("share of the way from the first image's latent to the last one's")
    return made


def _pixel_figure(pixels: Tensor, *, top: int = 0, bottom: int = 0) -> tuple[Figure, Axes]:
    """A figure that shows one pixel for each, with so many free ones above and below."""
    height, width = pixels.shape[:2]
    whole = height + top + bottom
    made = style.figure(width / style.DPI, whole / style.DPI, layout=None)
    axes = made.add_axes((0, bottom / whole, 1, height / whole))
    axes.set_axis_off()
    # As colours: a map of grey would round some values down.
    colours = pixels if pixels.dim() == 3 else pixels[..., None].expand(-1, -1, 3)
    axes.imshow(colours.numpy(), interpolation="nearest", aspect="auto")
    return made, axes


def _tensor(images: Any) -> Tensor:
    """Of arrays that run backwards, too: torch has no negative strides."""
    return images if isinstance(images, Tensor) else torch.as_tensor(numpy.ascontiguousarray(images))


def tiles(images: Any, *, columns: int | None = None, grey_levels: int = 256) -> Tensor:
    """The pixels of `image_grid`, uint8 ``[H, W]`` or ``[H, W, 3]`` on the CPU; same arguments, same errors."""
    images = _tensor(images)
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images are {list(images.shape)}: expected [N, C, H, W], none of them 0")
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: expected uint8, so (255 * x).round().byte() of x in [0, 1]")
    if not 2 <= grey_levels <= 256:
        raise ValueError(f"grey_levels is {grey_levels}: expected 2 .. 256")
    images = images[:, : 3 if images.shape[1] >= 3 else 1].cpu()
    if int(images.max()) >= grey_levels:
        raise ValueError(f"images hold {int(images.max())}: expected values below grey_levels, {grey_levels}")
    count, depth, height, width = images.shape
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}: expected at least 1 image in a row")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    factor = max(1, round(_PIXELS / max(columns * width, rows * height)))
    gap = 2 if factor > 1 else 1
    large = images.float().mul_(255 / (grey_levels - 1)).round_().byte()
    large = large.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor + gap, width * factor + gap
    grid = large.new_full((depth, rows * height + gap, columns * width + gap), 255)
    for index, image in enumerate(large):
        top, left = gap + index // columns * height, gap + index % columns * width
        grid[:, top : top + height - gap, left : left + width - gap] = image
    return grid[0] if depth == 1 else grid.permute(1, 2, 0).contiguous()
