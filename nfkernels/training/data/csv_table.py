"""CSV files of numbers: which separator, names or none, and what is in the way of reading them."""

from __future__ import annotations

import csv
import itertools
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy

from .column_names import chosen, no_numbers, numbered
from .image_data import DataError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "<na>", "#n/a"})
# In this order: a cell of a table between semicolons may hold a decimal comma, hardly ever the other way round.
_SEPARATORS = ("\t", ";", "|", ",")
_LOOKED_AT = 50  # lines from which the separator is told
_LONGEST_CELL = 40  # characters of a cell that a message shows


def read_csv(path: Path, columns: Sequence[str] | None, header: bool | None) -> tuple[list[str], numpy.ndarray, bool]:
    """Names, float64 `[N, D]` and whether the names are the file's own; see ``read_table``."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = [line for line in itertools.islice(file, _LOOKED_AT) if line.strip()]
        separator = _separator(head)
        names, named = _names(path, next(_rows(head, separator), None), header)
        places = chosen(path, names, columns)
        with open(path, encoding="utf-8-sig", newline="") as file:
            values = _quickly(file, separator, named, None if columns is None else places)
        if values is None or (columns is None and values.shape[1] != len(names)):
            with open(path, encoding="utf-8-sig", newline="") as file:
                values = _cell_by_cell(path, file, separator, names, named, places)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error})") from error
    return [names[at] for at in places], values, named


def _separator(lines: list[str]) -> str | None:
    """The one that cuts all of the first lines into equally many cells, or most of them; None for blanks."""
    best, agreed = None, 0.0
    for separator in _SEPARATORS:
        counts = Counter(len(row) for row in _rows(lines, separator))
        width, times = counts.most_common(1)[0] if counts else (1, 0)
        if width > 1 and times / sum(counts.values()) > agreed:
            best, agreed = separator, times / sum(counts.values())
    if best is None and any(len(line.split()) > 1 for line in lines) and '"' not in "".join(lines):
        return None
    return best or ","


def _rows(lines: Iterable[str], separator: str | None) -> Iterator[list[str]]:
    """The cells of every line that has any, without the blanks around them."""
    cells: Iterable[list[str]]
    if separator is None:
        cells = (line.split() for line in lines)
    else:
        cells = csv.reader(lines, delimiter=separator, skipinitialspace=separator != "\t")
    return ([cell.strip() for cell in row] for row in cells if any(cell.strip() for cell in row) or len(row) > 1)


def _names(path: Path, first: list[str] | None, header: bool | None) -> tuple[list[str], bool]:
    if first is None:
        raise DataError(f"{path} is empty")
    if first[0].startswith("#"):  # as numpy.savetxt writes a header
        first = [first[0].lstrip("# "), *first[1:]]
        first = first[1:] if not first[0] and len(first) > 1 else first
    if header is None:
        header = any(_number(cell) is None for cell in first)
    if not header:
        return numbered(len(first)), False
    return [name or f"column{at + 1}" for at, name in enumerate(first)], True


def _quickly(file: TextIO, separator: str | None, named: bool, places: list[int] | None) -> numpy.ndarray | None:
    """By numpy's own parser; None where that finds anything but numbers."""
    if named:
        next(_rows(file, separator), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return numpy.loadtxt(
                file, delimiter=separator, comments=None, quotechar='"', usecols=places, ndmin=2, dtype=numpy.float64
            )
    except (ValueError, UserWarning):  # with the warning that there is no line
        return None


def _cell_by_cell(
    path: Path, file: TextIO, separator: str | None, names: list[str], named: bool, places: list[int]
) -> numpy.ndarray:
    values = {at: array("d") for at in places}
    wrong: dict[int, str] = {}
    counted = _Counted(file)
    rows = _rows(counted, separator)
    if named:
        next(rows, None)
    for row in rows:
        if len(row) != len(names):
            first = "its header" if named else "its first line"
            cells = f"{len(row)} cell{'s' * (len(row) != 1)}"
            hint = _why_uneven(path, row)
            raise DataError(f"{path}: line {counted.line} has {cells} and {first} {len(names)}{hint}")
        for at, column in values.items():
            if at in wrong:
                continue
            number = _number(row[at])
            if number is None:
                cell = row[at] if len(row[at]) <= _LONGEST_CELL else f"{row[at][:_LONGEST_CELL]}..."
                hint = ", a decimal comma: write a point" if re.fullmatch(r"[+-]?\d*,\d+", cell) else ""
                wrong[at] = f"{names[at]!r} has {cell!r} in line {counted.line}{hint}"
            else:
                column.append(number)
    if wrong:
        raise DataError(no_numbers(path, list(wrong.values()), [names[at] for at in places if at not in wrong]))
    return numpy.stack([numpy.frombuffer(values[at], dtype=numpy.float64) for at in places], 1)


def _why_uneven(path: Path, row: list[str]) -> str:
    with open(path, encoding="utf-8-sig") as file:
        if file.read(1) == "#":
            return ": of lines that start with # only the one with the names may stay, take the others out"
    if len(row) == 2 and re.fullmatch(r"[+-]?\d*", row[0]) and re.fullmatch(r"\d+", row[1]):
        return ": where the comma is that of a decimal number, write a point"
    return ""


def _number(cell: str) -> float | None:
    """NaN where the value is missing, None where the cell holds no number."""
    if cell.lower() in MISSING:
        return float("nan")
    if "_" in cell:  # Python's own notation
        return None
    try:
        return float(cell)
    except ValueError:
        return None


class _Counted:
    """Lines, and the number of the latest."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self.line = iter(lines), 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.line += 1
        return line
