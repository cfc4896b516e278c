"""Measuring contenders on one setup: training step, the part outside networks, sampling, memory, and all over depth."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..memory import Traced, saved_bytes
from . import gate
from .models import CAPTURED_AFTER, RECIPE, Ready, Unavailable, make, seeded_images, start
from .setups import Contender, Setup
from .stand_in import without_networks


@dataclass(frozen=True)
class Pace:
    """How long: seconds per contender and measure, and the rounds in which the contenders take turns."""

    seconds: float = 20.0
    least: int = 5
    most: int = 60


QUICK_PACE = Pace(0.0, 2, 2)


@dataclass
class Bench:
    """Where it is measured, how long, and whom to tell."""

    device: torch.device
    pace: Pace
    left: Callable[[], float]  # seconds of the budget
    say: Callable[[str], None]
    save: Callable[[], None]

    @property
    def apart(self) -> bool:
        """Whether contenders run one after the other: a GPU has memory for one, and nobody else on it."""
        return self.device.type == "cuda"


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def noted(entry: dict[str, Any], part: str | None = None) -> Iterator[None]:
    """Errors become the entry's: its status, or, of one ``part``, a status and reason beside the numbers."""
    try:
        yield
    except Exception as error:
        status = "unavailable" if isinstance(error, Unavailable) else "failed"
        reason = str(error) if status == "unavailable" else sentence(error)
        if isinstance(error, torch.OutOfMemoryError):
            reason = "out of memory"
        found = {"status": status, "reason": reason}
        entry |= found if part is None else {"lacks": entry.get("lacks", {}) | {part: found}}


def settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def in_turns(calls: dict[str, Callable[[], object]], bench: Bench) -> dict[str, dict[str, float]]:
    """Milliseconds per call, in rounds of all: short calls are made for a tenth of a second, long ones once."""
    repeats, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        repeat(call, CAPTURED_AFTER if bench.apart else 1)
        repeats[name] = max(1, min(200, round(0.1 / max(seconds_of(call, bench.device), 1e-6))))
    end, done, pace = time.perf_counter() + bench.pace.seconds * len(calls), 0, bench.pace
    while done < pace.most and (done < pace.least or (time.perf_counter() < end and bench.left() > 0)):
        for name, call in calls.items():
            times[name].append(1e3 * seconds_of(partial(repeat, call, repeats[name]), bench.device) / repeats[name])
        done += 1
    return {name: spread(of) for name, of in times.items()}


def repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def spread(milliseconds: list[float]) -> dict[str, float]:
    found = {"min": min(milliseconds), "median": statistics.median(milliseconds), "max": max(milliseconds)}
    return {k: float(f"{v:.4g}") for k, v in found.items()} | {"rounds": len(milliseconds)}


def measure_setup(setup: Setup, contenders: Iterable[Contender], bench: Bench, entry: dict[str, Any]) -> None:
    """Fills ``entry["contenders"]``, saving as it goes."""
    contenders = [c for c in contenders if setup.whole or c.compiled in (None, "steps")]
    entry["contenders"] = found = {c.name: {"status": "not reached", **facts(c)} for c in contenders}
    bench.save()
    glow = start(setup)
    x = glow.dequantize(seeded_images(setup, setup.checked)).to(bench.device)
    truths: dict[bool, gate.Truth] = {}
    for group in [[c] for c in contenders] if bench.apart else [contenders]:
        ready = []
        for contender in group:
            if bench.left() <= 0:
                continue
            ready += [one] if (one := _gated(contender, setup, glow, x, truths, bench, found[contender.name])) else []
        _timed(ready, setup, bench, found)
        bench.save()
        for contender in group:
            bench.say(f"  {line(contender.name, found[contender.name])}")
        ready.clear()
        if bench.apart and any(c.compiled for c in group):
            torch._dynamo.reset()  # and with it the memory of its graphs
        settle(bench.device)


def facts(contender: Contender) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(contender).items() if k not in ("name", "devices") and v}


def _gated(contender, setup, glow, x, truths, bench: Bench, entry: dict[str, Any]) -> Ready | None:
    """A contender that is right, or None and the reason in ``entry``."""
    with noted(entry):
        split_priors = contender.maker != "normflows"
        if split_priors not in truths:
            truths[split_priors] = gate.truth(setup, glow, x, split_priors=split_priors)
            settle(bench.device)
        ready = make(contender, setup, glow, bench.device)
        errors = gate.errors(ready, truths[split_priors])
        entry |= {name: float(f"{value:.3g}") for name, value in errors.items()}
        reason = gate.verdict(errors, contender.precision)
        if reason is None:
            entry["status"] = "right"
            return ready
        entry |= {"status": "wrong", "reason": reason}
    return None


def _timed(ready: list[Ready], setup: Setup, bench: Bench, found: dict[str, dict]) -> None:
    """Samples, step (memory with it), and the part of the step outside networks."""
    samples = {one.contender.name: partial(one.sample, setup.checked) for one in ready}
    for name, times in timed(samples, bench, found, "sample").items():
        found[name] |= {"sample_ms": times, "samples": setup.checked}
    steps = {}
    for one in ready:
        entry = found[one.contender.name]
        for batch in setup.batches or (setup.batch,):
            if (step := _step(one, setup, batch, bench, entry)) is not None:
                steps[one.contender.name] = step
                break
    for name, times in timed(steps, bench, found, "step").items():
        found[name] |= {"status": "measured", "step_ms": times}
    steps.clear()
    # One whose networks do not run in another precision and that nothing has compiled.
    bare = [one.contender for one in ready if not (one.contender.compiled or one.contender.graph)]
    for memory in ("stored", "reversible"):
        _outside([c for c in bare if c.precision is None and c.memory == memory], memory, setup, bench, found)


