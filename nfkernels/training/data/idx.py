"""MNIST-style idx files: a magic number, dimensions, bytes (http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

from .conform import Part, assemble
from .image_data import DataError, ImageData

_BLOCK = 1 << 20


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds idx images under one of their usual names."""
    return any(_find(folder, part, "images") for part in ("train", "t10k"))


def load_idx(folder: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    """Read `train-images-idx3-ubyte` and its labels; the `t10k` pair, where there is one, becomes the test part.

    Raises:
        DataError: a file that is not idx or not of the length that it states, labels that do not fit the images,
            no training images.
    """
    if _find(folder, "train", "images") is None:
        raise DataError(f"{folder} holds t10k images but no train-images-idx3-ubyte[.gz]: add the training files")
    train = _read_part(folder, "train")
    test = _read_part(folder, "t10k") if _find(folder, "t10k", "images") else None
    return assemble(str(folder), folder.resolve().name, train, test, size, channels)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    dims = 3 if kind == "images" else 1
    names = [f"{part}-{kind}{joint}idx{dims}-ubyte{suffix}" for suffix in ("", ".gz") for joint in "-."]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_part(folder: Path, part: str) -> Part:
    path = _find(folder, part, "images")
    images = _read(path, dims=3).unsqueeze(1)
    label_path = _find(folder, part, "labels")
    if label_path is None:
        return images, None
    labels = _read(label_path, dims=1)
    if len(labels) != len(images):
        raise DataError(f"{label_path} holds {len(labels)} labels for the {len(images)} images of {path.name}")
    return images, labels.long()


def _read(path: Path, dims: int) -> torch.Tensor:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise DataError(
                    f"{path} is not an idx{dims}-ubyte file: it starts with {header[:4].hex(' ') or 'nothing'}, "
                    f"expected 00 00 08 {dims:02x} and {dims} dimensions"
                )
            shape = struct.unpack(f">{dims}I", header[4:])
            expected = math.prod(shape)
            # In blocks up to one byte too many: a header may claim, or a gzip file unfold to, far more than is there.
            content = bytearray()
            while len(content) <= expected and (block := file.read(min(_BLOCK, expected + 1 - len(content)))):
                content += block
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): download it again") from error
    stated = " x ".join(map(str, shape))
    if expected == 0:
        raise DataError(f"{path} states {stated} values and so holds nothing: expected at least one")
    if len(content) != expected:
        found = f"only {len(content)}" if len(content) < expected else "more"
        raise DataError(f"{path} states {stated} values ({expected} bytes) but holds {found}: download it again")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)
