"""What density a flow has learned: a map of the plane, a curve over the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from . import _models, style
from ._rows import Rows, box, interval, limits_of, rows, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..nn import Flow

_NATS = 8.0  # below the peak, where the map's colours end
_POINTS = 600  # of the data, drawn over the map
_LINE = 801  # points of the curve


@style.drawing()
def density(
    flow: Flow | torch.distributions.Distribution | Callable[[Tensor], Tensor],
    *,
    data: Any = None,
    context: Any = None,
    limits: Any = None,
    pixels: int = 220,
    title: str | None = None,
) -> Figure:
    """The density of a flow of one or two columns.

    Of two columns it is a map of the log-density in nats, from its peak down to 8 nats below (lighter is denser), with
    the data as dots; of one a curve of the density over a histogram of the data.

    Args:
        flow: a flow, a ``torch.distributions.Distribution``, or anything else with a ``log_prob``, such as other
            libraries' flows; or a function of points ``[N, D]`` (float32) that gives ``log p`` ``[N]`` in nats.
        data: rows ``[N, D]`` of the same columns, tensor or array; at most 600 of two columns are drawn.
        context: what the density is conditioned on: one for the whole picture, ``[1, ...]`` or a label.
        limits: ``((left, right), (bottom, top))``, ``(left, right)`` of one column. By default what holds 99 % of the
            data, or else of samples of the flow, and a margin where the flow has a density there.
        pixels: along the longer side of the map.
        title: above the picture, in place of its own.

    Returns:
        The figure; the map is its first axes' image ``[rows, columns]``, the lowest row first.

    Raises:
        ValueError: rows of more than two columns or another number than the flow's, limits that are none, several
            contexts, neither limits nor data for something that cannot be sampled from, a log-density that is nowhere
            finite.
        ImportError: no matplotlib.

    Costs one ``log_prob`` of ``pixels ** 2`` points at most, in chunks of 16,384.
    """
    shown = None if data is None else rows(data, "data")
    count = _count(flow, shown, limits)
    if count not in (1, 2):
        raise ValueError(f"density draws one or two columns, got {count}: nfkernels.plot.corner draws more")
    ends, log_p = seen(flow, count, shown, context, limits, pixels)
    if count == 1:
        made = style.figure(6.4, 4)
        told = _draw_curve(made.subplots(), log_p, ends[0], shown)
    else:
        made = style.figure(*style.panel(ends, 1.0))
        told = draw_map(made.subplots(), log_p, ends, shown)
    if title:
        style.heading(made, title)
    style.note(made, told, "" if shown is None else shown.note)
    return made


def seen(flow: Any, count: int, data: Rows | None, context: Any, limits: Any, pixels: int) -> tuple[Any, numpy.ndarray]:
    """The limits of the picture, one pair for each column, and ``log p`` there: on a line, or as of `on_grid`."""

    def evaluated(ends: Sequence[tuple[float, float]]) -> tuple[Any, numpy.ndarray]:
        if count == 1:
            line = torch.linspace(*ends[0], _LINE, dtype=torch.float64)
            return ends, _models.log_density(flow, line[:, None], context).numpy()
        return ends, on_grid(flow, (ends[0], ends[1]), context, pixels)

    if limits is not None:
        return evaluated([interval(limits)] if count == 1 else box(limits))
    source = None if data is not None else _models.some_samples(flow, context)
    if data is None and source is None:
        raise ValueError("what part of the plane to draw cannot be known from a function: give limits or data")
    points = (data or rows(source, "samples of the flow")).values
    ends = limits_of(points)
    try:
        return evaluated(ends)
    except ValueError:  # a flow of positive numbers, say, beyond its domain
        return evaluated([within(*pair, column) for pair, column in zip(ends, points.T, strict=True)])


def _count(flow: Any, data: Rows | None, limits: Any) -> int:
    """How many columns there are: the flow's, the data's or the limits' own; all that are known are one."""
    own = _models.columns_of(flow)
    if own is not None and data is not None and own != data.columns:
        raise ValueError(f"data has {data.columns} columns and the flow {own}: expected rows of the same columns")
    if own is not None or data is not None:
        return own if own is not None else data.columns
    return 1 if limits is not None and numpy.ndim(limits) == 1 else 2


def draw_map(axes: Axes, log_p: numpy.ndarray, limits: style.Limits, data: Rows | None) -> str:
    """The map with its bar, and the data on it. Returns what has to be told, or nothing."""
    told = _not_finite(log_p)
    peak = float(log_p[numpy.isfinite(log_p)].max())
    image = axes.imshow(
        numpy.maximum(log_p, peak - 3 * _NATS),  # -inf would take the pixels around it along; NaN stays NaN
        extent=(*limits[0], *limits[1]),
        origin="lower",
        cmap=style.DENSITY,
        vmin=peak - _NATS,
        vmax=peak,
        interpolation="bilinear",
        aspect="auto",
    )
    if data is not None:
        dots = data.values[:_POINTS]
        axes.plot(*dots.T, "o", color=style.INK, markersize=1.9, markeredgecolor="white", markeredgewidth=0.3)
    style.plane(axes, limits, "log-density" + ("" if data is None else " and data"))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.86, pad=0.02, extend="min")
    bar.set_label("nats", fontsize=9)
    bar.outline.set_visible(False)
    return told


def _draw_curve(axes: Axes, log_p: numpy.ndarray, ends: tuple[float, float], data: Rows | None) -> str:
    told = _not_finite(log_p)
    if data is not None:
        bins = numpy.linspace(*ends, 61)
        weights = numpy.full(len(data.values), 1 / (len(data.values) * (bins[1] - bins[0])))
        label = f"data ({len(data.values):,} rows)"
        look: dict[str, Any] = {"histtype": "stepfilled", "color": style.FILLS[1], "label": label}
        axes.hist(data.values[:, 0], list(bins), weights=weights, **look)
    axes.plot(
        numpy.linspace(*ends, _LINE), numpy.exp(log_p), color=style.BLUE, linewidth=1.8, label="the flow's density"
    )
    axes.set_xlim(*ends)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("$x$")
    axes.set_ylabel("density")
    axes.legend()
    return told


def on_grid(flow: Any, limits: style.Limits, context: Any, pixels: int) -> numpy.ndarray:
    """``log p`` at the middles of a picture's pixels, float64 ``[rows, columns]``, the lowest row first."""
    if pixels < 2:
        raise ValueError(f"pixels is {pixels}: expected at least 2 along the longer side")
    sides = [high - low for low, high in limits]
    longest = max(sides)
    counts = [max(1, round(pixels * side / longest)) if style.alike(limits) else pixels for side in sides]
    x, y = (
        low + side / count * (torch.arange(count, dtype=torch.float64) + 0.5)
        for (low, _), side, count in zip(limits, sides, counts, strict=True)
    )
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    return _models.log_density(flow, points, context).view(len(y), len(x)).numpy()


def _not_finite(log_p: numpy.ndarray) -> str:
    """Minus infinity is a density of nothing; anything else that is no number is told."""
    if not numpy.isfinite(log_p).any():
        raise ValueError("the log-density is nowhere finite within these limits: expected limits that hold data")
    wrong = int((numpy.isnan(log_p) | (log_p == numpy.inf)).sum())
    log_p[log_p == numpy.inf] = numpy.nan
    return f"the log-density is NaN or infinite at {wrong:,} of {log_p.size:,} points (left white)" if wrong else ""
