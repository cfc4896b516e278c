"""From what a file holds to what a flow is trained on: each column looked at, told of, and cut into parts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ..._nearest import did_you_mean
from ..data.image_data import DataError, part_size
from ..data.table import RawTable, read_table

_LEAST_ROWS = 10
_MOST_VALIDATION = 10_000  # rows: enough to tell models apart, and gone through at every validation
_LARGEST, _SMALLEST = 1e30, 1e-30  # of what float32 can hold, with room for sums
_EXACT = 2**53  # whole numbers that float64 tells apart
_PEAK = 0.05  # share of the rows with one value from which a density makes little sense
_FAR = 1e3  # standard deviations from zero beyond which float32 rounds too much
_OUTLIER = 1e3  # quartile distances from the median: beyond, a value decides alone about shift and scale
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table; the fields are those of ``nn.TableFlow``, and ``None`` where they do not apply.

    An angle has a ``period``: its values lie within half of it to either side of ``shift``, and become -pi to pi.
    """

    name: str
    kind: str
    context: bool = False
    shift: float | None = None
    scale: float | None = None
    step: float | None = None
    origin: float | None = None
    value: float | None = None
    period: float | None = None

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """One part of a table: ``values`` `[N, D]` and ``context`` `[N, C]` or None, in data units, on the CPU.

    Both float32, or float64 where float32 would round away what the columns differ in. ``index`` `[N]`: which rows of
    the file they are, counted from 0.
    """

    values: Tensor
    context: Tensor | None
    index: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def samples(self) -> Tensor | tuple[Tensor, Tensor]:
        """What ``fit`` takes."""
        return self.values if self.context is None else (self.values, self.context)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table that was looked at.

    Args:
        name: what reports call it.
        columns: all of them, in the file's order.
        train, validation, test: its parts.
        notes: sentences about what was found and done.
        named: whether the column names are the file's own.
    """

    name: str
    columns: tuple[Column, ...]
    train: Rows
    validation: Rows
    test: Rows
    notes: tuple[str, ...]
    named: bool

    @property
    def data(self) -> list[Column]:
        return [column for column in self.columns if column.kind != "constant" and not column.context]

    @property
    def conditions(self) -> list[Column]:
        return [column for column in self.columns if column.kind != "constant" and column.context]


def load_table(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    context: Sequence[str] = (),
    circular: Sequence[str] = (),
    header: bool | None = None,
    missing: str = "refuse",
    seed: int = 0,
) -> Table:
    """Reads a table, looks at its columns and cuts it into train, validation and test (a tenth each for these two, at
    most 10,000 rows to validate), the same for the same seed.

    Shift and scale of a column are mean and standard deviation of the training part.

    Args:
        source: see ``read_table``; so ``header``.
        columns: the columns to model, None for all but the context.
        context: the columns that are conditions.
        circular: the columns that are angles: names, or ``name=period`` where that is not 2 pi. Their values are taken
            modulo the period, into 0 to the period where none is negative, else into half a period around 0.
        missing: rows with a missing value are an error (``"refuse"``) or left out (``"drop"``).
        seed: of the cut.

    Raises:
        DataError: what ``read_table`` raises; rows with missing values; infinite or too large values; fewer than ten
            rows; no column that varies.
    """
    context = list(dict.fromkeys(context))
    wanted = None if columns is None else list(dict.fromkeys([*columns, *context]))
    raw = read_table(source, columns=wanted, header=header)
    if columns is None and context:
        _refuse_unknown(source, raw, context)
    values, notes = complete(source, raw, missing)
    kept = torch.from_numpy(numpy.flatnonzero(~numpy.isnan(raw.values).any(1)))
    if len(values) < _LEAST_ROWS:
        rows = f"{len(values)} row{'s' * (len(values) != 1)}"
        rows += f" of {len(raw)}" if len(values) < len(raw) else ""
        raise DataError(f"{source} has {rows} to use: at least {_LEAST_ROWS} are needed to train, validate and test on")
    values = values.copy()
    kinds = [_column(source, name, values[:, at], name in context) for at, name in enumerate(raw.names)]
    for name, period in _periods(source, raw.names, circular, context).items():
        at = raw.names.index(name)
        kinds[at], values[:, at] = _angle(source, kinds[at], values[:, at], period)
    tenth = part_size(0.1, len(values), "test")
    sizes = [len(values) - tenth - min(tenth, _MOST_VALIDATION), min(tenth, _MOST_VALIDATION), tenth]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    parts = order.split(sizes)
    train = values[parts[0].numpy()]
    found = [_scaled(source, column, train[:, at]) for at, column in enumerate(kinds)]
    if all(column.kind == "constant" or column.context for column in found):
        what = "every column is constant or context" if context else "every column is constant"
        raise DataError(f"{source}: {what}, which leaves nothing to model")
    dtype = torch.float64 if is_far([column.facts() for column in found]) else torch.float32
    notes += _told(raw, values, found)
    train_rows, validation, test = (_rows(values[part.numpy()], found, dtype, kept[part]) for part in parts)
    return Table(raw.name, tuple(found), train_rows, validation, test, tuple(notes), raw.named)


def is_far(columns: Sequence[dict[str, Any]]) -> bool:
    """Whether a column is so far from zero, in its own standard deviations, that rows have to be float64."""
    return any(abs(column["shift"]) > _FAR * column["scale"] for column in columns if column["kind"] != "constant")


def complete(
    source: object,
    raw: RawTable,
    missing: str,
    *,
    infinite_advice: str = "take these rows out, or the column (--columns)",
    missing_advice: str = "give --missing drop to leave these rows out, or --columns without such columns",
) -> tuple[numpy.ndarray, list[str]]:
    """The rows without a missing value, and what there is to tell. ``DataError`` where they are to be refused, or for
    infinite values, with advice: by default that of a command that chooses columns."""
    values = raw.values
    for at, name in enumerate(raw.names):
        infinite = numpy.isinf(values[:, at])
        if infinite.any():
            count, first = int(infinite.sum()), int(infinite.argmax()) + 1
            raise DataError(
                f"{source}: column {name!r} has {count} infinite value{'s' * (count != 1)}, the first in row {first}: "
                f"{infinite_advice}"
            )
    gone = numpy.isnan(values)
    rows = gone.any(1)
    if not rows.any():
        return values, []
    counts = {name: int(count) for name, count in zip(raw.names, gone.sum(0)) if count}
    where = ", ".join(f"{name}: {count}" for name, count in list(counts.items())[:_LISTED])
    where += ", ..." if len(counts) > _LISTED else ""
    count = int(rows.sum())
    told = f"{count} of {len(values)} rows"
    if missing == "refuse":
        raise DataError(f"{source}: {told} lack a value ({where}): {missing_advice}")
    return values[~rows], [f"{told} lack a value and were left out ({where})"]


def _refuse_unknown(source: object, raw: RawTable, context: Sequence[str]) -> None:
    for name in context:
        if name not in raw.names:
            listed = ", ".join(raw.names[:_LISTED]) + (", ..." if len(raw.names) > _LISTED else "")
            near = did_you_mean(name, raw.names, "; ")
            raise DataError(f"--context {name}: {source} has no such column; its columns are {listed}{near}")


def _column(source: object, name: str, values: numpy.ndarray, context: bool) -> Column:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Column(name, "constant", context, value=low)
    if max(abs(low), abs(high)) > _LARGEST:
        raise DataError(f"{source}: column {name!r} has values up to {max(abs(low), abs(high)):.3g}: rescale it")
    if context or max(abs(low), abs(high)) >= _EXACT or not (values == numpy.floor(values)).all():
        return Column(name, "real", context)
    differences = numpy.unique(values) - low
    step = float(numpy.gcd.reduce(differences.astype(numpy.int64)))
    return Column(name, "integer", context, step=step, origin=low % step)


def _periods(source: object, names: Sequence[str], circular: Sequence[str], context: Sequence[str]) -> dict[str, float]:
    periods = {}
    for given in circular:
        name, equals, number = (given, "", "") if given in names else given.rpartition("=")
        if not equals:
            name = given
        if name not in names:
            near = did_you_mean(name, names, "; ")
            listed = _listed(names)
            raise DataError(f"--circular {given}: {source} has no column {name!r} to model; it has {listed}{near}")
        if name in context:
            raise DataError(f"--circular {given}: {name} is a condition; give its sine and cosine as columns instead")
        try:
            period = float(number) if equals else 2 * math.pi
        except ValueError:
            period = math.nan
        if not 0 < period < _LARGEST:
            raise DataError(f"--circular {given}: expected a positive period after the name, such as {name}=360")
        periods[name] = period
    return periods


def _angle(source: object, column: Column, values: numpy.ndarray, period: float) -> tuple[Column, numpy.ndarray]:
    if column.kind == "constant":
        return column, values
    if column.step is not None and (period % column.step or period <= column.step):
        raise DataError(
            f"--circular {column.name}: {source} has whole numbers there, in steps of {column.step:g}, and no whole "
            f"turn of them is {period:g}: give the period, such as {column.name}={24 * column.step:g}"
        )
    low = 0.0 if values.min() >= 0 else -period / 2
    return dataclasses.replace(column, shift=low + period / 2, period=period), wrapped(values, low, period)


def wrapped(values: numpy.ndarray, low: float, period: float) -> numpy.ndarray:
    return numpy.mod(values - low, period) + low


def _scaled(source: object, column: Column, values: numpy.ndarray) -> Column:
    """With shift and scale, of the training part; the scale as float32 holds it."""
    if column.kind == "constant":
        return column
    if column.period is not None:
        return dataclasses.replace(column, scale=float(numpy.float32(column.period / (2 * math.pi))))
    # Noise of a step's width has a variance of its own.
    scale = math.sqrt(float(values.var()) + (column.step or 0.0) ** 2 / 12)
    if scale < _SMALLEST:
        few = "one value in all rows but a few" if values.min() == values.max() else "values that hardly differ"
        raise DataError(f"{source}: column {column.name!r} has {few}: leave it out (--columns) or rescale it")
    return dataclasses.replace(column, shift=float(values.mean()), scale=float(numpy.float32(scale)))


def _rows(values: numpy.ndarray, columns: list[Column], dtype: torch.dtype, index: Tensor) -> Rows:
    def part(context: bool) -> Tensor:
        places = [at for at, c in enumerate(columns) if c.kind != "constant" and c.context == context]
        return torch.from_numpy(values[:, places]).to(dtype).contiguous()

    condition = part(True)
    return Rows(part(False), condition if condition.shape[1] else None, index)


# --- what there is to tell ------------------------------------------------------------------------------------------


def _told(raw: RawTable, values: numpy.ndarray, columns: list[Column]) -> list[str]:
    notes = []
    constant = [f"{c.name} = {c.value:g}" for c in columns if c.kind == "constant"]
    if constant:
        notes.append(f"constant, so not modelled but put back into samples: {_listed(constant)}")
    whole = [c.name if c.step == 1 else f"{c.name} (in steps of {c.step:g})" for c in columns if c.kind == "integer"]
    if whole:
        notes.append(f"whole numbers, trained on with uniform noise and rounded in samples: {_listed(whole)}")
    turns = [f"{c.name} (period {c.period:g})" for c in columns if c.period is not None]
    if turns:
        notes.append(f"angles, of which the two ends are one: {_listed(turns)}")
    for at, column in enumerate(columns):
        if column.kind == "integer" and (values[:, at] == values[0, at] + numpy.arange(len(values))).all():
            notes.append(f"{column.name} counts the rows: such a column is best left out (--columns)")
        if column.kind == "real" and numpy.abs(values[:, at]).max() >= _EXACT and not (values[:, at] % 1).any():
            notes.append(
                f"{column.name} has numbers so large that float64 does not tell whole ones apart: it is taken for real"
            )
        if column.kind == "real" and not column.context:
            each, counts = numpy.unique(values[:, at], return_counts=True)
            if counts.max() > max(_PEAK * len(values), 2):
                peak = each[counts.argmax()]
                notes.append(
                    f"{counts.max()} of {len(values)} rows have {column.name} = {peak:g}: a density can be as high as "
                    "it likes there, which makes its nats look better than they are"
                )
        if column.kind == "real" and column.period is None:
            low, middle, high = numpy.quantile(values[:, at], (0.25, 0.5, 0.75))
            outliers = values[numpy.abs(values[:, at] - middle) > _OUTLIER * (high - low), at]
            if high > low and len(outliers):
                count = f"{len(outliers)} value{'s' * (len(outliers) != 1)}"
                notes.append(
                    f"{column.name} has {count} that all others lie far from, such as {outliers[0]:g}: take such rows "
                    "out if they are no measurements, else the other values become one point of the flow's range"
                )
    notes += _copies(values, columns)
    return notes


def _copies(values: numpy.ndarray, columns: list[Column]) -> list[str]:
    """Columns that the others determine: a density over them has no upper bound."""
    places = [at for at, column in enumerate(columns) if column.kind == "real" and not column.context]
    if len(places) < 2:
        return []
    standard = values[:, places] - values[:, places].mean(0)
    standard = standard / numpy.maximum(standard.std(0), _SMALLEST)
    sizes, directions = numpy.linalg.eigh(standard.T @ standard / len(standard))
    if sizes[0] > 1e-10 or len(values) <= len(places):
        return []
    weights = numpy.abs(directions[:, 0])
    names = [columns[places[at]].name for at in numpy.flatnonzero(weights > 0.1 * weights.max())]
    return [
        f"{_listed(names)} determine each other exactly, where a density has no upper bound: leave one of them out "
        "(--columns)"
    ]


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:_LISTED]) + (f" and {len(words) - _LISTED} more" if len(words) > _LISTED else "")
