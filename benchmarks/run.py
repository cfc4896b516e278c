"""Measuring cases: the gate first, then the times, a record after each. The same code for every device and timer."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .case import BACKWARD, FORWARD, Case, Contender, Op, Sample, draw, exact, needs_grad, prepare
from .gate import compare, same_bits
from .memory import peak_bytes, saved_bytes
from .record import NOT_REACHED, Budget, Record
from .roofline import floor_us
from .tables import case_line
from .timing import Prepared

COPY = "copy"
LAUNCH_BOUND = 2**20  # bytes moved, below which the host's time is told too


@dataclass
class Setting:
    """Where a run measures."""

    device: torch.device
    timer: Any
    cache: int  # bytes of the last-level cache
    most_sets: int
    interleave: bool
    say: Callable[[str], None] = print


def contenders(op: Op, case: Case, device: torch.device) -> list[Contender]:
    """Everyone who can do the case, ours first."""
    public = op.call(case.variant)
    found = [Contender("native", public, "native", ours=True)]
    if device.type == "cuda":
        found.append(Contender("triton", public, "triton", ours=True))
    found.append(Contender("reference", public, "reference"))
    peers = op.peers(case.variant)
    found += [Contender(name, peer.run, peer=peer) for name, peer in peers.items()]
    found.append(Contender("compile", op.plain(case.variant), compiled=True, peer=peers.get("hand-written")))
    # Where noise is a contender's own, the plain function is the hand-written one already.
    if device.type == "cpu" and "hand-written" in peers and not peers["hand-written"].check:
        found.append(Contender("hand-written compiled", peers["hand-written"].run, compiled=True))
    return found


def plan(ops: Iterable[Op], kind: str) -> list[tuple[Op, Case]]:
    """All cases, most important first, ops taking turns."""
    by_op = [[(op, case) for case in op.cases(kind)] for op in ops]
    woven = [pair for turn in itertools.zip_longest(*by_op) for pair in turn if pair is not None]
    return sorted(woven, key=lambda pair: pair[1].importance)


def announce(work: list[tuple[Op, Case]], record: Record, setting: Setting) -> None:
    """Every case of the run into the record as not reached, so that what is missing is told whatever happens."""
    for op, case in work:
        names = [c.name for c in contenders(op, case, setting.device)]
        entry = _entry(op, case, record.data["roofline"])
        record.data["cases"].append(entry | {"contenders": {n: {"status": NOT_REACHED} for n in [*names, COPY]}})
    record.save()


def measure_all(
    work: list[tuple[Op, Case]],
    record: Record,
    setting: Setting,
    budget: Budget,
    *,
    wanted: Callable[[Contender], bool] = lambda c: True,
    reserve: float = 0.0,
) -> int:
    """Measures the cases in order until ``reserve`` seconds are left. Returns how many were reached."""
    for reached, (op, case) in enumerate(work):
        if budget.left() <= reserve:
            return reached
        record.case(measure(op, case, setting, record.data["roofline"], wanted))
        setting.say(case_line(next(c for c in record.data["cases"] if c["id"] == case.id)))
    return len(work)


def measure(op: Op, case: Case, setting: Setting, roofline: dict, wanted=lambda c: True) -> dict[str, Any]:
    """One case's entry. Whatever fails is in it."""
    moved, _ = op.count(case, case.direction)
    chosen = compiled([c for c in contenders(op, case, setting.device) if wanted(c)])
    sets = max(1, min(setting.most_sets, math.ceil(4 * setting.cache / moved)))
    entry = _entry(op, case, roofline) | {"sets": sets, "past_cache": sets * moved >= 2 * setting.cache}
    try:
        short = _memory_short(case, setting.device)
        if short:
            return entry | {"contenders": {c.name: {"status": "skipped", "reason": short} for c in chosen}}
        with setting.timer.ready():
            entry["contenders"] = gate(op, case, chosen, setting.device)
            _time(op, case, chosen, entry, setting, sets)
    except Exception as error:
        for c in chosen:
            if entry["contenders"].get(c.name, {}).get("status", "gated") == "gated":
                entry["contenders"][c.name] = {"status": "failed", "reason": _sentence(error)}
    finally:
        _tidy(setting.device)
    return entry


def _entry(op: Op, case: Case, roofline: dict) -> dict[str, Any]:
    moved, flops = op.count(case, case.direction)
    return {"id": case.id, **case.facts(), "bytes": moved, "flops": flops, "floor_us": floor_us(moved, flops, roofline),
            "contenders": {}}  # fmt: skip


