"""What pictures there are, in a few compact tensors: a folder is listed once, however many millions of files it holds.

A listing knows where each picture lies and what it is called, and opens it; nothing is decoded here. Names are one
blob of bytes with offsets, not objects, so that a listing of millions is small, is written to a file and mapped back
into memory as it is, and costs worker processes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_data import DataError
from .picture import SUFFIXES, File

# What a source was when it was listed: time of change (ns) and size (files only) by path relative to its root.
Stamps = dict[str, list[int]]


@dataclasses.dataclass(eq=False)
class Names:
    """Many names: name ``i`` is the bytes ``blob[starts[i] : starts[i + 1]]``.

    Args:
        blob: uint8.
        starts: int64 `[N + 1]`.
    """

    blob: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.starts[index : index + 2].tolist()
        return os.fsdecode(bytes(self.blob[start:end].tolist()))


class NamesBuilder:
    """Collects names, as bytes, without keeping an object for each."""

    def __init__(self) -> None:
        self._blob, self._starts = bytearray(), array("q", [0])

    def extend(self, names: Iterable[bytes]) -> None:
        blob, starts = self._blob, self._starts
        for name in names:
            blob += name
            starts.append(len(blob))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def names(self) -> Names:
        blob = torch.frombuffer(self._blob, dtype=torch.uint8) if self._blob else torch.empty(0, dtype=torch.uint8)
        return Names(blob, torch.frombuffer(self._starts, dtype=torch.int64))


@dataclasses.dataclass(eq=False)
class Listing:
    """Pictures in their order, with their labels if they have any.

    Args:
        root: the folder or file that was listed.
        classes: names; None without labels.
        labels: int32 `[N]`, or None.
    """

    root: Path
    classes: tuple[str, ...] | None
    labels: Tensor | None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, row: int) -> str:
        """What errors call a picture."""
        raise NotImplementedError

    def open(self, row: int) -> File:
        """A path or an open file. ``DataError`` where the source is not what it was."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Everything but what ``facts`` holds, on the CPU; with it, ``restored`` makes the listing again."""
        return {} if self.labels is None else {"labels": self.labels}

    def facts(self) -> dict[str, Any]:
        """What of the listing is not a tensor, JSON-able, and nothing of the place where it lies."""
        return {"classes": self.classes}

    @classmethod
    def restored(cls, root: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Listing:
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class FolderListing(Listing):
    """Picture files, in the folder or in one sub-folder per class; ``names`` are those within their folder."""

    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.open(row)

    def open(self, row: int) -> str:
        folder = "" if self.labels is None else self.classes[int(self.labels[row])]
        return os.path.join(self.root, folder, self.names[row])

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"blob": self.names.blob, "starts": self.names.starts}

    @classmethod
    def restored(cls, root: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> FolderListing:
        return cls(root, as_classes(facts), tensors.get("labels"), Names(tensors["blob"], tensors["starts"]))


@dataclasses.dataclass
class Entries:
    """What lies in one folder, sorted by name, hidden entries left out."""

    pictures: list[bytes]
    folders: list[bytes]
    shards: list[bytes]  # files that hold many pictures each


SHARD_SUFFIXES = (".tar", ".parquet")
_PICTURES, _SHARDS = (tuple(suffix.encode() for suffix in suffixes) for suffixes in (SUFFIXES, SHARD_SUFFIXES))


def scan(folder: str | os.PathLike[str]) -> Entries:
    """One pass over a folder. ``DataError`` where it cannot be read."""
    found = Entries([], [], [])
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                lower = name.lower()
                if lower.endswith(_PICTURES):
                    if entry.is_file():
                        found.pictures.append(name)
                        continue
                elif lower.endswith(_SHARDS) and entry.is_file():
                    found.shards.append(name)
                    continue
                if entry.is_dir():
                    found.folders.append(name)
    except OSError as error:
        raise DataError(f"{os.fspath(folder)} cannot be listed ({error.strerror})") from error
    for names in (found.pictures, found.folders, found.shards):
        names.sort()
    return found


def stamp(path: Path) -> list[int]:
    """Changes whenever something is added to, removed from or renamed in a folder, or a file is written."""
    status = path.stat()
    return [status.st_mtime_ns, 0 if path.is_dir() else status.st_size]


def list_folder(root: Path, found: Entries, stamps: Stamps) -> FolderListing:
    """The pictures in ``root``, of which ``found`` is what its first scan gave, or in its sub-folders.

    Stamps of the sub-folders are added to ``stamps``.

    Raises:
        DataError: no picture, or pictures beside class folders.
    """
    names, labels = NamesBuilder(), array("i")
    classes: list[str] = []
    for folder in found.folders:
        name = os.fsdecode(folder)
        stamps[name] = stamp(root / name)
        pictures = scan(root / name).pictures
        if not pictures:
            continue
        if found.pictures:
            raise DataError(
                f"{root} holds both pictures ({os.fsdecode(found.pictures[0])}) and sub-folders of pictures ({name}): "
                "expected all pictures in it, or all in one sub-folder per class"
            )
        names.extend(pictures)
        labels.extend(itertools.repeat(len(classes), len(pictures)))
        classes.append(name)
    if classes:
        return FolderListing(root, tuple(classes), torch.frombuffer(labels, dtype=torch.int32), names.names())
    if not found.pictures:
        raise DataError(_nothing(root))
    names.extend(found.pictures)
    return FolderListing(root, None, None, names.names())


def as_classes(facts: dict[str, Any]) -> tuple[str, ...] | None:
    return None if facts["classes"] is None else tuple(facts["classes"])


def _nothing(folder: Path) -> str:
    found = (path.parent.parent for path in sorted(folder.glob("*/*/*")) if path.suffix.lower() in SUFFIXES)
    deeper = next((path for path in found if path.is_dir()), None)
    if deeper:
        return f"{folder} holds pictures only two folders deep: pass one of its sub-folders, such as {deeper}"
    return (
        f"{folder} holds no picture: looked in it and in its sub-folders (one per class) for {', '.join(SUFFIXES)}, in "
        f"it for {' and '.join(SHARD_SUFFIXES)} shards, and for MNIST-style idx files and CIFAR batches"
    )
