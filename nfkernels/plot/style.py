"""How every picture looks, and the one way to write one.

Hues are those that all eyes tell apart (Okabe & Ito 2008). What meets in one picture also differs in lightness, so that
a grey print can be read: the comments hold L*, from 0 (black) to 100 (white).
"""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Limits = tuple[tuple[float, float], tuple[float, float]]

DPI = 128  # a power of two: a number of pixels over it is exact in a float, so figures have the pixels asked for
INK = "#222222"  # 13
BLUE = "#0B4F8A"  # 32: what a flow makes
RED = "#B33B00"  # 41
ORANGE = "#E08214"  # 62
SKY = "#7CC4EE"  # 76
GREY = "#9A9A9A"  # 63
PALE_BLUE, PALE_RED = "#CFE3F1", "#F6D9C6"  # 89, 88: areas behind lines
FILLS = ("#DEEBF7", "#B3D3E8", "#7FB5D9")  # 92, 83, 71: data as areas, the denser the darker
DENSITY = "viridis"  # its lightness rises all the way
# Lines and dots of several things at once, from dark to light.
SERIES = ((INK, "-", "o"), (BLUE, "--", "s"), (RED, "-.", "^"), (ORANGE, ":", "D"), (SKY, "-", "v"))
# Around a circle; the lightness rises once and falls once on the way.
_CIRCLE = ("#331A5E", "#1B4F91", "#56B4E9", "#F0C23B", "#D55E00", "#7A1B4E", "#331A5E")

_RC = {
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "axes.edgecolor": "0.7",
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "figure.titlesize": 13,
    "grid.color": "0.92",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": "0.6",
    "xtick.labelcolor": "0.3",
    "xtick.labelsize": 9,
    "ytick.color": "0.6",
    "ytick.labelcolor": "0.3",
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Around a function that draws: its figure looks the same whatever the user's own settings are.

    Raises ``ImportError`` where matplotlib is missing.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError('drawing needs matplotlib, which is missing: pip install "nfkernels[plot]"') from error
    with matplotlib.style.context(["default", _RC]):
        yield


def figure(width: float, height: float, title: str | None = None, *, layout: Any = "constrained") -> Figure:
    """An empty figure of so many inches, and more for a title of several lines."""
    from ._figure import NotebookFigure

    title = wrapped(title, width, 13) if title else ""
    made = NotebookFigure(figsize=(width, height + 0.22 * title.count("\n")), layout=layout)
    if title:
        made.suptitle(title, parse_math=False)  # a name in it may hold dollars
    return made


def wrapped(text: str, width: float, size: float) -> str:
    """In lines of so many inches at this size of letters, as what sticks out of a figure is cut off."""
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, _letters(width, size)) or [""])


def short(text: str, width: float, size: float) -> str:
    """In one line of so many inches: beginning and end of what is longer."""
    most = _letters(width, size)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[len(text) - most + most // 2 + 3 :]}"


def in_legend(name: str, width: float) -> str:
    """As `short`; matplotlib leaves out of legends what begins with an underscore."""
    return (" " if name.startswith("_") else "") + short(name, width, 9)


def letter(size: float) -> float:
    """Inches that most of DejaVu's letters of this size are wide at most."""
    return 0.62 * size / 72


def _letters(width: float, size: float) -> int:
    return max(8, int(width / letter(size)))


def note(made: Figure, *notes: str) -> None:
    """What is left out or went wrong, in small letters below everything; empty notes are none."""
    told = "; ".join(text for text in notes if text)
    if told:
        made.supxlabel(told, fontsize=8, color=RED, parse_math=False)


def verbatim(legend: Legend) -> None:
    """Its labels as they are: a name in them may hold dollars."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def heading(made: Figure, title: str) -> None:
    """The one heading of a figure, that of its first panel; the figure grows where it takes several lines."""
    told = wrapped(title, made.get_figwidth() - 0.9, 11)  # it begins where the axes do
    made.axes[0].set_title(told, parse_math=False)  # a name in it may hold dollars
    made.set_figheight(made.get_figheight() + 0.2 * told.count("\n"))


def plane(axes: Axes, limits: Limits, title: str, *, ticks: bool = True) -> None:
    """Axes of two columns: one unit is as long along both, unless that would make a ribbon."""
    axes.set_title(title, loc="left" if ticks else "center")
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    if alike(limits):
        axes.set_aspect("equal")
    if ticks:
        axes.set_xlabel("$x_1$")
        axes.set_ylabel("$x_2$", rotation=0, labelpad=8)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)


def alike(limits: Limits) -> bool:
    """Whether both axes are about as long, so that one scale serves both."""
    width, height = (high - low for low, high in limits)
    return 1 / 3 <= width / height <= 3


def shape(limits: Limits) -> float:
    """Height over width of a panel with these limits."""
    width, height = (high - low for low, high in limits)
    return height / width if alike(limits) else 0.8


def panel(limits: Limits, beside: float) -> tuple[float, float]:
    """Inches of a figure of one panel with these limits, and so much beside it; neither too long."""
    height = min(5.2 * shape(limits), 6.0)
    return height / shape(limits) + beside, height + 0.8


def panels(made: Figure, count: int, across: int) -> list[Any]:
    """``count`` axes in rows of at most ``across``, as even as they go; the rest of the last row is left empty."""
    rows = math.ceil(count / across)
    wide = math.ceil(count / rows)
    every: Sequence[Any] = made.subplots(rows, wide, squeeze=False).flatten().tolist()
    for empty in every[count:]:
        empty.set_visible(False)
    return list(every[:count])


def circle() -> Any:
    """A map of colours for angles."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("circle", _CIRCLE)


@drawing()
def save(figure: Figure, path: str | os.PathLike[str], *, software: str = "nfkernels") -> None:
    """Writes a figure as a PNG, in the figure's own resolution: whole, or not at all.

    Args:
        figure: of this package, or any of matplotlib's.
        path: ends in ``.png``.
        software: kept in the file as what made it.

    Raises:
        ValueError: a path that ends otherwise (``figure.savefig`` writes other formats).
        OSError: the file cannot be written; what was there is still there.
        ImportError: no matplotlib.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{os.fspath(path)}: expected a name that ends in .png; figure.savefig writes other formats")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi="figure", metadata={"Software": software})
