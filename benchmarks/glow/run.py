"""``python -m benchmarks glow``: every setup and the sweep over depth, saved as it goes, tables at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..complexity.measure import keep_memory
from ..complexity.run import Saved
from ..record import Budget
from . import page
from .measure import QUICK_PACE, Bench, Pace, measure_depth, measure_setup
from .setups import CIFAR, DEPTHS, QUICK, SETUPS, taking_part

Say = Callable[[str], None]


def opened(out: Path, device: str, minutes: float | None, quick: bool, commit: str | None, say: Say) -> Saved:
    """A result's file with the machine's facts. ``ValueError`` without the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu measures on the CPU")
    kind = "gpu" if device == "cuda" else "cpu"
    found = machine.facts(kind, torch.device(device), commit)
    if device == "cpu":
        found["memory_kept"] = keep_memory()
    say(machine.sentence(found))
    return Saved(out, "glow", "entries", found, Budget(minutes), quick)


def run(
    out: Path,
    *,
    device: str,
    minutes: float | None,
    quick: bool,
    only: list[str],
    names: list[str],
    commit: str | None,
    seconds: float = Pace.seconds,
    say: Say = lambda line: print(line, flush=True),
) -> int:
    """Measures, writes ``out/<device>/glow-<date>-<commit>.json``; the exit status is 1 if one of ours is wrong or
    failed. ``only``: names of setups, or ``depth``; ``names``: contenders."""
    setups = (QUICK,) if quick else SETUPS[device]
    known = [s.id for s in setups] + ["depth"]
    if set(only) - set(known):
        raise ValueError(
            f"there is no preset {', '.join(sorted(set(only) - set(known)))}; there are {', '.join(known)}"
        )
    contenders = taking_part(device, names, compiled=not quick)
    saved = opened(out, device, minutes, quick, commit, say)
    pace = QUICK_PACE if quick else Pace(seconds=seconds)
    bench = Bench(torch.device(device), pace, saved.budget.left, say, saved.save)
    with saved.whole():
        for setup in setups:
            if not only or setup.id in only:
                say(f"{setup.text}:")
                entry: dict[str, Any] = {"id": setup.id, "setup": setup.facts()}
                saved.data["entries"].append(entry)
                measure_setup(setup, contenders, bench, entry)
        if not only or "depth" in only:
            setup, depths = (QUICK, DEPTHS[:2]) if quick else (CIFAR, DEPTHS)
            entry = {"id": "depth", "setup": setup.facts()}
            saved.data["entries"].append(entry)
            measure_depth(setup, depths, contenders, bench, entry)
    say(f"\n{page.text(page.of_run(saved.data))}\n{saved.path}")
    found = page.problems(saved.data["entries"])
    for problem in found:
        say(f"PROBLEM: {problem}")
    return 1 if found else 0
