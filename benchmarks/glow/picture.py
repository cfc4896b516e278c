"""Bits per dimension over seconds, a line per contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#0868ac", "#d94801", "#41ab5d", "#6a51a3", "#737373")


def draw(entry: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """``entry``: of a training; ``data``: the machine's facts. Written atomically."""
    from matplotlib.figure import Figure

    from nfkernels.plot import save

    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    highest = []
    shown = {name: of for name, of in entry["contenders"].items() if of["status"] == "measured"}
    for colour, (name, of) in zip(COLOURS, shown.items(), strict=False):
        # The start, far above everything else, is not part of the story.
        points = [(seconds, bits) for seconds, _, bits in of["curve"][1:] if bits is not None]
        if not points:
            continue
        label = f"{name}: {of['steps']:,} steps"
        if of["test_bits"] is not None:
            label += f", test {of['test_bits']:.3f}"
            axis.plot(of["seconds"], of["test_bits"], marker="*", markersize=11, color=colour, linestyle="none")
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        highest.append(points[0][1])
    axis.set_title(f"{entry['setup']['text']}\n{data['machine']['name']} ({data['folder']})", fontsize=10)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("bits per dimension (line: validation, star: test)")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    if highest:
        axis.legend(fontsize=9)
    save(figure, path)
