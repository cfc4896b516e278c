"""One panel for each line of the table and direction: time over size, the promise as a dashed slope, peers in grey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .layers import ROWS
from .measure import OURS
from .page import TITLES, cost, timed

COLOURS = {"inverse": "#0868ac", "logdet": "#d94801"}
ACROSS = 3  # sweeps in a row, two panels each


def draw(data: dict[str, Any], path: Path) -> None:
    """Written atomically. ``data["sweeps"]``: entries by id."""
    from matplotlib.figure import Figure

    from nfkernels.plot import save

    shown = [e for e in data["sweeps"].values() if any(s["times"] for s in e["contenders"].get(OURS, {}).values())]
    down = max(1, -(-len(shown) // ACROSS))
    figure = Figure(figsize=(5.6 * ACROSS, 1.0 + 2.45 * down), dpi=90, layout="constrained")
    where = f"{data['machine']['name']} ({data['folder']})"
    told = "dots: nfkernels, with the exponent of the last four; dashes: the promise; grey: others"
    figure.suptitle(f"Microseconds of one call on {ROWS} samples, {where}\n{told}", fontsize=12)
    groups = figure.subfigures(down, ACROSS, squeeze=False, wspace=0.02).flat
    for group, entry in zip(groups, shown):
        grows = f"over {entry['over']}" + (f" ({entry['fixed']})" if entry["fixed"] else "")
        group.suptitle(f"{entry['layer']} {grows}", fontsize=9.5, fontweight="bold")
        for axis, direction in zip(group.subplots(1, 2), TITLES):
            _panel(axis, entry, direction)
    save(figure, path)


def _panel(axis, entry: dict[str, Any], direction: str) -> None:
    for name, states in entry["contenders"].items():
        times = states[direction]["times"]
        if name != OURS and times:
            axis.plot(
                *zip(*((n, t) for n, t, _ in times)), color="0.65", linewidth=1.0, marker=".", markersize=3, zorder=1
            )
    own = [(n, t) for n, t, _ in entry["contenders"][OURS][direction]["times"]]
    if own:
        sizes = [n for n, _ in own]
        promise = cost(entry["promise"][direction])
        last, top = own[-1]
        slope = [top * promise.at(n) / promise.at(last) for n in sizes]
        lowest = min(t for s in entry["contenders"].values() for _, t, _ in s[direction]["times"])
        kept = [(n, t) for n, t in zip(sizes, slope) if t > 0.5 * lowest]
        axis.plot(*zip(*kept), "--", color="0.25", linewidth=1.0, zorder=2)
        axis.plot(*zip(*own), "-o", color=COLOURS[direction], linewidth=1.6, markersize=3.5, zorder=3)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 100 * low:  # a flat line stays one
        axis.set_ylim(low / 10, high * 10)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=7)
    word = "promised" if entry["row"] else "claimed"
    axis.set_title(
        f"{TITLES[direction]}: {timed(entry, direction)}, {word} {entry['promise'][direction]['text']}", fontsize=8
    )
