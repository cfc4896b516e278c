"""`read_table`: numbers in rows and named columns, from CSV, `.npy` or Parquet."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ..._nearest import did_you_mean_path
from .column_names import chosen, no_numbers, numbered
from .csv_table import read_csv
from .image_data import DataError, need

CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_ACCEPTED = "a table: .csv, .tsv, .txt, .npy [N, D] or .parquet"


@dataclasses.dataclass(frozen=True, eq=False)
class RawTable:
    """What a file holds, nothing done to it yet.

    Args:
        names: of the columns, all different.
        values: float64 `[N, D]`; NaN where a value is missing.
        name: what reports call the table.
        named: whether the names are the file's own; else they are x1, x2, ...
    """

    names: tuple[str, ...]
    values: numpy.ndarray
    name: str
    named: bool

    def __len__(self) -> int:
        return len(self.values)


def read_table(
    path: str | os.PathLike[str], *, columns: Sequence[str] | None = None, header: bool | None = None
) -> RawTable:
    """Reads a table of numbers into memory as float64.

    - CSV (``.csv``, ``.tsv``, ``.txt``, ``.dat``): UTF-8; cells between commas, semicolons, tabs, bars or blanks, with
      or without quotes; an empty cell, ``NA``, ``NaN``, ``null``, ``None`` or ``?`` is a missing value. The first line
      holds names if one of its cells is no number.
    - ``.npy``: numbers `[N, D]`, or one axis of records whose fields are the columns. Never a pickle.
    - Parquet: columns of numbers or booleans (needs pyarrow).

    Args:
        path: of the file.
        columns: the columns to read, in this order; None for all. Others may then hold anything.
        header: of a CSV file, whether its first line holds names; None looks.

    Raises:
        DataError: the file is missing, of another kind, damaged or empty; a column is not there, is there twice or
            holds something that is no number (named, with its line).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist: {did_you_mean_path(path) or f'expected {_ACCEPTED}'}")
    if path.is_dir():
        raise DataError(f"{path} is a folder: expected {_ACCEPTED}")
    suffix = path.suffix.lower()
    if suffix in CSV_SUFFIXES:
        names, values, named = read_csv(path, columns, header)
    elif header is not None:
        raise DataError(f"{path}: --header and --no-header are for CSV files, leave them out")
    elif suffix == ".npy":
        names, values, named = _read_npy(path, columns)
    elif suffix in _PARQUET_SUFFIXES:
        names, values, named = _read_parquet(path, columns)
    else:
        raise DataError(f"{path} is not a kind of file that is known: expected {_ACCEPTED}")
    if not len(values):
        raise DataError(f"{path} has no rows of numbers")
    return RawTable(tuple(names), values, path.stem, named)


def _read_npy(path: Path, columns: Sequence[str] | None) -> tuple[list[str], numpy.ndarray, bool]:
    try:
        array = numpy.load(path, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever numpy makes of a damaged header
        raise DataError(f"{path} cannot be read as an array without loading python objects ({error})") from error
    if not isinstance(array, numpy.ndarray):
        raise DataError(f"{path} is an .npz file by another name: expected one array of numbers [N, D]")
    if array.dtype.names and array.ndim == 1:
        names = list(array.dtype.names)
        parts = [array[names[at]] for at in chosen(path, names, columns)]
        wrong = next((part.dtype for part in parts if part.dtype.kind not in "biuf" or part.ndim != 1), None)
        if wrong is not None:
            raise DataError(f"{path}: a field is {wrong}, expected numbers: choose others with --columns")
        names = names if columns is None else list(columns)
        return names, numpy.stack([part.astype(numpy.float64) for part in parts], 1), True
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise DataError(f"{path} is {array.dtype} {list(array.shape)}: expected numbers [N, D], a row per sample")
    if not array.shape[1]:
        raise DataError(f"{path} has no columns")
    names = numbered(array.shape[1])
    places = chosen(path, names, columns)
    return [names[at] for at in places], array[:, places].astype(numpy.float64), False


def _read_parquet(path: Path, columns: Sequence[str] | None) -> tuple[list[str], numpy.ndarray, bool]:
    parquet = need("pyarrow.parquet", "reading Parquet tables", "stream")
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            places = chosen(path, schema.names, columns)
            if not places:
                raise DataError(f"{path} has no columns")
            names = [schema.names[at] for at in places]
            _refuse_text(path, [(name, schema.field(at).type) for name, at in zip(names, places)], pyarrow.types)
            table = file.read(columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file ({error})") from error
    parts = [_floats(table.column(name), pyarrow) for name in names]
    return names, numpy.stack(parts, 1), True


def _refuse_text(path: Path, fields: list[tuple[str, Any]], types: Any) -> None:
    def is_number(kind: Any) -> bool:
        known = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
        return any(fits(kind) for fits in known)

    wrong = [(name, kind) for name, kind in fields if not is_number(kind)]
    if wrong:
        rest = [name for name, kind in fields if is_number(kind)]
        raise DataError(no_numbers(path, [f"{name!r} is {kind}" for name, kind in wrong], rest))


def _floats(column: Any, pyarrow: Any) -> numpy.ndarray:
    if pyarrow.types.is_boolean(column.type):  # there is no way from there to a float
        column = column.cast(pyarrow.int8())
    return column.cast(pyarrow.float64(), safe=False).to_numpy().astype(numpy.float64)
