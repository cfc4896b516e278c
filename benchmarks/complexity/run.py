"""``python -m benchmarks complexity``: every sweep, saved after each; a table and a picture at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nfkernels._atomic import write_text

from .. import machine
from ..record import Budget, free_name
from . import page, picture
from .layers import sweeps
from .measure import QUICK, Pace, facts, keep_memory, measure

SCHEMA = 1


class Saved:
    """A JSON file ``<kind>-<date>-<commit>.json`` that is whole after every entry. It has no ``schema`` of the ops'
    results, whose reader leaves it alone; ``kind`` names the version in its place."""

    def __init__(self, out: Path, kind: str, key: str, found: dict[str, Any], budget: Budget, quick: bool) -> None:
        folder = Path(out) / found["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = free_name(folder, f"{kind}-{found['date']}-{found['commit']}")
        self.key, self.budget = key, budget
        self.data = {f"{kind}_schema": SCHEMA, **found, "quick": quick, "finished": False, "seconds": 0.0, key: []}

    def add(self, entry: dict[str, Any]) -> None:
        self.data[self.key].append(entry)
        self.save()

    def save(self) -> None:
        self.data["seconds"] = round(self.budget.used(), 1)
        write_text(self.path, json.dumps(self.data, indent=None if self.key == "sweeps" else 1) + "\n")

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.save()
        yield
        self.data["finished"] = True
        self.save()


def run(
    out: Path,
    *,
    minutes: float | None,
    quick: bool,
    names: list[str],
    commit: str | None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Measures, writes ``out/<device>/complexity-<date>-<commit>.json`` and ``complexity.png``; the exit status is 1 if
    a layer of ours is wrong or slower in its size than promised."""
    budget, chosen = Budget(minutes), sweeps(names)
    found = machine.facts("cpu", torch.device("cpu"), commit)
    found["memory_kept"] = keep_memory()
    say(machine.sentence(found))
    saved = Saved(out, "complexity", "sweeps", found, budget, quick)
    with saved.whole():
        for sweep in chosen:
            if budget.left() <= 0:
                saved.add(facts(sweep) | {"gate": "not reached", "contenders": {}})
                say(f"{sweep.id}: not reached")
                continue
            saved.add(measure(sweep, QUICK if quick else Pace(), budget.left))
            say(page.line(saved.data["sweeps"][-1]))
    merged = saved.data | {"sweeps": {e["id"]: e for e in saved.data["sweeps"]}}
    say(f"\n{page.table(merged)}\n\n{page.peers_table(merged)}\n")
    if not quick:
        known = page.newest(saved.path.parent, "complexity", "sweeps")  # of earlier runs too, if this one had --layers
        picture.draw(known, saved.path.with_name("complexity.png"))
    say(str(saved.path))
    problems = [p for e in saved.data["sweeps"] for p in page.problems(e)]
    for problem in problems:
        say(f"PROBLEM: {problem}")
    return 1 if problems else 0
