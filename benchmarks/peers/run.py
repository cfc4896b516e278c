"""``python -m benchmarks peers``: every model, saved after each part; tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import machine
from ..complexity.measure import keep_memory
from ..complexity.run import Saved
from ..record import Budget
from . import page
from .cases import CASES, Case
from .measure import CURVE_STEPS, QUICK, Pace, measure

Say = Callable[[str], None]


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases that have one of ``names`` in their id (all without). ``ValueError`` for a name that none has."""
    known = [c.id for c in CASES]
    for name in names:
        if not any(name in of for of in known):
            raise ValueError(f"there is no case {name}; there are {', '.join(known)}")
    return [c for c in CASES if not names or any(name in c.id for name in names)]


def opened(out: Path, kind: str, key: str, device: str, commit: str | None, quick: bool, budget: Budget, say: Say):
    """A result's file with the machine's facts. ``ValueError`` without the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu measures on the CPU")
    found = machine.facts("gpu" if device == "cuda" else "cpu", torch.device(device), commit)
    if device == "cpu":
        found["memory_kept"] = keep_memory()
    say(machine.sentence(found))
    return Saved(out, kind, key, found, budget, quick)


def run(
    out: Path,
    *,
    device: str,
    quick: bool,
    names: Sequence[str],
    commit: str | None,
    seconds: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    say: Say = lambda line: print(line, flush=True),
) -> int:
    """Measures, writes ``out/<device>/peers-<date>-<commit>.json``; the exit status is 1 if a model is wrong, failed,
    or got slower by more than 5 %. What does not fit into ``minutes`` is recorded as not reached."""
    cases, budget = chosen(names), Budget(minutes)
    saved = opened(out, "peers", "cases", device, commit, quick, budget, say)
    pace = QUICK if quick else Pace() if seconds is None else replace(Pace(), seconds=seconds)
    steps = steps or (5 if quick else CURVE_STEPS)
    entries = saved.data["cases"]
    with saved.whole():
        for case in cases:
            entries.append({"id": case.id, "text": case.text, "library": case.library, "status": "not reached"})
            if budget.left() <= 0:
                say(f"{case.id}: not reached")
                continue

            def save(entry: dict) -> None:
                entries[-1] = entry
                saved.save()

            save(measure(case, pace=pace, device=torch.device(device), quick=quick, steps=steps, save=save))
            say(page.line(entries[-1]))
    say(f"\n{page.table(entries)}\n\n{page.kept(entries)}\n\n{saved.path}")
    # On a quick run no time says anything.
    found = [p for p in page.problems(entries) if not (quick and "slower" in p)]
    for problem in found:
        say(f"PROBLEM: {problem}")
    return 1 if found else 0
