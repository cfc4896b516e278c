"""One picture file, decoded with Pillow: what is opened, and what is made of its modes, tags and damages."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from .image_data import DataError, need

if TYPE_CHECKING:
    from PIL import Image

# Pillow reads many more formats, some by running other programs (EPS): only these are opened, whatever a file contains.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")

File = str | os.PathLike[str] | IO[bytes]


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Around all decoding of pictures: Pillow is there and ready for threads, and large pictures are no warning.

    Raises:
        DataError: Pillow is missing.
    """
    pillow = need("PIL.Image", "reading pictures")
    pillow.init()  # here, once: registering the formats is not made for several threads
    with warnings.catch_warnings():
        # Of a picture that is merely large; one twice that size is refused by Pillow itself.
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        yield


def is_grey(file: File, name: str) -> bool:
    """Whether a picture has one channel; ``name`` is what errors call it."""
    with _open(file, name) as image:  # the header only: pixels are decoded later
        return image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")


def _open(file: File, name: str) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(file, formats=FORMATS)
    except Exception as error:
        raise _unreadable(name, error) from error


def decode(file: File, name: str, channels: int) -> Image.Image:
    """The picture, upright, in mode "L" or "RGB" (alpha dropped, the first frame of an animation).

    Raises:
        DataError: it cannot be read; the sentence calls it ``name``.
    """
    from PIL import ImageOps

    with _open(file, name) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            return _in_8_bits(upright, name).convert("L" if channels == 1 else "RGB")
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise _unreadable(name, error) from error


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise DataError(f"{name} holds floating-point values: expected 8 or 16 bits, save it as one of those")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # straight to RGB, Pillow warns about the transparency
    if not image.mode.startswith("I"):
        return image
    # 16 bits of grey: Pillow's own conversion cuts off at 255 and leaves white; the high byte is what a viewer shows.
    wide = image.convert("I")
    low, high = map(int, wide.getextrema())  # type: ignore[arg-type]  # of one channel: two numbers
    if low < 0 or high > 65535:
        raise DataError(f"{name} holds values from {low} to {high}: expected 8 or 16 bits, save it as one of those")
    return wide.point(lambda value: value * (1 / 256)).convert("L")


def _unreadable(name: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].split(" <_io.")[0] if str(error) else type(error).__name__
    return DataError(f"{name} cannot be read as a picture ({reason}): repair or remove it")
