"""A device's picture: speed-up over eager and over torch.compile, and fraction of the copy bandwidth, against size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tables import COMPILED, EAGER, best, of_copy, speedup

COLOURS = {"forward": "#0868ac", "inverse": "#41ab5d", "backward": "#d94801", "forward+backward": "#6a51a3"}
MARKERS = {"forward": "o", "inverse": "s", "backward": "^", "forward+backward": "D"}
STYLES = ("-", "--", ":", "-.")


def draw(data: dict[str, Any], path: Path) -> None:
    """One row per op; lines by direction (colour) and number of channels of a mix (dashes). Written atomically."""
    from matplotlib.figure import Figure

    from nfkernels.plot import save

    measures = {
        "speed-up over eager": lambda c: speedup(c, EAGER),
        "speed-up over torch.compile": lambda c: speedup(c, COMPILED),
        "% of copy bandwidth": lambda c: 100 * f if (f := of_copy(c, data["roofline"])) is not None else None,
    }
    ops = list(dict.fromkeys(c["op"] for c in data["cases"]))
    figure = Figure(figsize=(13, 1.0 + 2.9 * len(ops)), dpi=110, layout="constrained")
    figure.suptitle(f"{data['machine']['name']} ({data['folder']}), float32", fontsize=13)
    axes = figure.subplots(len(ops), 3, squeeze=False, sharex=True)
    for row, op in zip(axes, ops, strict=True):
        lines = _lines([c for c in data["cases"] if c["op"] == op])
        for index, (axis, (title, measure)) in enumerate(zip(row, measures.items(), strict=True)):
            _panel(axis, lines, measure, title)
            axis.set_title(f"{op}: {title}", fontsize=10)
            if index == 0 and axis.get_legend_handles_labels()[0]:
                _legend(row[2], axis)
    for axis in axes[-1]:
        axis.set_xlabel("bytes of data")
    save(figure, path)


def _lines(cases: list[dict[str, Any]]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """(direction, channels of a mix) -> its plain float32 cases by size."""
    found: dict[tuple[str, int | None], list] = {}
    alone = any(c["direction"] == "backward" and best(c) for c in cases)
    for case in cases:
        if case["variant"] or {case["dtype"], case["params_dtype"]} != {"torch.float32"}:
            continue
        if alone and case["direction"] == "forward+backward":
            continue  # its parts are drawn
        if not case["op"].endswith("mix") and len(case["shape"]) == 2:
            continue  # tables of rows are another regime: they are in the page's table
        found.setdefault((case["direction"], case["shape"][1] if case["op"].endswith("mix") else None), []).append(case)
    in_order = sorted(found.items(), key=lambda item: (item[0][1] or 0, item[0][0]))
    return {key: sorted(of, key=lambda c: c["data_bytes"]) for key, of in in_order}


def _panel(axis, lines, measure, title: str) -> None:
    widths = sorted({channels for _, channels in lines if channels is not None})
    top = 0.0
    for (direction, channels), cases in lines.items():
        points = [(c["data_bytes"], measure(c)) for c in cases]
        points = [(size, value) for size, value in points if value is not None]
        if not points:
            continue
        name = direction if channels is None else f"{direction}, {channels} channels"
        style = STYLES[widths.index(channels) % len(STYLES)] if channels is not None else "-"
        axis.plot(*zip(*points, strict=True), style, color=COLOURS[direction], marker=MARKERS[direction], markersize=4,
                  linewidth=1.4, label=name)  # fmt: skip
        top = max(top, *(value for _, value in points))
    axis.set_xscale("log", base=2)
    ticks = [2**10, 2**15, 2**20, 2**25, 2**30]
    axis.set_xticks(ticks, ["1 KiB", "32 KiB", "1 MiB", "32 MiB", "1 GiB"])
    axis.minorticks_off()
    axis.set_xlim(2**9, 2**31)
    axis.grid(alpha=0.3)
    if not top:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.4")
        axis.set_yticks([])
        return
    axis.set_ylim(0, 1.15 * max(top, 105 if title.startswith("%") else 1.0))
    axis.axhline(100 if title.startswith("%") else 1.0, color="0.4", linewidth=1, linestyle="--", zorder=0)


def _legend(place, axis) -> None:
    """Beside the row, where it covers no line."""
    handles, labels = axis.get_legend_handles_labels()
    place.legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), borderaxespad=0.0)
