"""Loss curves before and after, one over the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEFORE, AFTER = "#737373", "#d94801"


def draw(entries: list[dict[str, Any]], title: str, path: Path) -> None:
    """A panel for each model: its losses before (a thick grey line) and after (a thin one over it). Written
    atomically."""
    from matplotlib.figure import Figure

    from nfkernels.plot import save

    shown = [e for e in entries if "curves" in e]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 0.5 + 2.7 * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, e in zip(axes, shown):
        c = e["curves"]
        steps = range(1, len(c["before"]) + 1)
        axis.plot(steps, c["before"], color=BEFORE, linewidth=4, alpha=0.5, label="before")
        axis.plot(steps, c["after"], color=AFTER, linewidth=1.2, label="after")
        axis.set_title(f"{e['id']}\nfloat32: {c['float32']:.0e} apart, nudged {c['nudged']:.0e}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    first = figure.axes[0]
    first.legend(fontsize=8)
    first.set_ylabel("loss")
    first.set_xlabel("step")
    save(figure, path)
