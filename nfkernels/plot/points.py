"""Samples beside the data that they should look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from . import style
from ._rows import Rows, box, column_names, edges, limits_of, rows, same_columns, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 5000  # in a panel
_COLUMNS, _ACROSS = 24, 6  # histograms in all, in a row


@style.drawing()
def samples(
    data: Any, samples: Any, *, names: Sequence[str] | None = None, limits: Any = None, title: str | None = None
) -> Figure:
    """Data and samples of a flow: as dots in two panels of equal limits where there are two columns, else a histogram
    of each column, the data as an area and the samples as a line. `corner` also draws pairs of columns.

    Args:
        data: rows ``[N, D]``, tensor or array; ``[N]`` is one column.
        samples: rows ``[M, D]``. Of two columns at most 5000 of each are drawn.
        names: of the columns, D; by default x1, x2, ...
        limits: ``((left, right), (bottom, top))`` of two columns; by default what holds 99 % of both, and a margin.
        title: above the picture.

    More than 24 columns are not drawn; the picture tells how many are left out.

    Raises:
        ValueError: other shapes, another number of columns or names, limits where there are not two columns.
        ImportError: no matplotlib.
    """
    own, drawn = rows(data, "data"), rows(samples, "samples")
    same_columns(own, drawn)
    labels = column_names(names, own.columns)
    if own.columns == 2:
        made = _dots(own, drawn, labels if names else None, limits, title)
    elif limits is not None:
        raise ValueError(f"limits are for two columns, got rows of {own.columns}")
    else:
        made = _histograms(own, drawn, labels, title)
    left_out = f"{own.columns - _COLUMNS} more columns are not drawn" if own.columns > _COLUMNS else ""
    style.note(made, own.note, drawn.note, left_out)
    return made


def _dots(data: Rows, drawn: Rows, names: list[str] | None, limits: Any, title: str | None) -> Figure:
    limits = tuple(limits_of(data.values, drawn.values)) if limits is None else box(limits)
    made = style.figure(9.4, 4.4 * style.shape(limits) + 0.8, title)
    left, right = made.subplots(1, 2)
    draw_points(left, data, limits, "data", style.INK)
    draw_points(right, drawn, limits, "samples", style.BLUE)
    for axes in (left, right) if names else ():
        axes.set_xlabel(style.short(names[0], 4, 10), parse_math=False)
        axes.set_ylabel(style.short(names[1], 4, 10), parse_math=False, rotation=90, labelpad=4)
    return made


def draw_points(axes: Axes, points: Rows, limits: style.Limits, title: str, colour: str) -> None:
    """Dots, and beside the title how many there are."""
    shown = points.values[:_POINTS]
    many = f"{len(shown):,}" + ("" if len(shown) == len(points.values) else f" of {len(points.values):,}")
    axes.plot(*shown.T, linestyle="none", marker=".", markersize=2.6, markeredgewidth=0, alpha=0.7, color=colour)
    style.plane(axes, limits, f"{title} ({many})")


def _histograms(data: Rows, drawn: Rows, names: list[str], title: str | None) -> Figure:
    count = min(data.columns, _COLUMNS)
    across = min(count, _ACROSS)
    down = -(-count // across)
    made = style.figure(max(6.4, 2.4 * across), 4 if count == 1 else 2.1 * down + 0.9, title)
    limits = limits_of(data.values[:, :count], drawn.values[:, :count])
    for at, axes in enumerate(style.panels(made, count, across)):
        bins = edges(limits[at], 60 if count == 1 else 40, step_of(data.values[:, at]), data.values[0, at])
        for values, look in (
            (data.values[:, at], {"histtype": "stepfilled", "color": style.FILLS[1], "label": "data"}),
            (drawn.values[:, at], {"histtype": "step", "color": style.RED, "linewidth": 1.4, "label": "samples"}),
        ):
            axes.hist(values, bins, weights=numpy.full(len(values), 1 / (len(values) * (bins[1] - bins[0]))), **look)
        axes.set_xlim(*limits[at])
        axes.set_xlabel(style.short(names[at], 2.4, 10), parse_math=False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        if at == 0:
            handles = axes.get_legend_handles_labels()
    made.legend(*handles, loc="outside upper right", ncols=2)
    return made
