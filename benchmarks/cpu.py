"""``python -m benchmarks cpu``: the C++ kernels against the reference, torch.compile and what others write."""

from __future__ import annotations

from pathlib import Path

import torch

from nfkernels._atomic import write_text

from . import machine, roofline
from .record import Budget, Record
from .run import Setting, announce, measure_all, plan
from .tables import device_page
from .timing import CpuTimer

CACHE = 2**26  # rotate past this much at most: some virtual machines report a cache of half a gigabyte


def run(out: Path, *, minutes: float | None, quick: bool, names: list[str], commit: str | None, timer=None) -> int:
    """Measures, writes ``out/<device>/<date>-<commit>.{json,md}``, returns the exit status."""
    from .ops import tables

    ops = tables(names)
    budget, device = Budget(minutes), torch.device("cpu")
    facts = machine.facts("cpu", device, commit)
    print(machine.sentence(facts), flush=True)
    record = Record(out, facts | {"quick": quick}, budget)
    timer = timer or CpuTimer(*((0.02, 5) if quick else ()))
    cache = min(facts["machine"]["last_level_cache_bytes"] or CACHE, CACHE)
    setting = Setting(device, timer, cache, most_sets=2 if quick else 16, interleave=True,
                      say=lambda line: print(line, flush=True))  # fmt: skip
    sizes = {"copy_bytes": 2**20, "matrix": 64} if quick else {"copy_bytes": 2**28, "matrix": 2048}
    record.data["roofline"] = roofline.measure(device, timer, **sizes)
    work = plan(ops, "quick" if quick else "cpu")
    announce(work, record, setting)
    wanted = (lambda c: not c.compiled) if quick else (lambda c: True)
    measure_all(work, record, setting, budget, wanted=wanted)
    return finish(record)


def finish(record: Record) -> int:
    """Writes the page, prints its headlines, tells what is missing and what is wrong. The exit status."""
    record.finish()
    source = f"Measured {record.data['date']} at {record.data['commit']} by `{record.data['command']}`."
    write_text(record.path.with_suffix(".md"), device_page(record.data, source))
    headlines = [case for case in record.data["cases"] if case["headline"]]
    print(f"\n{device_page(record.data | {'cases': headlines}, source)}\n{record.path}")
    missing = record.not_reached()
    if missing:
        print(f"not reached within the budget: {missing[0]} cases, and some contenders of {missing[1]} more")
    for problem in record.problems():
        print(f"PROBLEM: {problem}")
    return 1 if record.problems() else 0
