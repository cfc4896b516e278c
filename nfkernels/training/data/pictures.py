"""Folders and shards of pictures: found, listed, and read into memory or left to be streamed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_data import DataError, ImageData
from .index_file import kept_listing
from .listing import Listing, Stamps, list_folder, scan, stamp
from .picture import decode, decoding, is_grey
from .shards import ShardListing, list_parquets, list_tars
from .stream import ImageStream

# Decoded bytes up to which a set is read into memory, unless asked for otherwise.
MEMORY = 4 * 2**30
# Names of sub-folders, and beginnings of names of shards, that hold parts.
_PARTS = {"train": ("train", "training"), "validation": ("validation", "valid", "val"), "test": ("test",)}


@dataclasses.dataclass
class _Part:
    listing: Listing
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.listing) if self.rows is None else len(self.rows)

    def first(self) -> int:
        return 0 if self.rows is None else int(self.rows[0])


def load_pictures(
    path: Path, size: tuple[int, int] | None, channels: int | None, *, stream: bool | None, workers: int | None
) -> ImageData | ImageStream:
    """The pictures of a folder or of shards; see `load_images` for what happens to sizes, channels and labels.

    Raises:
        DataError: no picture, pictures beside class folders, sizes that differ with no size asked for, a picture that
            cannot be decoded, channels other than 1 or 3, parts that do not fit together, a library missing.
    """
    if channels not in (None, 1, 3):
        raise DataError(f"{path}: pictures can be read with 1 or 3 channels, not {channels}")
    with decoding():
        parts = _find_parts(path)
        train = parts["train"]
        first = train.listing.open(train.first()), train.listing.name(train.first())
        height, width = size or decode(*first, 1).size[::-1]
        if stream is None:
            stream = sum(map(len, parts.values())) * math.prod((channels or 3, height, width)) > MEMORY
        if channels is None:
            # All headers are looked at only of a set that is read as a whole anyway.
            channels = 1 if not stream and all(map(_all_grey, parts.values())) else 3
    name = path.resolve().name if path.is_dir() else path.stem
    shape, classes = (channels, height, width), _classes(train)

    def streamed(part: _Part, **own: Any) -> ImageStream:
        class_of = _aligned(path, part, classes)
        return ImageStream(part.listing, part.rows, shape, size is not None, classes, class_of, 256, name, **own)

    held = {part: streamed(found) for part, found in parts.items() if part != "train"}
    if "test" not in held and "validation" in held:  # of the one part that is held out, the numbers are reported
        held["test"] = held.pop("validation")
    whole = streamed(train, **held)
    return dataclasses.replace(whole, workers=workers) if stream else whole.load()


def _find_parts(path: Path) -> dict[str, _Part]:
    found = {} if path.is_file() else _part_folders(path)
    if found:
        return {part: _Part(list_pictures(folder)) for part, folder in found.items()}
    listing = list_pictures(path)
    if not isinstance(listing, ShardListing):
        return {"train": _Part(listing)}
    shard_parts = [_part_of(shard) for shard in listing.shards]
    if "train" not in shard_parts or len(set(shard_parts)) == 1:
        return {"train": _Part(listing)}
    if None in shard_parts:
        stray = listing.shards[shard_parts.index(None)]
        raise DataError(
            f"{path}: some shards are named as parts of the set (train, validation, test) but {stray} is not: "
            "rename it or move it away"
        )
    parts = {}
    for part in dict.fromkeys(shard_parts):
        mine = torch.tensor([other == part for other in shard_parts])
        parts[part] = _Part(listing, mine[listing.shard_of_rows().long()].nonzero().flatten())
    return parts


def list_pictures(root: Path) -> Listing:
    """The pictures of one folder, tar file or Parquet file, from the kept listing where that is up to date.

    Raises:
        DataError: there is none, or what is there does not fit together.
    """

    def make() -> tuple[Listing, Stamps]:
        stamps: Stamps = {".": stamp(root)}
        if root.is_file():
            return _list_shards(root, [root.name], stamps), stamps
        found = scan(root)
        shards = [os.fsdecode(name) for name in found.shards]
        if not shards or found.pictures:
            return list_folder(root, found, stamps), stamps
        return _list_shards(root, shards, stamps), stamps

    return kept_listing(root, make)


def _list_shards(root: Path, shards: list[str], stamps: Stamps) -> Listing:
    readers: dict[str, Callable[..., Listing]] = {".tar": list_tars, ".parquet": list_parquets}
    kinds = {Path(shard).suffix.lower() for shard in shards}
    if len(kinds) > 1:
        raise DataError(f"{root} holds both {' and '.join(sorted(kinds))} shards: pass a folder of one kind")
    return readers[kinds.pop()](root, shards, stamps)


def _part_folders(path: Path) -> dict[str, Path]:
    """The sub-folders that are parts; none unless there is one to train on and one that is held out."""
    there = {
        part: next((path / name for name in names if (path / name).is_dir()), None) for part, names in _PARTS.items()
    }
    there = {part: folder for part, folder in there.items() if folder is not None}
    return there if "train" in there and len(there) > 1 else {}


def _part_of(shard: str) -> str | None:
    """Told by a word of the file's name, as in `train-00000-of-00012.parquet` and `imagenet-val-000000.tar`."""
    words = re.split(r"[-_.]", shard.lower())
    return next((part for part, names in _PARTS.items() if any(name in words for name in names)), None)


def _all_grey(part: _Part) -> bool:
    rows = range(len(part)) if part.rows is None else part.rows.tolist()
    return all(is_grey(part.listing.open(row), part.listing.name(row)) for row in rows)


def _classes(train: _Part) -> tuple[str, ...] | None:
    """The listing's, unless its labels say -1: none."""
    labels = _labels(train)
    return None if labels is None or bool((labels < 0).all()) else train.listing.classes


def _labels(part: _Part) -> Tensor | None:
    labels = part.listing.labels
    return labels if labels is None or part.rows is None else labels[part.rows]


def _aligned(path: Path, part: _Part, classes: tuple[str, ...] | None) -> Tensor | None:
    """Which of ``classes`` each class of a part is; None where they are the same.

    Raises:
        DataError: labels in one part only, or a class that is not one of ``classes``.
    """
    labels, where = _labels(part), part.listing.root
    if labels is not None and len(labels) and bool((labels < 0).all()):
        labels = None
    if (labels is None) != (classes is None):
        raise DataError(
            f"{path}: only some of its parts are labelled, and {where} is {'not ' * (labels is None)}one of them: move "
            "it away, or bring all to one layout"
        )
    if labels is None:
        return None
    if int(labels.min()) < 0 or int(labels.max()) >= len(part.listing.classes):
        raise DataError(
            f"{where}: labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to "
            f"{len(part.listing.classes) - 1}, one per class"
        )
    if part.listing.classes == classes:
        return None
    unknown = [name for name in part.listing.classes if name not in classes]
    if unknown:
        raise DataError(f"{where} has a class {unknown[0]}, which the training part does not have")
    place = {name: index for index, name in enumerate(classes)}
    return torch.tensor([place[name] for name in part.listing.classes])
