"""All about a flow of the plane on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _models, style
from ._rows import rows
from .density import draw_map, seen
from .grid import _plane_only, draw_grid
from .points import draw_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..nn import Flow

_ACROSS = 10.5  # inches


@style.drawing()
def overview(
    flow: Flow,
    data: Any,
    *,
    samples: Any = None,
    context: Any = None,
    limits: Any = None,
    pixels: int = 220,
    title: str | None = None,
) -> Figure:
    """Four panels of one flow of the plane: its log-density with data on it (see `density`), its latent's grid (see
    `warped_grid`), data, and samples.

    Args:
        flow: over rows of two columns.
        data: rows ``[N, 2]``, best those that it was not trained on.
        samples: rows ``[M, 2]``; by default as many as there are rows of data, at most 4000, drawn with a fixed seed.
        context, limits, pixels, title: as in `density`.

    Raises:
        TypeError: no Flow.
        ValueError: not of two columns, limits that are none, several contexts.
        ImportError: no matplotlib.

    Costs a ``log_prob`` of ``pixels ** 2`` points at most, an inverse of 25,200, and the samples.
    """
    shown = rows(data, "data")
    _plane_only(flow, shown, "overview")
    if samples is None:
        samples = _models.some_samples(flow, context, count=min(len(shown.values), 4000))
    drawn = rows(samples, "samples")
    if drawn.columns != 2:
        raise ValueError(f"samples has {drawn.columns} columns and the flow 2: expected rows of the same columns")
    view, log_p = seen(flow, 2, shown, context, limits, pixels)
    made = style.figure(_ACROSS, 0.8 * _ACROSS * style.shape(view) + 2, title)
    (density, grid), (left, right) = made.subplots(2, 2)
    told = draw_map(density, log_p, view, shown), draw_grid(grid, flow, view, shown, context)
    draw_points(left, shown, view, "data", style.INK)
    draw_points(right, drawn, view, "samples", style.BLUE)
    style.note(made, *told, shown.note, drawn.note)
    return made