def _step(one: Ready, setup: Setup, batch: int, bench: Bench, entry: dict[str, Any]) -> Callable[[], object] | None:
    """A contender's whole training step, run three times, with the memory that it takes; None if it fails."""
    entry.get("lacks", {}).pop("step", None)  # of a larger batch
    with noted(entry, "step"):
        settle(bench.device)
        before = unused(bench.device)
        step = one.stepper(seeded_images(setup, 4 * batch), dataclasses.replace(RECIPE, batch_size=batch))
        step(), step()
        peak = Traced(step, bench.device).peak
        entry |= {"batch": batch, "peak_bytes": peak}
        if one.contender.graph or one.contender.compiled == "reduce-overhead":
            # A captured graph's memory counts as reserved and never as allocated.
            entry["reserved_bytes"] = unused(bench.device) - before
        return step
    return None


def _outside(contenders: list[Contender], memory: str, setup: Setup, bench: Bench, found: dict[str, dict]) -> None:
    if not contenders:
        return
    narrow = dataclasses.replace(setup, hidden=1, dropout=0.0)
    glow, images = start(narrow), seeded_images(setup, setup.checked).to(bench.device)
    models = {}
    for contender in contenders:
        with noted(found[contender.name], "outside"):
            models[contender.name] = make(contender, narrow, glow, bench.device)
            models[contender.name].model.train()

    def bare(one: Ready) -> None:
        one.from_images(images).backward()
        one.forget_gradients()

    with without_networks([one.model for one in models.values()], weights=memory == "reversible"):
        times = timed({name: partial(bare, one) for name, one in models.items()}, bench, found, "outside")
    for name, of in times.items():
        found[name]["outside_ms"] = of


def timed(calls: dict[str, Callable[[], object]], bench: Bench, found: dict[str, dict], part: str) -> dict[str, dict]:
    """``in_turns`` of those that run; the others' entries say why there is no time."""
    running = {}
    for name, call in calls.items():
        with noted(found[name], part):
            call()
            running[name] = call
    return in_turns(running, bench)


def unused(device: torch.device) -> int:
    """Bytes that PyTorch has of the GPU beyond those that tensors hold."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure_depth(
    setup: Setup, depths: Iterable[int], contenders: Iterable[Contender], bench: Bench, entry: dict
) -> None:
    """Of every depth: the gate's errors, and bytes per image that wait for the backward, told twice: ``saved`` is what
    autograd was handed, ``held`` what the allocator has given out when the forward has returned. Parameters and what
    depends on them alone are in neither: it is the difference of three images and one."""
    chosen = [c for c in contenders if c.compiled is None and not c.graph]
    entry["contenders"] = found = {c.name: {"status": "not reached", **facts(c), "depths": []} for c in chosen}
    for depth in depths:
        deep = dataclasses.replace(setup, steps=depth, dropout=0.0)
        glow = start(deep)
        x = glow.dequantize(seeded_images(setup, 3)).to(bench.device)
        truths: dict[bool, gate.Truth] = {}
        for contender in chosen:
            state = found[contender.name]
            if bench.left() <= 0 or state["status"] not in ("not reached", "measured"):
                continue
            told: dict[str, Any] = {"depth": depth}
            one = _gated(contender, deep, glow, x[:2], truths, bench, told)
            if one is None:
                state |= {k: told[k] for k in ("status", "reason")}
                continue
            one.model.train()
            told["status"] = "measured"
            three, single = partial(one.loss, x), partial(one.loss, x[:1])
            three(), single()
            held = Traced(three, bench.device).held - Traced(single, bench.device).held
            told |= {"held_bytes": held // 2, "saved_bytes": (saved_bytes(three) - saved_bytes(single)) // 2}
            state["status"] = "measured"
            state["depths"].append(told)
            del one
            settle(bench.device)
        bench.save()
        bench.say(f"  depth {depth}: " + "; ".join(depth_line(n, s, depth) for n, s in found.items()))


def line(name: str, entry: dict[str, Any]) -> str:
    """A contender on one line of the terminal."""
    if "step_ms" not in entry:
        reason = entry.get("reason") or entry.get("lacks", {}).get("step", {}).get("reason", "")
        return f"{name}: {entry['status']} ({reason})"
    parts = [f"step {entry['step_ms']['median']:,.4g} ms at batch {entry['batch']}"]
    parts += [f"{k} {entry[f'{k}_ms']['median']:,.4g} ms" for k in ("outside", "sample") if f"{k}_ms" in entry]
    parts += [f"peak {entry['peak_bytes'] / 2**20:,.1f} MiB"]
    parts += [f"no {part} ({of['reason']})" for part, of in entry.get("lacks", {}).items()]
    return f"{name}: " + ", ".join(parts)


def depth_line(name: str, state: dict[str, Any], depth: int) -> str:
    told = next((d for d in state["depths"] if d["depth"] == depth), None)
    if told is None:
        return f"{name} {state['status']}"
    return f"{name} holds {told['held_bytes'] / 2**20:.2f} MiB per image, rebuilds to {told['rebuilt_error']:.1g}"
