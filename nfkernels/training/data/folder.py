"""A folder of pictures, flat or with one sub-folder per class, decoded with Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .conform import fit, in_chunks, to_tensor
from .image_data import DataError, ImageData, need

if TYPE_CHECKING:
    from PIL import Image

# Pillow reads many more formats, some by running other programs (EPS): only these are opened, whatever a file contains.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")


def load_folder(folder: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    """Read every picture of a folder; see `load_images` for what happens to sizes, channels and labels.

    Raises:
        DataError: no picture, pictures beside class folders, sizes that differ with no size asked for, a picture that
            cannot be decoded, a number of channels other than 1 or 3, Pillow missing.
    """
    if channels not in (None, 1, 3):
        raise DataError(f"{folder}: pictures can be read with 1 or 3 channels, not {channels}")
    pillow = need("PIL.Image", "reading pictures")
    pillow.init()  # here, once: registering the formats is not made for several threads
    with warnings.catch_warnings():
        # Of a picture that is merely large; one twice that size is refused by Pillow itself.
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        return _load(folder, size, channels)


def _load(folder: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    paths, labels, classes = _find(folder)
    if channels is None:
        channels = 1 if all(_is_grey(path) for path in paths) else 3
    first = _decode(paths[0], channels)
    height, width = size or (first.height, first.width)
    images = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)

    def decode(indices: range) -> None:
        for index in indices:
            image = _decode(paths[index], channels)
            if size is None and image.size != first.size:
                raise DataError(
                    f"{folder}: sizes differ ({first.width} x {first.height} of {paths[0].name}, {image.width} x "
                    f"{image.height} of {paths[index].name}): pass --size to bring all pictures to one size"
                )
            images[index] = to_tensor(fit(image, (height, width)))

    in_chunks(decode, len(paths))
    return ImageData(images, labels, 256, classes, folder.resolve().name)


def _find(folder: Path) -> tuple[list[Path], torch.Tensor | None, tuple[str, ...] | None]:
    flat = _pictures(folder)
    by_class = {sub.name: _pictures(sub) for sub in _entries(folder) if sub.is_dir()}
    by_class = {name: paths for name, paths in by_class.items() if paths}
    if flat and by_class:
        raise DataError(
            f"{folder} holds both pictures ({flat[0].name}) and sub-folders of pictures ({next(iter(by_class))}): "
            "expected all pictures in it, or all in one sub-folder per class"
        )
    if by_class:
        labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        return [path for paths in by_class.values() for path in paths], torch.tensor(labels), tuple(by_class)
    if not flat:
        deeper = next((path.parent.parent for path in sorted(folder.glob("*/*/*")) if _is_picture(path)), None)
        if deeper:
            raise DataError(
                f"{folder} holds pictures only two folders deep: pass one of its sub-folders, such as {deeper}"
            )
        raise DataError(
            f"{folder} holds no picture: looked in it and in its sub-folders (one per class) for "
            f"{', '.join(SUFFIXES)}, and for MNIST-style idx files and CIFAR batches"
        )
    return flat, None, None


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if _is_picture(path)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_grey(path: Path) -> bool:
    with _open(path) as image:  # the header only: pixels are decoded later
        return image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(path, formats=FORMATS)
    except Exception as error:
        raise _unreadable(path, error) from error


def _decode(path: Path, channels: int) -> Image.Image:
    """The picture, upright, in mode "L" or "RGB" (alpha dropped, the first frame of an animation)."""
    from PIL import ImageOps

    with _open(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            return _in_8_bits(upright, path).convert("L" if channels == 1 else "RGB")
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise _unreadable(path, error) from error


def _in_8_bits(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise DataError(f"{path} holds floating-point values: expected 8 or 16 bits, save it as one of those")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # straight to RGB, Pillow warns about the transparency
    if not image.mode.startswith("I"):
        return image
    # 16 bits of grey: Pillow's own conversion cuts off at 255 and leaves white; the high byte is what a viewer shows.
    wide = image.convert("I")
    low, high = wide.getextrema()
    if low < 0 or high > 65535:
        raise DataError(f"{path} holds values from {low} to {high}: expected 8 or 16 bits, save it as one of those")
    return wide.point(lambda value: value * (1 / 256)).convert("L")


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} cannot be read as a picture ({reason}): repair or remove it")
