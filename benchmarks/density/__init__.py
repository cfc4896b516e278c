"""``python -m benchmarks density``: splines and small flows beside nflows, normflows, zuko and FrEIA."""

from __future__ import annotations

from pathlib import Path

from .. import bars


def run(out: Path, *, quick: bool, commit: str | None, names: list[str]) -> int:
    """Measures the bars that have one of ``names`` in them (all without); the exit status is 1 if one of ours is wrong
    or failed. ``ValueError`` for names that no bar has."""
    from . import flows, splines

    known = (*splines.BARS, *flows.BARS)
    chosen = [bar for bar in known if not names or any(name in bar.id for name in names)]
    if not chosen:
        raise ValueError(f"no bar has {' or '.join(names)} in it; there are: {'; '.join(bar.id for bar in known)}")
    return bars.run("density", chosen, out, quick=quick, commit=commit)
