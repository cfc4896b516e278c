"""Bars: calls of ours beside what others write, in one process, on one input, with the ratio that was asked for.

Each contender is checked first: outputs and gradients against the same in float64, inverses against what was put in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine
from .complexity.measure import OURS, Pace, in_turns, keep_memory, sentence
from .record import Budget

QUICK = Pace(seconds=0.01, rounds=3)
CAREFUL = Pace(seconds=1.5, rounds=400)
TURN = 0.02


@dataclass
class Contender:
    """``call`` is timed; ``check()`` says whether it computes the right thing. ``weights`` change between calls."""

    call: Callable[[], Any]
    check: Callable[[], bool]
    weights: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    id: str
    asked: str
    build: Callable[[bool], dict[str, Callable[[], Contender]]]  # ours first; quick ones are small
    ratios: tuple[tuple[str, str, str], ...]  # text, of whom, over whom


def over(*names: str) -> tuple[tuple[str, str, str], ...]:
    """How many times our time they take."""
    return tuple((f"{name} takes", name, OURS) for name in names)


def measure(bar: Bar, quick: bool) -> dict[str, Any]:
    """A bar's entry: gate, times, ratios. Whatever fails is in it."""
    entry = {"id": bar.id, "asked": bar.asked, "gate": "passed", "contenders": {}, "ratios": []}
    calls = {}
    torch.manual_seed(0)
    try:
        builders = bar.build(quick)
    except Exception as error:
        return entry | {"gate": "failed", "contenders": {OURS: {"status": "failed", "reason": sentence(error)}}}
    for name, build in builders.items():
        try:
            contender = build()
            with torch.no_grad():
                right = contender.check()
            if right:
                calls[name] = (contender.call, contender.weights)
            entry["contenders"][name] = {"status": "gated" if right else "wrong", "reason": "off its float64 self"}
        except Exception as error:
            status = "unavailable" if isinstance(error, ModuleNotFoundError) else "failed"
            entry["contenders"][name] = {"status": status, "reason": sentence(error)}
    for name, times in in_turns(calls, QUICK if quick else CAREFUL, TURN).items():
        if isinstance(times, str):
            entry["contenders"][name] = {"status": "failed", "reason": times}
            continue
        figures = {"median_us": statistics.median(times), "min_us": min(times)}
        rounded = {k: float(f"{1e6 * v:.4g}") for k, v in figures.items()}
        entry["contenders"][name] = {"status": "measured", "rounds": len(times), **rounded}
    if entry["contenders"][OURS]["status"] != "measured":
        entry["gate"] = "failed"
    for text, top, bottom in bar.ratios:
        pair = [entry["contenders"][n] for n in (top, bottom)]
        if all(s["status"] == "measured" for s in pair):
            ratio = pair[0]["median_us"] / pair[1]["median_us"]
            entry["ratios"].append({"text": text, "ratio": float(f"{ratio:.4g}")})
    return entry


def run(
    kind: str,
    bars: Sequence[Bar],
    out: Path,
    *,
    quick: bool,
    commit: str | None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Measures, prints, writes ``out/<device>/<kind>-<date>-<commit>.json``. 1 if one of ours failed or is wrong."""
    from .complexity.page import bars_table
    from .complexity.run import Saved

    found = machine.facts("cpu", torch.device("cpu"), commit)
    found["memory_kept"] = keep_memory()
    say(machine.sentence(found))
    saved = Saved(out, kind, "bars", found, Budget(None), quick)
    with saved.whole():
        for bar in bars:
            saved.add(measure(bar, quick))
    entries = saved.data["bars"]
    say(f"\n{bars_table({'bars': {e['id']: e for e in entries}})}\n\n{saved.path}")
    failed = [e for e in entries if e["gate"] != "passed"]
    for entry in failed:
        say(f"PROBLEM: {entry['id']}: {entry['contenders'][OURS]['status']}: {entry['contenders'][OURS].get('reason')}")
    return 1 if failed else 0
