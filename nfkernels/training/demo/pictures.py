"""The two pictures of a quick look: what a flow has learned, and how its layers get there."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ...nn import Flow
from ..data.toy import Toy
from . import style

_PIXELS = 220  # along the longer side of the density
_NATS = 8.0  # below the peak, where the density's colours end
_FAR, _APART = 2.5, 0.25  # of the latent grid
_ACROSS = 10.5  # inches


@torch.no_grad()
def look(path: str | os.PathLike[str], toy: Toy, flow: Flow, data: Tensor, drawn: Tensor, title: str) -> None:
    """Density with data on it, warped grid, data, samples: four panels in one PNG, written atomically."""
    width, height = (high - low for low, high in toy.view)
    made = style.figure((_ACROSS, 0.8 * _ACROSS * height / width + 2), title)
    (density, grid), (left, right) = made.subplots(2, 2)

    image = density.imshow(
        log_density(flow, toy.view).tolist(),
        extent=(*toy.view[0], *toy.view[1]),
        origin="lower",
        cmap=style.DENSITY,
        interpolation="bilinear",
    )
    peak = image.get_array().max()
    image.set_clim(peak - _NATS, peak)
    density.plot(*style.columns(data[:600]), ".", color="white", markersize=1.8, alpha=0.55, markeredgewidth=0)
    style.plane(density, toy.view, "log-density and data")
    bar = made.colorbar(image, ax=density, shrink=0.86, pad=0.02, extend="min")
    bar.set_label("nats", fontsize=9, color=style.INK)
    bar.ax.tick_params(labelsize=8, color="0.6", labelcolor="0.3")
    bar.outline.set_visible(False)

    grid.plot(*style.columns(data[:2000]), ".", color=style.GREY, markersize=3, alpha=0.5, markeredgewidth=0)
    _draw_grid(grid, warped(flow))
    style.plane(grid, toy.view, "the latent's grid, bent")

    dots = {"linestyle": "none", "marker": ".", "markersize": 2.6, "markeredgewidth": 0, "alpha": 0.7}
    left.plot(*style.columns(data), color=style.INK, **dots)
    style.plane(left, toy.view, f"data ({len(data):,} held-out points)")
    right.plot(*style.columns(drawn), color=style.BLUE, **dots)
    style.plane(right, toy.view, f"samples ({len(drawn):,})")
    style.save(made, path)


def steps(path: str | os.PathLike[str], toy: Toy, seen: list[Tensor], latent: Tensor, title: str) -> None:
    """A panel for every stage, its points coloured by the angle at which they started: one PNG, written atomically."""
    count = len(seen)
    rows = 1 if count <= 8 else math.ceil(count / 8)
    wide = math.ceil(count / rows)
    view = _room(toy, seen[0])
    made = style.figure((2.3 * wide, 2.5 * rows + 0.4), title)
    panels = made.subplots(rows, wide, squeeze=False).flatten().tolist()
    angle = torch.atan2(latent[:, 1], latent[:, 0]).tolist()
    names = ["base", *(f"layer {count - 1 - k}" for k in range(count - 2)), "layer 1: data"][:count]
    for axes, points, name in zip(panels, seen, names, strict=False):
        axes.scatter(
            *style.columns(points), c=angle, cmap=style.circle(), vmin=-math.pi, vmax=math.pi, s=2.2, linewidths=0
        )
        style.plane(axes, view, name, ticks=False)
    for axes in panels[count:]:
        axes.set_visible(False)
    style.save(made, path)


@torch.no_grad()
def log_density(flow: Flow, view: Any) -> Tensor:
    """``log p`` at the middles of a picture's pixels, `[rows, columns]`, the lowest row first."""
    width, height = (high - low for low, high in view)
    pixel = max(width, height) / _PIXELS
    x, y = (low + pixel * (torch.arange(max(1, round((high - low) / pixel))) + 0.5) for low, high in view)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1).to(flow.base.like)
    return flow.log_prob(points, batch_size=20_000).cpu().view(len(y), len(x))


@torch.no_grad()
def warped(flow: Flow) -> list[Tensor]:
    """A straight grid of the latent pushed through the inverse: `[2, lines, points, 2]`, first the lines of one
    ``z_1``, then those of one ``z_2``."""
    at = torch.arange(-_FAR, _FAR + _APART / 2, _APART)
    along = torch.linspace(-_FAR, _FAR, 600)
    upright = torch.stack(torch.meshgrid(at, along, indexing="ij"), -1)
    lines = torch.stack((upright, upright.flip(-1)))
    decoded = flow.decode(lines.flatten(0, 2).to(flow.base.like), batch_size=20_000)
    return decoded.cpu().view(lines.shape)


def _draw_grid(axes: Any, lines: Tensor) -> None:
    from matplotlib.collections import LineCollection

    for family, colour, name in zip(lines, (style.BLUE, style.RED), ("$z_1$", "$z_2$"), strict=True):
        axes.add_collection(LineCollection(family.tolist(), colors=colour, linewidths=0.8, alpha=0.8))
        axes.plot([], [], color=colour, label=f"constant {name}")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 0.99), ncol=2, fontsize=9, frameon=False, handlelength=1.2,
        borderaxespad=0.2,
    )  # fmt: skip


def _room(toy: Toy, base: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square that shows both the data and the base."""
    middle = base.mean(0).tolist()
    reach = 2.7 * base.std().item()
    sides = [max(m - low, high - m, reach) for m, (low, high) in zip(middle, toy.view, strict=True)]
    side = max(sides)
    return tuple((m - side, m + side) for m in middle)
