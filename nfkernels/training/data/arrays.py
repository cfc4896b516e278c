"""uint8 images in numpy's own files, `.npz` and `.npy`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .conform import Part, assemble
from .image_data import DataError, ImageData, need

if TYPE_CHECKING:
    import numpy

_IMAGES = ("images", "x", "x_train", "data", "arr_0")
_LABELS = ("labels", "y", "y_train")
_LARGE_FILE = 2**20  # bytes
_SHAPES = "[N, H, W], [N, H, W, C] or [N, C, H, W] with C from 1 to 4"


def load_arrays(path: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    """Read an `.npz` or `.npy` file; see `load_images` for its keys and shapes.

    Raises:
        DataError: not a numpy file, python objects in it, no images, images that are not uint8 or of a shape that
            cannot be told, labels that do not fit the images, numpy missing.
    """
    numpy = need("numpy", "reading numpy files")
    train: Any
    # Members of an .npz are read when they are asked for, so everything that touches the file stays in here.
    try:
        with path.open("rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            if isinstance(loaded, numpy.ndarray):
                train, test = (_images(path, "the array", loaded), None), None
            else:
                train = _pair(path, loaded, _IMAGES, _LABELS)
                test = _pair(path, loaded, ("x_test",), ("y_test",)) if "x_test" in loaded else None
    except DataError:
        raise
    except MemoryError as error:
        if path.stat().st_size < _LARGE_FILE:  # a damaged header; compression of uint8 images never gains that much
            raise DataError(f"{path} is damaged: its header tells of more than fits into memory ({error})") from error
        raise
    except Exception as error:  # a damaged file may be an error of numpy, zipfile, zlib, tokenize, ...
        raise DataError(f"{path} cannot be read as uint8 images without loading python objects ({error})") from error
    return assemble(str(path), path.stem, train, test, size, channels)


def _pair(path: Path, arrays: Mapping[str, Any], image_keys: tuple[str, ...], label_keys: tuple[str, ...]) -> Part:
    key = next((key for key in image_keys if key in arrays), None)
    if key is None:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"{path} holds {held}: expected images under one of {', '.join(image_keys)}")
    images = _images(path, key, arrays[key])
    label_key = next((key for key in label_keys if key in arrays), None)
    return images, None if label_key is None else _labels(path, label_key, arrays[label_key], len(images))


def _images(path: Path, key: str, array: numpy.ndarray) -> torch.Tensor:
    """A numpy array as uint8 `[N, C, H, W]`."""
    if array.dtype != "uint8":
        raise DataError(f"{path}: {key} is {array.dtype}, expected uint8 (0 to 255): convert it and save it again")
    stated = f"{path}: {key} has shape {list(array.shape)}"
    if array.ndim not in (3, 4):
        raise DataError(f"{stated}, expected {_SHAPES}")
    if array.size == 0:
        raise DataError(f"{stated} and so holds no image")
    images = torch.from_numpy(array)
    if array.ndim == 3:
        if array.shape[2] <= 4:
            raise DataError(f"{stated}, which may be one image [H, W, C] or many [N, H, W]: expected {_SHAPES}")
        return images.unsqueeze(1)
    if array.shape[3] <= 4:
        return images.permute(0, 3, 1, 2)
    if array.shape[1] <= 4:
        return images
    raise DataError(f"{stated}, in which no axis can be the channels: expected {_SHAPES}")


def _labels(path: Path, key: str, array: numpy.ndarray, count: int) -> torch.Tensor:
    if array.dtype.kind not in "iu" or array.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{path}: {key} is {array.dtype} {list(array.shape)}, expected one whole number for each of {count} images"
        )
    return torch.from_numpy(array.astype("int64").reshape(count))
