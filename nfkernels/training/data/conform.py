"""From what a reader found to an ImageData: one size, one number of channels, one list of classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from .image_data import DataError, ImageData, need

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 256  # images per task: many enough to hide a task's cost, few enough to share work and stop early
_MAX_PAD = 8
# Labels become indices of an embedding; larger numbers are ids of something else (and a name is made for each).
MAX_CLASSES = 65536

Part = tuple[torch.Tensor, torch.Tensor | None]  # uint8 images [N, C, H, W], int64 labels [N]


def parse_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`(height, width)` of an int (square) or a pair; None stays None. DataError for anything else."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise DataError(f"size {size!r}: expected one positive number of pixels, or a pair (height, width)")
    return pair


def in_chunks(work: Callable[[range], None], count: int) -> None:
    """Run `work` over consecutive ranges of 0 .. count - 1 on a few threads; the first range's error is raised."""
    ranges = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(work, ranges):
            pass


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of a Pillow image in `size`'s proportions, resampled to `(height, width)`."""
    from PIL import Image, ImageOps

    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 `[C, H, W]` of an 8-bit Pillow image ("L" or "RGB")."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, -1).permute(2, 0, 1)


def conform(
    images: torch.Tensor, size: tuple[int, int] | None, channels: int | None, source: str, grey_levels: int = 256
) -> torch.Tensor:
    """uint8 `[N, C, H, W]` images in another size and number of channels (None: as they are), contiguous.

    A size larger in both dimensions by an even number of pixels, at most 8, pads with zeros all around (28 x 28 becomes
    32 x 32 as everyone does it with MNIST); any other size resamples a centre crop with Pillow. Grey becomes RGB by
    repetition, RGB becomes grey by Pillow's luma; other changes of channels are a DataError.
    """
    images = _with_channels(images, channels, source)
    if size is None or size == tuple(images.shape[2:]):
        return images.contiguous()
    count, depth, height, width = images.shape
    out = images.new_zeros(count, depth, *size)
    rows, columns = size[0] - height, size[1] - width
    if all(0 < extra <= _MAX_PAD and extra % 2 == 0 for extra in (rows, columns)):
        top, left = rows // 2, columns // 2
        out[:, :, top : top + height, left : left + width] = images
        return out
    pillow = need("PIL.Image", "resizing images")
    need("numpy", "resizing images")  # Tensor.numpy below

    def resize(indices: range) -> None:
        # Channel by channel: Pillow would weigh colour by alpha in a fourth channel, and has no mode for two.
        for index in indices:
            for channel in range(depth):
                plane = pillow.fromarray(images[index, channel].contiguous().numpy())
                out[index, channel] = to_tensor(fit(plane, size))[0]

    in_chunks(resize, count)
    # Lanczos overshoots at edges; Pillow clips at 255, but sets with fewer grey levels end earlier.
    return out.clamp_(max=grey_levels - 1)


def assemble(
    source: str,
    name: str,
    train: Part,
    test: Part | None,
    size: tuple[int, int] | None,
    channels: int | None,
    classes: tuple[str, ...] | None = None,
) -> ImageData:
    """An ImageData of 8-bit parts, conformed; classes not given are "0", "1", ... up to the largest label."""
    if test is not None and (train[1] is None) != (test[1] is None):
        raise DataError(
            f"{source} has labels for only one of its training and test parts: add the others or remove them"
        )
    parts = [part for part in (train, test) if part is not None]
    if classes is None and train[1] is not None:
        classes = _numbered_classes(source, torch.cat([labels for _, labels in parts]))
    data = None
    for images, labels in reversed(parts):  # the test part first: it becomes a field of the other
        data = ImageData(conform(images, size, channels, source), labels, 256, classes, name, test=data)
    return data


def _numbered_classes(source: str, labels: torch.Tensor) -> tuple[str, ...]:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{source}: labels run from {low} to {high}, expected class numbers 0 to {MAX_CLASSES - 1}")
    return tuple(str(number) for number in range(high + 1))


def _with_channels(images: torch.Tensor, channels: int | None, source: str) -> torch.Tensor:
    have = images.shape[1]
    if channels is None or channels == have:
        return images
    if (have, channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    if (have, channels) == (3, 1):
        grey = images.new_empty(len(images), 1, *images.shape[2:])
        weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(1, 3, 1, 1)
        for part, target in zip(images.split(4096), grey.split(4096), strict=True):  # in parts: sums are int32
            target.copy_(((part * weights).sum(1, keepdim=True) + 32768) >> 16)
        return grey
    raise DataError(
        f"{source}: images have {have} channel{'s' * (have != 1)} and cannot be turned into {channels}: leave out "
        "--channels"
    )
