"""Names of columns: chosen, made up, and listed where one of them is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..._nearest import did_you_mean
from .image_data import DataError

_LISTED = 12


def chosen(path: Path, names: Sequence[str], columns: Sequence[str] | None) -> list[int]:
    """The places of ``columns`` among ``names``. ``DataError`` for names that are not there, or twice."""
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None and (columns is None or twice in columns):
        places = " and ".join(str(at + 1) for at, name in enumerate(names) if name == twice)
        raise DataError(f"{path}: columns {places} are both called {twice!r}: rename one of them")
    if columns is None:
        return list(range(len(names)))
    for name in columns:
        if name not in names:
            listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            near = did_you_mean(name, names, "; ")
            raise DataError(f"{path} has no column {name!r}: its columns are {listed}{near}")
    return [names.index(name) for name in columns]


def no_numbers(path: Path, wrong: list[str], rest: Sequence[str]) -> str:
    """A sentence about columns that hold no numbers, with the option that leaves them out."""
    more = f" (and {len(wrong) - 3} columns more)" if len(wrong) > 3 else ""
    advice = f"leave it out with --columns {','.join(rest)}" if rest else "there is no other column"
    return f"{path}: column {'; column '.join(wrong[:3])}{more}, and a flow needs numbers: {advice}"


def numbered(count: int) -> list[str]:
    return [f"x{index + 1}" for index in range(count)]
