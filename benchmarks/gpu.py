"""``python -m benchmarks gpu``: builds, tests, checks and measures on this GPU, most important first."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import machine, roofline, stages
from .case import HEADLINE
from .cpu import finish
from .record import Budget, Record
from .run import Setting, announce, measure_all, plan
from .tables import case_table
from .timing import CudaTimer

HEADLINE_SECONDS = 60.0  # of a run, for its first partial table
SHARES = {"build": 0.5, "tests": 0.25, "sanitizer": 0.25, "peers": 0.5}  # of what is left, at most
NO_GPU = (
    "no CUDA device here: `python -m benchmarks gpu` needs one; `python -m benchmarks cpu` measures the CPU kernels"
)


def run(
    out: Path,
    *,
    minutes: float | None,
    quick: bool,
    names: list[str],
    commit: str | None,
    skip: list[str] = (),
    device: torch.device | None = None,
    timer=None,
    shell: stages.Shell = stages.shell,
    peers: Callable[..., int] | None = None,
    clock: Callable[[], float] | None = None,
) -> int:
    """Measures, writes ``out/<device>/<date>-<commit>.{json,md}``, returns the exit status. A test gives another
    device, timer, shell, clock and measurement of the peers."""
    if device is None:
        if not torch.cuda.is_available() or torch.version.hip:
            print(NO_GPU, file=sys.stderr)
            return 1
        device = torch.device("cuda", 0)
    kind = "gpu" if device.type == "cuda" else "cpu"
    budget = Budget(minutes, **({"clock": clock} if clock else {}))

    def say(line: str) -> None:
        print(f"[{budget.used():5.0f} s] {line}", flush=True)

    built = None
    if "build" not in skip:
        architecture = machine.gpu_facts(device)["capability"] if kind == "gpu" else ""
        built = stages.build(budget.left() * SHARES["build"] if minutes else 1800.0, architecture, shell)
    from .ops import tables  # only now: it imports the compiled modules

    ops = tables(names)
    facts = machine.facts(kind, device, commit)
    say(machine.sentence(facts))
    record = Record(out, facts | {"quick": quick}, budget)
    _stage(record, say, "build", built)

    timer = timer or CudaTimer(device)
    cache = facts["machine"]["last_level_cache_bytes"] or 2**26
    setting = Setting(device, timer, cache, most_sets=2 if quick else 64, interleave=False, say=say)
    sizes = {"copy_bytes": 2**20, "matrix": 64} if quick else {"copy_bytes": 2**31, "matrix": 8192}
    try:
        record.data["roofline"] = roofline.measure(device, timer, **sizes)
        record.save()
    except RuntimeError as error:
        _stage(record, say, "roofline", {"status": "failed", "reason": str(error).splitlines()[0]})
    say(str(record.data["roofline"]))

    gc.collect()
    gc.freeze()  # what is here now stays: every later collection is short
    work = plan(ops, "quick" if quick else "cuda")
    announce(work, record, setting)

    def eager(contender) -> bool:
        return not contender.compiled

    headline = [pair for pair in work if pair[1].importance == HEADLINE]
    reserve = max(0.0, budget.left() - HEADLINE_SECONDS) if minutes else 0.0
    first = measure_all(headline, record, setting, budget, wanted=eager, reserve=reserve)
    print(f"\nSo far:\n\n{case_table({**record.data, 'cases': record.data['cases'][:first]})}\n", flush=True)

    if "tests" not in skip:
        limit = budget.left() * SHARES["tests"] if minutes else 1800.0
        _stage(record, say, "tests", stages.gpu_tests(limit, Path(record.stem + "-tests.log"), shell))
    if "sanitizer" not in skip:
        limit = budget.left() * SHARES["sanitizer"] if minutes else 600.0
        _stage(record, say, "sanitizer", stages.sanitizer(limit, shell))

    rest = work[:]
    del rest[:first]
    measure_all(rest, record, setting, budget, wanted=eager)
    if "peers" not in skip:
        limit = budget.left() * SHARES["peers"] / 60 if minutes else None
        _stage(record, say, "peers", _peers(peers, out, limit, quick, commit))
    # Compiling takes seconds a case and is not what is under test: last, as far as the budget goes.
    if not quick:
        measure_all(work, record, setting, budget, wanted=lambda c: c.compiled)
    return finish(record)


def _peers(measure: Callable[..., int] | None, out: Path, minutes: float | None, quick: bool, commit: str | None):
    """Other libraries' models before and after ``accelerate``, with results of their own."""
    if measure is None:
        from .peers.layers import installed
        from .peers.run import run as measure

        if not any(map(installed, ("nflows", "normflows", "zuko", "FrEIA"))):
            return {"status": "skipped", "reason": "none of nflows, normflows, zuko, FrEIA is installed"}
    try:
        code = measure(out, device="cuda", quick=quick, names=[], commit=commit, seconds=2.0, minutes=minutes)
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    reason = "see peers-*.json" if code == 0 else "a model is wrong, failed or got slower: see peers-*.json"
    return {"status": "failed" if code else "done", "reason": reason}


def _stage(record: Record, say: Callable[[str], None], name: str, result: dict | None) -> None:
    if result is not None:
        record.stage(name, result)
        say(f"{name}: {result['status']}: {result['reason']}")
