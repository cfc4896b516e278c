"""One run's results on the disk: a JSON file that is whole after every case, named by date and commit, never reused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfkernels._atomic import write_text

SCHEMA = 1
NOT_REACHED = "not reached"


class Budget:
    """What is left of a run's minutes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.start = clock, clock()
        self.seconds = None if minutes is None else minutes * 60

    def used(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.used()


class Record:
    """The results of a run, saved after every change."""

    def __init__(self, out: Path, facts: dict[str, Any], budget: Budget) -> None:
        folder = Path(out) / facts["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = free_name(folder, f"{facts['date']}-{facts['commit']}")
        self.budget = budget
        self.data: dict[str, Any] = {
            "schema": SCHEMA, **facts, "finished": False, "seconds": 0.0, "stages": {}, "roofline": {}, "cases": []
        }  # fmt: skip
        self.save()

    @property
    def stem(self) -> str:
        return str(self.path.with_suffix(""))

    def save(self) -> None:
        self.data["seconds"] = round(self.budget.used(), 1)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def stage(self, name: str, result: dict[str, Any]) -> None:
        self.data["stages"][name] = result
        self.save()

    def case(self, entry: dict[str, Any]) -> None:
        """Puts an entry in, in the place of what is known of the same case; contenders that it lacks are kept."""
        for index, old in enumerate(self.data["cases"]):
            if old["id"] == entry["id"]:
                self.data["cases"][index] = {**old, **entry, "contenders": {**old["contenders"], **entry["contenders"]}}
                break
        else:
            self.data["cases"].append(entry)
        self.save()

    def finish(self) -> None:
        self.data["finished"] = True
        self.save()

    def not_reached(self) -> tuple[int, int] | None:
        """How many cases nobody was measured on, and on how many more somebody was not; None if all were."""
        states = [[e["status"] == NOT_REACHED for e in case["contenders"].values()] for case in self.data["cases"]]
        whole = sum(all(s) for s in states)
        return (whole, sum(any(s) for s in states) - whole) if any(map(any, states)) else None

    def problems(self) -> list[str]:
        """One line for everything that failed, was wrong, or differed between runs."""
        found = []
        for case in self.data["cases"]:
            for name, entry in case["contenders"].items():
                if entry["status"] in ("failed", "wrong"):
                    found.append(f"{case['id']}, {name}: {entry['status']}: {entry['reason']}")
                elif entry.get("same_bits") is False:
                    found.append(f"{case['id']}, {name}: runs on the same inputs differ")
        for name, stage in self.data["stages"].items():
            if stage["status"] == "failed":
                found.append(f"{name}: {stage['reason']}")
        return found


def free_name(folder: Path, stem: str) -> Path:
    path, count = folder / f"{stem}.json", 2
    while path.exists():
        path, count = folder / f"{stem}-{count}.json", count + 1
    return path
