"""A corner plot: each column's histogram and each pair's contours, of data and of samples, in two colours."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy

from ..._atomic import atomic_write
from ..data.image_data import need

MOST_COLUMNS = 8
_DATA, _SAMPLES = "#4292c6", "#d94801"
_FILLS = ("#deebf7", "#9ecae1", "#4292c6")
_MASSES = (0.95, 0.68, 0.3)  # of the rows, inside the contours
_CUT = 0.004  # of the data, left out on either side: outliers would squeeze the rest
_FEW = 60  # whole numbers that get a bar each


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One column: its name, values of data and of samples, and the step between whole numbers (0: real)."""

    name: str
    data: numpy.ndarray
    samples: numpy.ndarray
    step: float = 0.0

    def range(self) -> tuple[float, float]:
        both = [numpy.quantile(part, [_CUT, 1 - _CUT]) for part in (self.data, self.samples)]
        # The samples may widen the picture, but not by so much that the data is lost in it.
        width = float(numpy.ptp(both[0])) or 1.0
        low = max(min(both[0][0], both[1][0]), both[0][0] - 0.25 * width)
        high = min(max(both[0][1], both[1][1]), both[0][1] + 0.25 * width)
        margin = max(0.04 * (high - low), self.step)
        return float(low - margin), float(high + margin)

    def has_bars(self, edges: numpy.ndarray) -> bool:
        """Whether every cell between ``edges`` is one whole number."""
        return bool(self.step) and bool(numpy.isclose(edges[1] - edges[0], self.step))

    def bins(self, low: float, high: float, wanted: int) -> numpy.ndarray:
        """Edges; around whole numbers where there are few, so that no bar holds more of them than its neighbour."""
        if self.step and (high - low) / self.step <= _FEW:
            first = self.data[0] + numpy.floor((low - self.data[0]) / self.step) * self.step
            return numpy.arange(first - self.step / 2, high + self.step, self.step)
        return numpy.linspace(low, high, wanted + 1)


def corner(
    path: str | os.PathLike[str], axes: Sequence[Axis], *, title: str | None = None, left_out: Sequence[str] = ()
) -> None:
    """Draws up to eight columns as a PNG, written atomically. Filled: the data; lines: the samples. The contours hold
    30, 68 and 95 % of the rows.

    Args:
        path: of the picture.
        axes: the columns.
        title: above the picture.
        left_out: names of columns that are not drawn, told below the title.

    Raises:
        DataError: matplotlib is not installed. OSError: the file cannot be written.
    """
    need("matplotlib", "drawing the corner plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axes = list(axes)[:MOST_COLUMNS]
    count = len(axes)
    side = max(2.0 * count, 4.2) if count > 1 else 4.6
    figure = Figure(figsize=(side, side), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, count, squeeze=False)
    ranges = [axis.range() for axis in axes]
    for row in range(count):
        for column in range(count):
            panel = grid[row][column]
            if column > row:
                panel.set_axis_off()
                continue
            if row == column:
                _marginal(panel, axes[row], ranges[row])
            else:
                _pair(panel, axes[column], axes[row], ranges[column], ranges[row])
            _frame(panel, axes, row, column)
    handles = [Patch(color=_FILLS[1], label="data"), Line2D([], [], color=_SAMPLES, label="samples of the flow")]
    where = {"loc": "upper right", "bbox_to_anchor": (0.98, 0.98)} if count > 2 else {"loc": "outside lower center"}
    figure.legend(handles=handles, frameon=False, fontsize=9 + min(count, 4) // 2, ncols=1 if count > 2 else 2, **where)
    if left_out:
        told = ", ".join(left_out[:6]) + (f" and {len(left_out) - 6} more" if len(left_out) > 6 else "")
        title = f"{title}\nnot drawn: {told}" if title else f"not drawn: {told}"
    if title:
        figure.suptitle(title, fontsize=10 + count // 3, x=0.02, ha="left", parse_math=False)
    figure.align_labels()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130 if count < 5 else 110)


def _marginal(panel: Any, axis: Axis, limits: tuple[float, float]) -> None:
    edges = axis.bins(*limits, 50)
    for values, style in (
        (axis.data, {"histtype": "stepfilled", "color": _FILLS[1]}),
        (axis.samples, {"histtype": "step", "color": _SAMPLES, "linewidth": 1.4}),
    ):
        # Of all values, not only of those inside: a model with much mass elsewhere is lower here.
        weights = numpy.full(len(values), 1 / len(values))
        panel.hist(values, edges, weights=weights, **style)
    panel.set_xlim(*limits)
    panel.set_ylim(bottom=0)


def _pair(panel: Any, across: Axis, up: Axis, limits: tuple[float, float], heights: tuple[float, float]) -> None:
    cells = int(numpy.clip(len(across.data) ** 0.5 / 1.5, 16, 48))
    edges = [_wider(axis.bins(*ends, cells)) for axis, ends in ((across, limits), (up, heights))]
    middles = [(edge[:-1] + edge[1:]) / 2 for edge in edges]
    for x, y, filled in ((across.data, up.data, True), (across.samples, up.samples, False)):
        counts = numpy.histogram2d(x, y, edges)[0] / len(x)
        density = _smooth(counts, [at for at, axis in enumerate((across, up)) if not axis.has_bars(edges[at])]).T
        levels = _levels(density)
        if not levels:
            continue
        if filled:
            panel.contourf(*middles, density, [*levels, density.max() * 1.001], colors=_FILLS[-len(levels) :])
        else:
            panel.contour(*middles, density, levels, colors=_SAMPLES, linewidths=1.1)
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


def _frame(panel: Any, axes: list[Axis], row: int, column: int) -> None:
    from matplotlib.ticker import MaxNLocator

    last = row == len(axes) - 1
    panel.xaxis.set_major_locator(MaxNLocator(4, prune="both", integer=axes[column].step >= 1))
    panel.tick_params(labelsize=8, labelbottom=last, labelleft=column == 0 and row > 0, length=3)
    panel.tick_params(axis="x", rotation=45 if last and len(axes) > 2 else 0)
    if last:
        panel.set_xlabel(axes[column].name, fontsize=10, parse_math=False)  # a name may hold dollars
    if row == column:
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    else:
        panel.yaxis.set_major_locator(MaxNLocator(4, prune="both", integer=axes[row].step >= 1))
        if column == 0:
            panel.set_ylabel(axes[row].name, fontsize=10, parse_math=False)
