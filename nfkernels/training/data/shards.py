"""Many pictures in few files: tar shards in WebDataset's layout, and Parquet shards.

Tar shards are read with the standard library: a shard is gone through once, member by member, and from then on every
picture is a place in a file. (WebDataset's own readers stream, and cannot continue in the middle of an epoch.)
Parquet shards are read with pyarrow, a whole row group at a time; a few row groups are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import posixpath
import tarfile
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conform import MAX_CLASSES
from .image_data import DataError, need
from .listing import Listing, Names, NamesBuilder, Stamps, as_classes, stamp
from .picture import SUFFIXES

# Of row groups that are mixed with each other in one stretch of an epoch, and so are kept in memory by every worker.
_WINDOW_ROWS, _WINDOW_BYTES = (1024, 16384), 2**28
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels")


@dataclasses.dataclass(eq=False)
class ShardListing(Listing):
    """``shards`` are file names in the root, or the root's own name where that is one file."""

    shards: tuple[str, ...]

    def path(self, shard: int) -> Path:
        return self.root / self.shards[shard] if self.root.is_dir() else self.root

    def shard_of_rows(self) -> Tensor:
        """int `[N]`."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"shards": self.shards}


class _Opened:
    """Open files and row groups of one process; another process (a forked worker) opens its own."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.files: dict[int, Any] = {}
        self.groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.rows = 0


class _Opens:
    """Gives a listing its process's open files, which are left behind when it is copied to another process."""

    def _here(self) -> _Opened:
        opened = self.__dict__.get("_opened")
        if opened is None or opened.process != os.getpid():
            opened = self.__dict__["_opened"] = _Opened()
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