def gate(op: Op, case: Case, chosen: list[Contender], device: torch.device) -> dict[str, dict]:
    """What every contender computes, against float64: an entry per contender, still without times."""
    sample = draw(op, case, device)
    reference = Contender("reference", op.call(case.variant), "reference")
    plain = _once(op, case, reference, sample)
    target = _once(op, case, reference, exact(op, sample))
    found: dict[str, dict] = {}
    for c in chosen:
        try:
            with c.context(needs_grad(case)), compiling(c, case), poisoned(c):
                call = prepare(op, case, c.run, adapted(sample, c))
                got = call()
                if c.peer and c.peer.check:
                    ok, error, reason = c.peer.check(sample.inputs, got), None, "outputs out of their range"
                else:
                    verdict = compare(got, plain, target, ours=c.ours)
                    ok, error, reason = verdict.ok, verdict.error, verdict.reason
                error = None if error is None else float(f"{error:.2g}")
                entry = {"status": "gated" if ok else "wrong", "error": error}
                if not ok:
                    entry["reason"] = reason
                elif c.ours:
                    entry["same_bits"] = all(same_bits(got, call()) for _ in range(4))
        except Exception as error:
            entry = {"status": "unavailable" if _not_here(c, error) else "failed", "reason": _sentence(error)}
        found[c.name] = entry
    return found


def _time(op: Op, case: Case, chosen: list[Contender], entry: dict, setting: Setting, sets: int) -> None:
    good = [c for c in chosen if entry["contenders"][c.name]["status"] == "gated"]
    samples = [draw(op, case, setting.device, seed) for seed in range(sets)]
    host = entry["bytes"] <= LAUNCH_BOUND
    turns = [good] if setting.interleave else [[c] for c in good]
    for turn in turns:
        try:
            ready = {}
            for c in turn:
                with c.context(needs_grad(case)), compiling(c, case):
                    calls = [prepare(op, case, c.run, adapted(s, c)) for s in samples]
                ready[c.name] = Prepared(calls, lambda c=c: c.context(needs_grad(case)))
                entry["contenders"][c.name] |= _memory(op, case, c, samples[0], calls[0], setting)
            if COPY not in entry["contenders"] and any(c.ours for c in turn):
                ready[COPY] = _copies(entry["bytes"], sets, setting.device)
            for name, times in setting.timer.measure(ready, host).items():
                entry["contenders"][name] = entry["contenders"].get(name, {}) | {"status": "measured"} | times
            for c in turn:
                if host and c.ours and not setting.interleave and case.direction == FORWARD and op.differentiable:
                    entry["contenders"][c.name] |= _host_with_gradients(op, c, samples, setting)
            ready.clear()  # graphs that a backward keeps, before the next contender makes its own
        except Exception as error:
            for c in turn:
                entry["contenders"][c.name] |= {"status": "failed", "reason": _sentence(error)}


def _host_with_gradients(op: Op, c: Contender, samples: list[Sample], setting: Setting) -> dict[str, dict]:
    """The host's time of a forward that autograd records."""
    leaves = [{k: v.detach().requires_grad_(k in op.differentiable) for k, v in s.inputs.items()} for s in samples]
    calls = [lambda v=v: c.run(v, False) for v in leaves]
    times = setting.timer.measure({c.name: Prepared(calls, lambda: c.context(True))}, True)[c.name]
    return {"host_grad_us": times["host_us"]}


def _once(op: Op, case: Case, c: Contender, sample: Sample):
    with c.context(needs_grad(case)):
        return prepare(op, case, c.run, sample)()


def _memory(op: Op, case: Case, c: Contender, sample: Sample, call, setting: Setting) -> dict[str, int]:
    with c.context(needs_grad(case)):
        found = peak_bytes(call, setting.device)
        if needs_grad(case):
            theirs = adapted(sample, c).inputs
            leaves = {k: v.detach().requires_grad_(k in op.differentiable) for k, v in theirs.items()}
            found["saved_bytes"] = saved_bytes(lambda: c.run(leaves, False))
    return found


def adapted(sample: Sample, c: Contender) -> Sample:
    return Sample(c.peer.adapt(sample.inputs), sample.cotangents) if c.peer else sample


def _copies(moved: float, sets: int, device: torch.device) -> Prepared:
    """Copies that read half of the bytes and write the other half."""
    pairs = [(a := torch.randn(max(1, int(moved) // 8), device=device), torch.empty_like(a)) for _ in range(sets)]
    return Prepared([lambda a=a, b=b: b.copy_(a) for a, b in pairs], contextlib.nullcontext)


@contextlib.contextmanager
def poisoned(c: Contender):
    """While our kernels are compared, fresh memory is NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if c.ours:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def compiling(c: Contender, case: Case):
    """A graph that runs again must not give its buffers away at the first backward."""
    if not c.compiled or case.direction != BACKWARD:
        yield
        return
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def compiled(chosen: list[Contender]) -> list[Contender]:
    """Contenders whose function goes through torch.compile get it anew, for this case's shape alone."""
    if any(c.compiled for c in chosen):
        torch._dynamo.reset()
    return [replace(c, run=torch.compile(c.run, dynamic=False)) if c.compiled else c for c in chosen]


def _not_here(c: Contender, error: Exception) -> bool:
    """A backend that says that this machine cannot run it."""
    return isinstance(error, RuntimeError) and str(error).startswith(f"the {c.backend} backend")


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _memory_short(case: Case, device: torch.device) -> str | None:
    """Why the case does not fit here: float64 copies, gradients and intermediates of the reference take the most."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = 40 * case.data_bytes
    return None if need <= free else f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are here"


def _tidy(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
