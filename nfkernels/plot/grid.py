"""How a flow bends space: a straight grid of the latent, seen in the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from . import _models, style
from ._rows import Rows, box, limits_of, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..nn import Flow

_FAR, _LINES, _ALONG = 2.5, 21, 600  # standard deviations to either side, lines of each family, points of each
_POINTS = 2000  # of the data, drawn behind


@style.drawing()
def warped_grid(
    flow: Flow, *, context: Any = None, limits: Any = None, data: Any = None, title: str | None = None
) -> Figure:
    """A straight grid of the latent plane, put through the flow's inverse into the data.

    Lines of constant ``z_1`` are dark, of constant ``z_2`` light and dashed, 21 each from -2.5 to 2.5 (of another base
    than a standard normal: over what holds nearly all of its samples). Where lines lie close the density is high.

    Args:
        flow: over rows of two columns.
        context: what the flow is conditioned on: one for the whole picture, ``[1, ...]`` or a label.
        limits: ``((left, right), (bottom, top))`` of the data; by default what holds 99 % of the data, or else of
            samples of the flow, and a margin.
        data: rows ``[N, 2]``, drawn behind the grid, at most 2000.
        title: above the picture, in place of its own.

    Raises:
        TypeError: no Flow.
        ValueError: not of two columns, limits that are none, several contexts.
        ImportError: no matplotlib.

    Costs one inverse of 25,200 points.
    """
    shown = None if data is None else rows(data, "data")
    _plane_only(flow, shown, "warped_grid")
    if limits is None:
        source = shown or rows(_models.some_samples(flow, context), "samples of the flow")
        limits = tuple(limits_of(source.values))
    limits = box(limits)
    made = style.figure(*style.panel(limits, 0.4), title)
    axes = made.subplots()
    told = draw_grid(axes, flow, limits, shown, context)
    if title:
        axes.set_title("")
    style.note(made, told, "" if shown is None else shown.note)
    return made


def _plane_only(flow: Flow, data: Rows | None, what: str) -> None:
    count = _models.flow_of_rows(flow, what)
    if count != 2:
        raise ValueError(f"{what} draws flows of two columns, got one of {count}")
    if data is not None and data.columns != 2:
        raise ValueError(f"data has {data.columns} columns and the flow 2: expected rows of the same columns")


def draw_grid(axes: Axes, flow: Flow, limits: style.Limits, data: Rows | None, context: Any = None) -> str:
    """Both families of lines and their legend. Returns what has to be told, or nothing."""
    from matplotlib.collections import LineCollection

    lines = warped(flow, context).double().numpy()
    lost = int((~numpy.isfinite(lines)).any(-1).sum())
    if data is not None:
        axes.plot(*data.values[:_POINTS].T, ".", color="0.62", markersize=3, markeredgewidth=0)
    looks = ((style.BLUE, "-", 0.9), (style.ORANGE, (0, (5, 1.2)), 1.0))
    for family, (colour, dashes, width), name in zip(lines, looks, ("$z_1$", "$z_2$"), strict=True):
        axes.add_collection(LineCollection(list(family), colors=colour, linewidths=width, linestyles=[dashes]))
        axes.plot([], [], color=colour, linestyle=dashes, label=f"constant {name}")
    narrow = style.shape(limits) > 1.3  # no room for a title beside the legend
    look = {"ncol": 1 if narrow else 2, "handlelength": 1.8, "handletextpad": 0.5, "columnspacing": 1.0}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), borderaxespad=0.2, **look)
    style.plane(axes, limits, "" if narrow else "the latent's grid")
    return f"the inverse is not finite at {lost:,} of {lines[..., 0].size:,} points of the grid" if lost else ""


def warped(flow: Flow, context: Any = None) -> Tensor:
    """The grid in the data, ``[2, 21, 600, 2]`` in the flow's type on the CPU: first the lines of one ``z_1``, then
    of one ``z_2``."""
    from ..nn import StandardNormal

    like = flow.base.like
    with _models.looking(flow):
        if isinstance(flow.base, StandardNormal):
            ends = [(-_FAR, _FAR)] * 2
        else:
            z = flow.base.sample(4096, generator=torch.Generator(like.device).manual_seed(0)).cpu().double()
            ends = [tuple(torch.quantile(column, column.new_tensor([0.006, 0.994])).tolist()) for column in z.T]
        families = []
        for at in (0, 1):
            across, along = torch.linspace(*ends[at], _LINES), torch.linspace(*ends[1 - at], _ALONG)
            pair = torch.meshgrid(across, along, indexing="ij")
            families.append(torch.stack(pair if at == 0 else pair[::-1], -1))
        z = torch.stack(families)
        given = _models.one_context(context, like.device)
        x = flow.decode(z.flatten(0, 2).to(like), given, batch_size=_models.AT_ONCE)
        return x.cpu().view(z.shape)
