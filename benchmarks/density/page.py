"""The README's block on splines and small flows."""

from __future__ import annotations

from pathlib import Path

from ..complexity.page import bars_table, newest, source

BEGIN, END = "<!-- density:begin -->", "<!-- density:end -->"
LEGEND = """Made by `python -m benchmarks report` from `python -m benchmarks density`: medians of interleaved calls, in
one process, each contender checked against its own float64 self first. Ours and nflows' NSF have the same weights and
give the same numbers; the others are built with as many layers and hidden units. *Outside*: forward and backward of the
same flow whose networks are replaced by stand-ins that do no work; the optimiser is not run."""


def devices(results: Path) -> dict[str, dict]:
    folders = sorted(p for p in results.iterdir() if p.is_dir())
    found = {f.name: newest(f, "density", "bars") for f in folders}
    return {name: data for name, data in found.items() if data}


def block(results: Path) -> str:
    """What stands between the marks."""
    parts = [LEGEND]
    for data in devices(results).values():
        parts += [bars_table(data), source(data)]
    return "\n\n".join(parts)
