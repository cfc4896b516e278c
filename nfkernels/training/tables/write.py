"""Columns into a CSV, `.npy` or Parquet file: whole, or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy

from ..._atomic import atomic_write
from ..data.image_data import need
from ..errors import TrainingError


def check_out(path: str | os.PathLike[str]) -> Path:
    """``TrainingError`` where no table can be written there, told before there is one."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise TrainingError(f"--out {path}: expected a name that ends in .csv, .npy or .parquet")
    if path.suffix.lower() == ".parquet":
        need("pyarrow.parquet", "writing Parquet tables", "stream")
    return path


def write_table(path: Path, columns: Mapping[str, numpy.ndarray], digits: Mapping[str, int] | None = None) -> None:
    """``columns`` (`[N]` float64 or int64 each) in their order. In a ``.npy`` file they are `[N, D]` float64 without
    their names; in CSV a real column has so many significant ``digits`` (by default 9).

    Raises ``OSError`` where the file cannot be written; until it is whole, the path keeps what it held.
    """
    with atomic_write(path) as temporary:
        _WRITERS[path.suffix.lower()](temporary, columns, digits or {})


def _csv(path: Path, columns: Mapping[str, numpy.ndarray], digits: Mapping[str, int]) -> None:
    def words(name: str, values: numpy.ndarray) -> list[str]:
        if values.dtype.kind == "i":
            return [str(value) for value in values.tolist()]
        form = f".{digits.get(name, 9)}g"
        return [format(value, form) for value in values.tolist()]

    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(words(name, values) for name, values in columns.items()), strict=True))


def _npy(path: Path, columns: Mapping[str, numpy.ndarray], digits: Mapping[str, int]) -> None:
    with open(path, "wb") as file:
        numpy.save(file, numpy.stack([values.astype(numpy.float64) for values in columns.values()], 1))


def _parquet(path: Path, columns: Mapping[str, numpy.ndarray], digits: Mapping[str, int]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}), path)


_WRITERS: dict[str, Callable] = {".csv": _csv, ".npy": _npy, ".parquet": _parquet}