# --- tar ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class TarListing(_Opens, ShardListing):
    """Members of tar files.

    Args:
        names: of the members.
        shard: int32 `[N]`.
        offset, size: int64 `[N]`, of a member's content in its shard.
    """

    names: Names
    shard: Tensor
    offset: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, row: int) -> str:
        return f"{self.names[row]} in {self.path(int(self.shard[row]))}"

    def open(self, row: int) -> io.BytesIO:
        shard, size = int(self.shard[row]), int(self.size[row])
        try:
            opened = self._here()
            with opened.lock:
                if shard not in opened.files:
                    opened.files[shard] = self.path(shard).open("rb")
                file = opened.files[shard]
                file.seek(int(self.offset[row]))
                content = file.read(size)
        except OSError as error:
            raise DataError(f"{self.path(shard)} cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise DataError(f"{self.path(shard)} has become shorter since it was listed: start again")
        return io.BytesIO(content)

    def shard_of_rows(self) -> Tensor:
        return self.shard

    def tensors(self) -> dict[str, Tensor]:
        own = {"blob": self.names.blob, "starts": self.names.starts}
        return super().tensors() | own | {"shard": self.shard, "offset": self.offset, "size": self.size}

    @classmethod
    def restored(cls, root: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> TarListing:
        names = Names(tensors["blob"], tensors["starts"])
        places = tensors["shard"], tensors["offset"], tensors["size"]
        return cls(root, as_classes(facts), tensors.get("labels"), tuple(facts["shards"]), names, *places)


def list_tars(root: Path, shards: list[str], stamps: Stamps) -> TarListing:
    """The pictures in tar files, and the class numbers in their ``.cls`` members of the same key.

    Raises:
        DataError: a file that is not a tar file, is compressed or cut off; no picture; labels for only some of them.
    """
    names, shard_of, offsets, sizes, labels = NamesBuilder(), array("i"), array("q"), array("q"), array("i")
    for number, shard in enumerate(shards):
        path = root / shard if root.is_dir() else root
        stamps[shard if root.is_dir() else "."] = stamp(path)
        for key, pictures, label in _samples(path):
            if label is not None and len(labels) == len(names):
                labels.extend([label] * len(pictures))
            elif pictures and (label is not None or labels):
                has = "no" if label is None else "a"
                raise DataError(f"{path}: {key} has {has} .cls label, unlike the pictures before it")
            for member in pictures:
                names.extend([os.fsencode(member.name)])
                shard_of.append(number)
                offsets.append(member.offset_data)
                sizes.append(member.size)
    if not len(names):
        raise DataError(f"{root}: the tar files hold no picture: looked for {', '.join(SUFFIXES)}")
    known = _tensor(labels, torch.int32) if labels else None
    places = _tensor(shard_of, torch.int32), _tensor(offsets, torch.int64), _tensor(sizes, torch.int64)
    return TarListing(root, numbered(root, known), known, tuple(shards), names.names(), *places)


def _samples(path: Path) -> Iterator[tuple[str, list[tarfile.TarInfo], int | None]]:
    """Key, picture members and label of consecutive members with one key: all of the path up to the first dot."""
    end = path.stat().st_size
    key, label = None, None
    pictures: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold all members of the shard
                folder, base = posixpath.split(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                if member.offset_data + member.size > end:
                    raise DataError(f"{path} is cut off in {member.name}: copy or download it again")
                now = posixpath.join(folder, base.split(".")[0])
                if now != key:
                    if pictures:
                        yield key, pictures, label
                    key, pictures, label = now, [], None
                if base.lower().endswith(SUFFIXES):
                    pictures.append(member)
                elif base.lower().endswith(".cls"):
                    label = _class_number(path, member, tar.extractfile(member).read(32))
            if pictures:
                yield key, pictures, label
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar file ({error}): unpack it or download it again"
        ) from error


def _class_number(path: Path, member: tarfile.TarInfo, text: bytes) -> int:
    if not text.strip().isdigit() or int(text) >= MAX_CLASSES:
        raise DataError(f"{path}: {member.name} holds {text!r}, expected a class number from 0 to {MAX_CLASSES - 1}")
    return int(text)


# --- Parquet --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class ParquetListing(_Opens, ShardListing):
    """Rows of Parquet files.

    Args:
        columns: where pictures and, if any, labels are.
        group_shard, group_number: int32 `[G]`: row group g is the group_number[g]-th of its shard.
        group_starts: int64 `[G + 1]`: rows of group g are group_starts[g] to group_starts[g + 1] - 1.
        window: rows that an epoch mixes with each other.
    """

    columns: tuple[str, ...]
    group_shard: Tensor
    group_number: Tensor
    group_starts: Tensor
    window: int

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    def _group_of(self, row: int) -> int:
        return int(torch.searchsorted(self.group_starts, row, right=True)) - 1

    def name(self, row: int) -> str:
        group = self._group_of(row)
        shard = int(self.group_shard[group])
        first = int(torch.searchsorted(self.group_shard, shard))  # row groups are in the order of their shards
        return f"row {row - int(self.group_starts[first])} of {self.path(shard)}"

    def open(self, row: int) -> io.BytesIO:
        group = self._group_of(row)
        opened = self._here()
        with opened.lock:
            rows = opened.groups.get(group)
            if rows is None:
                rows = opened.groups[group] = self._read(opened, group)
                opened.rows += len(rows)
                # Rows of one window can lie in as many groups as together hold this many.
                most = self.window + int(self.group_starts.diff().max())
                while opened.rows > most and len(opened.groups) > 1:
                    opened.rows -= len(opened.groups.popitem(last=False)[1])
            opened.groups.move_to_end(group)
        content = rows[row - int(self.group_starts[group])].as_py()
        if content is None:
            raise DataError(f"{self.name(row)} holds no picture: remove the row")
        return io.BytesIO(content)

    def _read(self, opened: _Opened, group: int) -> Any:
        """The encoded pictures of a row group, a pyarrow array of bytes."""
        parquet = need("pyarrow.parquet", "reading Parquet files", extra="stream")
        compute = need("pyarrow.compute", "reading Parquet files", extra="stream")
        types = need("pyarrow.types", "reading Parquet files", extra="stream")
        shard = int(self.group_shard[group])
        try:
            if shard not in opened.files:
                opened.files[shard] = parquet.ParquetFile(self.path(shard), pre_buffer=False)
            number = int(self.group_number[group])
            # Without threads: those of a process do not survive in its forks.
            column = opened.files[shard].read_row_group(number, [self.columns[0]], use_threads=False).column(0)
            return compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
        except Exception as error:  # pyarrow's own kinds of OSError, ValueError, KeyError, ...
            raise DataError(f"{self.path(shard)} cannot be read ({error}): download it again") from error

    def shard_of_rows(self) -> Tensor:
        return self.group_shard.repeat_interleave(self.group_starts.diff())

    def tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("group_shard", "group_number", "group_starts")}
        return super().tensors() | own

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"columns": self.columns, "window": self.window}

    @classmethod
    def restored(cls, root: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> ParquetListing:
        groups = [tensors[name] for name in ("group_shard", "group_number", "group_starts")]
        own = tuple(facts["columns"]), *groups, facts["window"]
        return cls(root, as_classes(facts), tensors.get("labels"), tuple(facts["shards"]), *own)


def list_parquets(root: Path, shards: list[str], stamps: Stamps) -> ParquetListing:
    """The rows of Parquet files with a column ``image`` (or ``img``) of encoded pictures and, if any, ``label``.

    Raises:
        DataError: pyarrow missing, a damaged file, other columns than expected, no rows, labels that are not whole.
    """
    parquet = need("pyarrow.parquet", "reading Parquet files", extra="stream")
    shard_of, numbers, starts, labels, size = array("i"), array("i"), array("q", [0]), [], 0
    columns = classes = None
    for number, shard in enumerate(shards):
        path = root / shard if root.is_dir() else root
        stamps[shard if root.is_dir() else "."] = stamp(path)
        try:
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                schema, metadata = file.schema_arrow, file.metadata
                found = _columns(path, schema)
                if columns is None:
                    columns, classes = found, _class_names(schema, found)
                if found != columns:
                    raise DataError(f"{path} has the columns {found}, but {root / shards[0]} has {columns}")
                for group in range(metadata.num_row_groups):
                    shard_of.append(number)
                    numbers.append(group)
                    starts.append(starts[-1] + metadata.row_group(group).num_rows)
                    size += metadata.row_group(group).total_byte_size
                if len(columns) > 1:
                    values = file.read([columns[1]], use_threads=False).column(0)
                    if values.null_count:
                        raise DataError(f"{path}: {values.null_count} rows have no {columns[1]}")
                    labels.append(torch.from_numpy(values.cast("int32").to_numpy().copy()))
        except DataError:
            raise
        except Exception as error:  # pyarrow's own kinds of OSError, ValueError, ...
            raise DataError(f"{path} cannot be read as a Parquet file ({error}): download it again") from error
    if not starts[-1]:
        raise DataError(f"{root}: the Parquet files hold no row")
    known = torch.cat(labels) if labels else None
    least, most = _WINDOW_ROWS
    window = min(most, max(least, _WINDOW_BYTES * starts[-1] // max(size, 1)))
    groups = _tensor(shard_of, torch.int32), _tensor(numbers, torch.int32), _tensor(starts, torch.int64)
    if known is not None and classes is None:
        classes = numbered(root, known)
    return ParquetListing(root, classes, known, tuple(shards), columns, *groups, window)


def _columns(path: Path, schema: Any) -> tuple[str, ...]:
    """Names of the picture column and, if there is one, the label column."""
    pyarrow = need("pyarrow", "reading Parquet files", extra="stream")
    types = pyarrow.types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_pictures(name: str) -> bool:
        kind = schema.field(name).type
        if types.is_struct(kind):
            return any(part.name == "bytes" and is_bytes(part.type) for part in kind)
        return is_bytes(kind)

    image = next((name for name in _IMAGE_COLUMNS if name in schema.names and holds_pictures(name)), None)
    if image is None:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names) or '(none)'}: expected encoded pictures in a column "
            f"{' or '.join(_IMAGE_COLUMNS)}, as bytes or as a struct with a field of bytes"
        )
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    if label is None:
        return (image,)
    if not types.is_integer(schema.field(label).type):
        raise DataError(f"{path}: {label} is of type {schema.field(label).type}, expected whole numbers")
    return image, label


def _class_names(schema: Any, columns: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names that the `datasets` library leaves in a file's metadata; None where there are none."""
    if len(columns) < 2:
        return None
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][columns[1]]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if known else None


# --- both -----------------------------------------------------------------------------------------------------------


def numbered(root: Path, labels: Tensor | None) -> tuple[str, ...] | None:
    """Classes "0", "1", ... up to the largest label; None without labels. Labels of -1 mean that there is none."""
    if labels is None:
        return None
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= MAX_CLASSES:
        raise DataError(f"{root}: labels run from {low} to {high}, expected class numbers 0 to {MAX_CLASSES - 1}")
    return tuple(str(number) for number in range(high + 1))


def _tensor(values: array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
