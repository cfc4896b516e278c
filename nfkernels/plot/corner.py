"""A corner plot: each column's histogram and each pair's contours, of data and of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from . import style
from ._rows import array, column_names, edges, rows, same_columns, spread, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 8
_MASSES = (0.95, 0.68, 0.3)  # of the rows, inside the contours
_CUT = 0.004  # of the data, left out on either side: outliers would squeeze the rest
_HEAD = 1.1  # a histogram's panel over its highest bar


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """One column: its name, values of data and of samples (or None), the step between whole numbers (0: real), and
    the true value, if there is one."""

    name: str
    data: numpy.ndarray
    samples: numpy.ndarray | None = None
    step: float = 0.0
    truth: float | None = None

    def range(self) -> tuple[float, float]:
        low, high = numpy.quantile(self.data, [_CUT, 1 - _CUT])
        if self.samples is not None:
            # The samples may widen the picture, but not by so much that the data is lost in it.
            room = 0.25 * (float(numpy.ptp((low, high))) or 1.0)
            ends = numpy.quantile(self.samples, [_CUT, 1 - _CUT])
            low, high = max(min(low, ends[0]), low - room), min(max(high, ends[1]), high + room)
        if self.truth is not None:
            low, high = min(low, self.truth), max(high, self.truth)
        if self.step:
            margin = max(0.04 * (high - low), self.step)
            return float(low - margin), float(high + margin)
        return spread(float(low), float(high), 0.04)

    def has_bars(self, bins: numpy.ndarray) -> bool:
        """Whether every one of these bins is one whole number."""
        return bool(self.step) and bool(numpy.isclose(bins[1] - bins[0], self.step))

    def bins(self, limits: tuple[float, float], wanted: int) -> numpy.ndarray:
        return edges(limits, wanted, self.step, float(self.data[0]))


@style.drawing()
def corner(
    data: Any,
    samples: Any = None,
    *,
    names: Sequence[str] | None = None,
    truth: Any = None,
    steps: Sequence[float] | None = None,
    labels: tuple[str, str] = ("data", "samples of the flow"),
    title: str | None = None,
) -> Figure:
    """Every column's histogram and every pair's contours. Areas: the data; lines: the samples; dots on crossing dashes:
    the truth. The contours hold 30, 68 and 95 % of the rows.

    Args:
        data: rows ``[N, D]``, tensor or array; ``[N]`` is one column.
        samples: rows ``[M, D]``, or None for the data alone. For two posteriors give the one as data and the other as
            samples, with ``labels``.
        names: of the columns, D; by default x1, x2, ...
        truth: true values ``[D]``, such as the parameters that a simulator was given; NaN where there is none.
        steps: of each column the distance between its whole numbers, 0 for real ones, so that each number gets a bar of
            its own. By default 1 where the data is whole numbers.
        labels: of data and samples, for the legend.
        title: above the picture.

    More than eight columns are not drawn; the title tells which.

    Raises:
        ValueError: other shapes, another number of columns, names, steps or true values.
        ImportError: no matplotlib.
    """
    own = rows(data, "data")
    drawn = None if samples is None else rows(samples, "samples")
    if drawn is not None:
        same_columns(own, drawn)
    columns, left_out = _columns(own.values, drawn and drawn.values, names, truth, steps)
    count = len(columns)
    side = max(2.0 * count, 4.2) if count > 1 else 4.6
    made = style.figure(side, side)
    engine: Any = made.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    grid = made.add_gridspec(count, count)
    bottom = []
    ranges = [column.range() for column in columns]
    for row in range(count):
        for at in range(row + 1):
            panel = made.add_subplot(grid[row, at])
            if row == at:
                _marginal(panel, columns[row], ranges[row])
            else:
                _pair(panel, columns[at], columns[row], ranges[at], ranges[row])
            _frame(panel, columns, row, at, side / count)
            if row == count - 1:
                bottom.append(panel)
    _turn(bottom, 0.8 * side / count)
    _legend(made, columns, labels)
    if left_out:
        told = ", ".join(left_out[:6]) + (f" and {len(left_out) - 6} more" if len(left_out) > 6 else "")
        title = f"{title}\nnot drawn: {told}" if title else f"not drawn: {told}"
    if title:
        size = 10 + count // 3
        made.suptitle(style.wrapped(title, side, size), fontsize=size, x=0.02, ha="left", parse_math=False)
    style.note(made, own.note, drawn.note if drawn else "")
    made.align_labels()
    return made


def _columns(
    data: numpy.ndarray, samples: numpy.ndarray | None, names: Any, truth: Any, steps: Any
) -> tuple[list[Column], list[str]]:
    """Those that are drawn, and the names of the others."""
    count = data.shape[1]
    called = column_names(names, count)
    true = numpy.full(count, numpy.nan) if truth is None else array(truth).reshape(-1)
    if len(true) != count:
        raise ValueError(f"truth has {len(true)} values: expected {count}, one for each column")
    if steps is None:
        steps = [step_of(column) for column in data.T]
    if len(steps) != count:
        raise ValueError(f"steps has {len(steps)} values: expected {count}, one for each column")
    found = [
        Column(
            called[at],
            data[:, at],
            None if samples is None else samples[:, at],
            float(steps[at]),
            float(true[at]) if numpy.isfinite(true[at]) else None,
        )
        for at in range(min(count, MOST_COLUMNS))
    ]
    return found, called[MOST_COLUMNS:]


def _legend(made: Figure, columns: list[Column], labels: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=style.FILLS[1], label=labels[0])]
    if columns[0].samples is not None:
        handles.append(Line2D([], [], color=style.RED, label=labels[1]))
    if any(column.truth is not None for column in columns):
        handles.append(Line2D([], [], color=style.INK, linestyle="--", marker="s", markersize=4, label="truth"))
    wide = len(columns) > 2
    where = {"loc": "upper right", "bbox_to_anchor": (0.98, 0.98)} if wide else {"loc": "outside lower center"}
    look = {"fontsize": 9 + min(len(columns), 4) // 2, "ncols": 1 if wide else len(handles)}
    style.verbatim(made.legend(handles=handles, **look, **where))


def _marginal(panel: Axes, column: Column, limits: tuple[float, float]) -> None:
    bins = column.bins(limits, 50)
    highest = 0.0
    for values, look in (
        (column.data, {"histtype": "stepfilled", "color": style.FILLS[1]}),
        (column.samples, {"histtype": "step", "color": style.RED, "linewidth": 1.4}),
    ):
        if values is not None:
            # Of all values, not only of those inside: a model with much mass elsewhere is lower here.
            shares: Any = panel.hist(values, list(bins), weights=numpy.full(len(values), 1 / len(values)), **look)[0]
            highest = max(highest, float(shares.max()))
    if column.truth is not None:
        panel.axvline(column.truth, color=style.INK, linewidth=1, linestyle="--")
    panel.set_xlim(*limits)
    panel.set_ylim(0, _HEAD * highest or 1.0)


def _pair(panel: Axes, across: Column, up: Column, limits: tuple[float, float], heights: tuple[float, float]) -> None:
    cells = int(numpy.clip(len(across.data) ** 0.5 / 1.5, 16, 48))
    bins = [_wider(column.bins(ends, cells)) for column, ends in ((across, limits), (up, heights))]
    middles = [(edge[:-1] + edge[1:]) / 2 for edge in bins]
    for x, y, filled in ((across.data, up.data, True), (across.samples, up.samples, False)):
        if x is None or y is None:
            continue
        counts = numpy.histogram2d(x, y, bins)[0] / len(x)
        density = _smooth(counts, [at for at, column in enumerate((across, up)) if not column.has_bars(bins[at])]).T
        levels = _levels(density)
        if not levels:
            continue
        if filled:
            ends = [*levels, density.max() * 1.001]
            panel.contourf(*middles, density, ends, colors=style.FILLS[-len(levels) :])
        else:
            panel.contour(*middles, density, levels, colors=style.RED, linewidths=1.1)
    for column, line in ((across, panel.axvline), (up, panel.axhline)):
        if column.truth is not None:
            line(column.truth, color=style.INK, linewidth=0.8, linestyle="--")
    if across.truth is not None and up.truth is not None:
        panel.plot(across.truth, up.truth, "s", color=style.INK, markersize=4)
    panel.set_xlim(*limits)
    panel.set_ylim(*heights)


def _wider(edges: numpy.ndarray) -> numpy.ndarray:
    """Two cells more on either side, out of the picture, so that a contour goes on where the picture ends."""
    width = edges[1] - edges[0]
    return numpy.concatenate((edges[0] - width * numpy.array([2, 1]), edges, edges[-1] + width * numpy.array([1, 2])))


def _smooth(counts: numpy.ndarray, along: Sequence[int]) -> numpy.ndarray:
    """By a Gaussian of one cell, along these axes: what a few thousand rows in a thousand cells need."""
    kernel = numpy.exp(-0.5 * numpy.arange(-3, 4) ** 2)
    kernel /= kernel.sum()
    for axis in along:
        counts = numpy.apply_along_axis(lambda line: numpy.convolve(line, kernel, "full")[3:-3], axis, counts)
    return counts


def _levels(density: numpy.ndarray) -> list[float]:
    """Heights above which the masses lie, rising; fewer where cells are so few that two are equal."""
    heights = numpy.sort(density.ravel())[::-1]
    inside = numpy.cumsum(heights)
    if not inside[-1] > 0:
        return []
    found = [heights[min(int(numpy.searchsorted(inside, mass * inside[-1])), len(heights) - 1)] for mass in _MASSES]
    return sorted({float(level) for level in found if level > 0})


def _turn(panels: list[Axes], width: float) -> None:
    """Tick labels of one row: upright, or all of them aslant where those of one panel do not fit into its width."""
    for panel in panels:
        told = panel.xaxis.get_major_formatter().format_ticks(list(panel.xaxis.get_majorticklocs()))
        if len(told) * (max(map(len, told), default=0) + 1) * style.letter(8) > width:
            for other in panels:
                other.tick_params(axis="x", rotation=45)
            return


def _frame(panel: Axes, columns: list[Column], row: int, at: int, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    few: dict[str, Any] = {"nbins": 3 if len(columns) > 1 else 5, "steps": [1, 2, 2.5, 5, 10], "prune": "both"}
    last = row == len(columns) - 1
    panel.spines[["top", "right"]].set_visible(row != at)
    panel.xaxis.set_major_locator(MaxNLocator(**few, integer=columns[at].step >= 1))
    panel.tick_params(labelsize=8, labelbottom=last, labelleft=at == 0 and row > 0, length=3)
    if last:
        panel.set_xlabel(style.short(columns[at].name, width, 10), parse_math=False)  # a name may hold dollars
    if row == at:
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
    else:
        panel.yaxis.set_major_locator(MaxNLocator(**few, integer=columns[row].step >= 1))
        if at == 0:
            panel.set_ylabel(style.short(columns[row].name, width, 10), parse_math=False)
