"""How the demo's pictures look: colours that all eyes tell apart (Okabe & Ito 2008), light axes, one way to save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._atomic import atomic_write
from ..data.image_data import need
from .folder import SOFTWARE

BLUE, SKY, RED, GREY, INK = "#0072B2", "#56B4E9", "#D55E00", "#9A9A9A", "#222222"
PALE_BLUE, PALE_RED = "#CFE3F1", "#F6D9C6"
DENSITY = "viridis"
# Around a circle: dark blue, sky, yellow, red, dark purple. Neighbours differ in lightness as well as in hue.
_CIRCLE = ("#1B4F91", "#56B4E9", "#F0C23B", "#D55E00", "#6A1B5E", "#1B4F91")


def circle() -> Any:
    need("matplotlib", "drawing the pictures")
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("circle", _CIRCLE)


def figure(size: tuple[float, float], title: str) -> Any:
    need("matplotlib", "drawing the pictures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    made.suptitle(title, fontsize=14, color=INK)
    return made


def tidy(axes: Any, title: str, loc: str = "left") -> None:
    axes.set_title(title, fontsize=11, color=INK, loc=loc)
    axes.tick_params(labelsize=9, color="0.6", labelcolor="0.3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")


def plane(axes: Any, view: Sequence[tuple[float, float]], title: str, *, ticks: bool = True) -> None:
    """Axes of the plane: one unit is as long along both."""
    tidy(axes, title, "left" if ticks else "center")
    axes.set_xlim(*view[0])
    axes.set_ylim(*view[1])
    axes.set_aspect("equal")
    if ticks:
        axes.set_xlabel("$x_1$", fontsize=10, color=INK)
        axes.set_ylabel("$x_2$", fontsize=10, color=INK, rotation=0, labelpad=8)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)


def columns(points: Tensor) -> tuple[list[float], list[float]]:
    return tuple(points.detach().cpu().double().T.tolist())


def save(made: Any, path: str | os.PathLike[str], dpi: int = 130) -> None:
    with atomic_write(path) as temporary:
        made.savefig(temporary, format="png", dpi=dpi, metadata={"Software": SOFTWARE})
