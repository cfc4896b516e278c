"""What is drawn, as arrays: checked, in double precision, and what is not finite counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from torch import Tensor

from .style import Limits

_CUT = 0.005  # of the points, left out on either side where a picture's limits come from them
_MARGIN = 0.15  # of the width, on either side
_FEW = 60  # whole numbers that get a bar each


class Rows(NamedTuple):
    """``values``: float64 ``[N, D]``, all finite; ``note``: what was left out, or nothing."""

    values: numpy.ndarray
    note: str

    @property
    def columns(self) -> int:
        return self.values.shape[1]


def array(values: Any) -> numpy.ndarray:
    """A tensor of any kind, a list or an array as float64 on the host."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return numpy.asarray(values, dtype=numpy.float64)


def rows(values: Any, name: str) -> Rows:
    """``values`` ``[N, D]`` (``[N]`` is one column) without its rows that are not finite, of which the user is warned.

    Raises ``ValueError`` for another shape, no row, or no finite row.
    """
    found = array(values)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or not found.size:
        raise ValueError(f"{name} is {list(found.shape)}: expected rows [N, D], at least one row and one column")
    fine = numpy.isfinite(found).all(1)
    lost = int((~fine).sum())
    if not lost:
        return Rows(found, "")
    if lost == len(found):
        raise ValueError(f"{name} holds NaN or infinite values in all {lost} rows: there is nothing to draw")
    note = f"{lost:,} of {len(found):,} rows of {name} are not finite and left out"
    warnings.warn(note, stacklevel=4)
    return Rows(found[fine], note)


def same_columns(one: Rows, other: Rows, names: tuple[str, str] = ("data", "samples")) -> None:
    if one.columns != other.columns:
        raise ValueError(
            f"{names[0]} has {one.columns} columns and {names[1]} {other.columns}: expected rows of the same columns"
        )


def column_names(names: Sequence[str] | None, count: int) -> list[str]:
    """One for each column: x1, x2, ... where there are none."""
    if names is None:
        return [f"x{at + 1}" for at in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names has {1 if isinstance(names, str) else len(names)} entries: expected {count}, one each")
    return [str(name) for name in names]


def limits_of(*points: numpy.ndarray) -> list[tuple[float, float]]:
    """What of every column is to be seen: nearly all points ``[N, D]`` of each, and a margin."""
    found = []
    for column in zip(*(part.T for part in points)):
        ends = [numpy.quantile(values, [_CUT, 1 - _CUT]) for values in column]
        found.append(spread(min(low for low, _ in ends), max(high for _, high in ends), _MARGIN))
    return found


def spread(low: float, high: float, margin: float) -> tuple[float, float]:
    """An interval with a margin on either side, a share of its width; of a single value one around it."""
    width = (high - low) * margin
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        width = 0.5 * abs(low) or 0.5
    return float(low - width), float(high + width)


def within(low: float, high: float, values: numpy.ndarray) -> tuple[float, float]:
    """The interval's part that does not go beyond the values, where a layer may have no inverse."""
    return spread(max(low, float(values.min())), min(high, float(values.max())), 0)


def step_of(values: numpy.ndarray) -> float:
    """The distance between neighbours where these are whole numbers, 0 where they are real."""
    return float((values == numpy.round(values)).all())


def edges(limits: tuple[float, float], wanted: int, step: float = 0.0, origin: float = 0.0) -> numpy.ndarray:
    """Of a histogram's bins: so many, or one for each of ``origin + k step`` where there are few of those, so that no
    bar holds more of them than its neighbour."""
    low, high = limits
    if step and (high - low) / step <= _FEW:
        first = origin + numpy.floor((low - origin) / step) * step
        return numpy.arange(first - step / 2, high + step, step)
    return numpy.linspace(low, high, wanted + 1)


def interval(limits: Any) -> tuple[float, float]:
    """``(low, high)`` as given, checked."""
    try:
        low, high = (float(end) for end in limits)
    except (TypeError, ValueError):
        raise ValueError(f"limits of one column are {limits!r}: expected (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits of one column are {(low, high)}: expected (low, high), both finite, low < high")
    return low, high


def box(limits: Any) -> Limits:
    """``((left, right), (bottom, top))`` as given, checked."""
    try:
        across, up = limits
    except (TypeError, ValueError):
        raise ValueError(f"limits are {limits!r}: expected ((left, right), (bottom, top))") from None
    return interval(across), interval(up)
