"""What each layer of a flow does to points on their way from the base to the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ..nn import ActNorm, Bijection, Chain, Permutation, Standardize
from ..nn.linear_bijection import ConstantJacobian
from . import _models, style
from ._rows import box, limits_of, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..nn import Flow

_ACROSS = 8
_TAIL, _FAR = 0.1, 1.5  # beyond so many times the width of all points but these tails a point is far from the others
# These only rename or rescale the axes: every stage is shown as they will leave it, so that what moves is learned.
_FIXED = (Permutation, Standardize)
# These bend nothing: what they do is seen together with the layer before them.
_STRAIGHT = (*_FIXED, ConstantJacobian, ActNorm)


@style.drawing()
def steps(
    flow: Flow,
    *,
    count: int = 2000,
    context: Any = None,
    columns: tuple[int, int] = (0, 1),
    limits: Any = None,
    seed: int = 0,
    title: str | None = None,
) -> Figure:
    """Points on their way from the base to the data: a panel after each layer that bends, in the order of sampling.

    Points are coloured by the angle at which they started, so that one sees which of them a layer has moved where.
    Layers that bend nothing (linear ones, ActNorm, permutations) are seen together with the one before them.

    Args:
        flow: over rows ``[D]``, D at least 2.
        count: points.
        context: what the flow is conditioned on: one for the whole picture, ``[1, ...]`` or a label.
        columns: the two that are drawn.
        limits: ``((left, right), (bottom, top))`` of the data that have to be seen; by default what holds 99 % of it
            but for points that lie far from the others; where that leaves some out, the picture tells how many.
        seed: of the points.
        title: above the picture.

    Raises:
        TypeError: no Flow.
        ValueError: fewer than two columns, columns that are not there, fewer than one point,
            several contexts.
        ImportError: no matplotlib.

    Costs one inverse of ``count`` points.
    """
    width = _models.flow_of_rows(flow, "steps")
    if width < 2:
        raise ValueError(f"steps draws flows of two columns or more, got one of {width}")
    pair = tuple(columns)
    if len(pair) != 2 or pair[0] == pair[1] or not all(isinstance(at, int) and 0 <= at < width for at in pair):
        raise ValueError(f"columns are {pair}: expected two different ones of 0 .. {width - 1}")
    if count < 1:
        raise ValueError(f"count is {count}: expected at least 1 point")
    like = flow.base.like
    with _models.looking(flow):
        z = flow.base.sample(count, generator=torch.Generator(like.device).manual_seed(seed))
        seen = [stage[:, list(pair)].double().cpu().numpy() for stage in stages(flow, z, context)]
    start = z[:, list(pair)].double().cpu().numpy()
    last = rows(seen[-1], "samples of the flow")
    near = _near(last.values)
    view = _room(_near(seen[0]), tuple(limits_of(near)) if limits is None else box(limits))
    far = 0
    if limits is None and view != _room(_near(seen[0]), tuple(limits_of(last.values))):
        low, high = numpy.array(view).T
        far = int(((last.values < low) | (last.values > high)).any(1).sum())
    across = min(len(seen), _ACROSS)
    made = style.figure(max(2.3 * across, 5), 2.5 * -(-len(seen) // _ACROSS) + 0.4, title)
    angle = numpy.arctan2(start[:, 1], start[:, 0])
    layers = len(seen) - 1
    names = ["base", *(f"layer {layers - k}" for k in range(layers - 1)), "layer 1: data"][: len(seen)]
    for axes, points, name in zip(style.panels(made, len(seen), _ACROSS), seen, names, strict=True):
        axes.scatter(*points.T, c=angle, cmap=style.circle(), vmin=-math.pi, vmax=math.pi, s=2.2, linewidths=0)
        style.plane(axes, view, name, ticks=False)
    style.note(made, last.note, f"{far:,} of {len(near):,} points lie outside" if far else "")
    return made


def stages(flow: Flow, z: Tensor, context: Any = None) -> list[Tensor]:
    """Latents ``[N, D]``, and what each layer that bends makes of them, in the data's coordinates: the last is the
    data that they become. ``context`` is one for all."""
    given = _models.one_context(context, z.device)
    given = flow._embed(given, z)
    layers = flatten(flow.bijection)
    seen = [_to_data(layers, z, given)]
    while layers:
        layer = layers.pop()
        z = layer.inverse(z, given)[0]
        now = _to_data(layers, z, given)
        if not isinstance(layer, _STRAIGHT):
            seen.append(now)
        elif len(seen) > 1:
            seen[-1] = now
    if len(seen) == 1 and not torch.equal(seen[0], z):  # nothing bends, and something mixes
        seen.append(z)
    return seen


def flatten(bijection: Bijection) -> list[Bijection]:
    """The layers in the order data meets them, chains in chains opened."""
    if isinstance(bijection, Chain):
        return [inner for layer in bijection for inner in flatten(layer)]
    return [bijection]


def _to_data(layers: list[Bijection], z: Tensor, context: Tensor | None) -> Tensor:
    for layer in reversed(layers):
        if isinstance(layer, _FIXED):
            z = layer.inverse(z, context)[0]
    return z


def _near(points: numpy.ndarray) -> numpy.ndarray:
    """Points that lie far from the others, brought as near as the picture has to reach."""
    low, high = numpy.quantile(points, [_TAIL, 1 - _TAIL], axis=0, method="nearest")
    reach = numpy.where(high > low, _FAR * (high - low), numpy.inf)
    return numpy.clip(points, low - reach, high + reach)


def _room(base: numpy.ndarray, limits: Any) -> Any:
    """A square that shows both the data and the base."""
    middle = base.mean(0)
    reach = 2.7 * base.std()
    side = max(max(m - low, high - m, reach) for m, (low, high) in zip(middle, limits, strict=True))
    return tuple((m - side, m + side) for m in middle)
