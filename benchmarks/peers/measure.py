"""One model before and after: the gate first, then times in turns, then memory."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

import torch
from torch import nn

import nfkernels

from ..memory import Traced, saved_bytes
from . import curves
from .cases import Case, Inputs, batches
from .stand_in import without_networks

CURVE_STEPS = 100
_EXACT = 1e-7  # of log_prob and samples in float64, relative to the largest value


@dataclass(frozen=True)
class Pace:
    """Seconds of one measure, and the turns in which before and after alternate."""

    seconds: float = 15.0
    least: int = 7
    most: int = 200


QUICK = Pace(0.0, 2, 2)
Call = Callable[[], object]


@dataclass
class Pair:
    """The model as it is and the same accelerated, with the batches that both see."""

    case: Case
    before: nn.Module
    after: nn.Module
    data: list[Inputs]
    device: torch.device

    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.before, self.after


def built(case: Case, quick: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = case.build(quick).to(device, dtype)
    for part in model.modules():  # nflows' normalizing constant is a float64 buffer that sbi rounds to float32
        if dtype == torch.float64 and isinstance(getattr(part, "_log_z", None), torch.Tensor):
            exact = 0.5 * math.prod(part._shape) * math.log(2 * math.pi)
            part._log_z = torch.tensor(exact, dtype=dtype, device=device)
    return model


def accelerated(case: Case, model: nn.Module, batch: Inputs) -> Any:
    return nfkernels.accelerate(model, case.example(batch), call=case.call, **case.options)


def measure(
    case: Case, *, pace: Pace, device: torch.device, quick: bool, steps: int, save: Callable[[dict], None]
) -> dict[str, Any]:
    """The case's entry; whatever fails is in it. ``save`` is told of every part."""
    entry: dict[str, Any] = {"id": case.id, "text": case.text, "library": case.library, "asked": case.asked}
    if importlib.util.find_spec(case.library) is None:
        return entry | {"status": "unavailable", "reason": f"{case.library} is not installed"}
    entry["version"] = version(case.library)
    entry |= {"status": "failed", "batch": 8 if quick else case.batch, "measures": {}, "lacks": {}}
    with warnings.catch_warnings(), _noted(entry):
        warnings.simplefilter("ignore")  # the peers' own deprecations
        pair = _pair(case, entry, quick, device)
        entry["gate"] = _agree(pair, quick)
        rows = entry["batch"] if quick or case.curve_rows is None else case.curve_rows
        entry["curves"] = curves.compare(case, _maker(case, rows, quick, device), steps, rows, quick)
        if entry["gate"] == "passed":
            entry["gate"] = entry["curves"]["gate"]
        save(entry)
        if entry["gate"] != "passed":
            return entry | {"status": "wrong", "reason": entry["gate"]}
        _settle(device)
        for name, make in _MEASURES.items():
            with _noted(entry, name):
                calls = make(pair, quick)
                if calls is not None:
                    entry["measures"][name] = in_turns(calls, pace, device)
            save(entry)
        with _noted(entry, "memory"):
            entry["memory"] = _memory(pair)
        with _noted(entry, "outside"):
            calls = _outside(pair)
            if calls is not None:
                entry["measures"]["outside"] = in_turns(calls, pace, device)
        if case.whole is not None and device.type == "cpu":
            with _noted(entry, "whole"):
                calls = [lambda a=a: case.whole(a, quick) for a in (False, True)]
                entry["measures"]["whole"] = in_turns(calls, Pace(0.0, min(3, pace.least), 3), device, warm=False)
        entry["status"] = "measured"
    return entry


def version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _noted(entry: dict[str, Any], part: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if part is None:
            entry |= {"status": "failed", "reason": text}
        else:
            entry["lacks"][part] = text


def _pair(case: Case, entry: dict[str, Any], quick: bool, device: torch.device) -> Pair:
    data = list(islice(batches(case, entry["batch"], 5, quick, device), 4))
    before, after = built(case, quick, device), built(case, quick, device)
    begin = time.perf_counter()
    report = accelerated(case, after, data[0])
    entry["accelerate_seconds"] = round(time.perf_counter() - begin, 3)
    for model in (before, after):  # what the first batch initialises is initialised now
        torch.manual_seed(0)
        case.loss(model.train(), *data[0]).backward()
        model.zero_grad()
    entry["layers"], entry["notes"] = told(report), list(report.notes)
    return Pair(case, before, after, data, device)


def told(report: Any) -> list[dict[str, Any]]:
    """The report by class: how many were fused, kept (and why), inactive."""
    counts = Counter((row.layer, row.status, "" if row.status == "fused" else row.reason) for row in report)
    return [{"layer": a, "status": b, "reason": c, "count": n} for (a, b, c), n in counts.items()]


def _maker(case: Case, rows: int, quick: bool, device: torch.device) -> curves.Made:
    def made(fast: bool, dtype: torch.dtype) -> nn.Module:
        model = built(case, quick, device, dtype)
        if fast:
            batch = next(batches(case, rows, 11, quick, device))
            accelerated(case, model, tuple(t.to(dtype) for t in batch))
        return model

    return made


# --- the gate, beside the curves --------------------------------------------------------------------------------------


def _agree(pair: Pair, quick: bool) -> str:
    """log_prob, samples from the same random numbers, and gradients, in float64, of models whose weights have moved.

    (Adam does not see a gradient that is off by a factor: the curves alone would not tell.)
    """
    case = pair.case
    wide = _moved(pair, quick)
    batch = tuple(t.double() for t in pair.data[0])
    rows = min(32, len(batch[0]))
    few = tuple(t[:rows] for t in batch)
    for name, function in (("log_prob", case.log_prob), ("sample", case.sample)):
        if function is None:
            continue
        found = []
        for model in wide:
            torch.manual_seed(4)
            with _wide_by_default(), torch.no_grad():  # their bases draw in the default type
                found.append(function(model, *few) if name == "log_prob" else function(model, rows, *few))
        off = float((found[0] - found[1]).abs().max() / (1 + found[0].abs().max()))
        if not off <= _EXACT:
            return f"{name} in float64 differs by {off:.1e} of its size"
    for model in wide:
        model.zero_grad()
        case.loss(model.train(), *few).backward()
    for (name, ours), (_, theirs) in zip(wide[1].named_parameters(), wide[0].named_parameters()):
        a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
        off = float((a - b).norm() / (b.norm() + 1e-9))
        if not off <= 100 * _EXACT:
            return f"the gradient of {name} in float64 differs by {off:.1e} of its size"
    return "passed"


@torch.no_grad()
def _moved(pair: Pair, quick: bool) -> list[nn.Module]:
    """Both models in float64, initialised by the first batch, the same noise added to their weights."""
    case, wide = pair.case, []
    for fast in (False, True):
        model = built(case, quick, pair.device, torch.float64)
        batch = tuple(t.double() for t in pair.data[0])
        torch.manual_seed(0)
        case.loss(model.train(), *batch)
        generator = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight += 0.1 * noise / max(1, weight.shape[-1], weight[0].numel() if weight.dim() else 1) ** 0.5
        if fast:
            accelerated(case, model, batch)
        wide.append(model.eval())
    return wide


@contextmanager
def _wide_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- what is timed ----------------------------------------------------------------------------------------------------


def _step(pair: Pair, quick: bool) -> list[Call]:
    return [_stepper(pair, model) for model in pair.models()]


def _stepper(pair: Pair, model: nn.Module) -> Call:
    case, turn = pair.case, [0]
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)  # the model stays what it is
    model.train()

    def call() -> None:
        turn[0] += 1
        adam.zero_grad()
        case.loss(model, *pair.data[turn[0] % len(pair.data)]).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        adam.step()

    return call


def _log_prob(pair: Pair, quick: bool) -> list[Call] | None:
    if pair.case.log_prob is None:
        return None
    return [_silent(model, lambda m: pair.case.log_prob(m, *pair.data[0])) for model in pair.models()]


def _sample(pair: Pair, quick: bool) -> list[Call] | None:
    if pair.case.sample is None:
        return None
    rows = len(pair.data[0][0])
    return [_silent(model, lambda m: pair.case.sample(m, rows, *pair.data[0])) for model in pair.models()]


def _silent(model: nn.Module, run: Callable[[nn.Module], object]) -> Call:
    def call() -> None:
        if model.training:
            model.eval()
        with torch.no_grad():
            run(model)

    return call


_MEASURES = {"step": _step, "log_prob": _log_prob, "sample": _sample}


def _outside(pair: Pair) -> list[Call] | None:
    """Forward and backward with stand-ins for networks. It takes the models: nothing else can be measured after."""
    case = pair.case
    if case.networks is None:
        return None
    given = tuple(t.clone() for t in pair.data[0])
    if given[0].is_floating_point():
        given[0].requires_grad_()
    calls = []
    for model in pair.models():
        model.train()
        stand_ins = without_networks(
            model, case.networks(model), lambda m=model: case.loss(m, *given), case.overwritten
        )
        case.loss(model, *given).backward()
        if not all(s.calls for s in stand_ins):
            raise RuntimeError("a stand-in was not asked: its network runs somewhere else")

        def call(model: nn.Module = model) -> None:
            model.zero_grad()
            given[0].grad = None
            case.loss(model, *given).backward()

        calls.append(call)
    return calls


def _memory(pair: Pair) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"saved_bytes": [], "peak_bytes": []}
    for model in pair.models():
        step = _stepper(pair, model)
        step(), step()
        found["saved_bytes"].append(saved_bytes(lambda m=model: pair.case.loss(m, *pair.data[0])))
        model.zero_grad()
        _settle(pair.device)
        found["peak_bytes"].append(Traced(step, pair.device).peak)
    return found


# --- time -------------------------------------------------------------------------------------------------------------


def in_turns(calls: list[Call], pace: Pace, device: torch.device, warm: bool = True) -> dict[str, Any]:
    """Milliseconds before and after, and the factor with its spread, from turns of both. Who begins changes. Without
    ``warm`` each turn is one call and none comes before them: for what lasts seconds."""
    repeats = 1
    if warm:
        for call in calls:
            call(), call()
        repeats = max(1, min(200, round(0.1 / max(_seconds(calls[0], 1, device), 1e-6))))
        for call in calls:
            _seconds(call, repeats, device)
    times: list[list[float]] = [[], []]
    end, done = time.perf_counter() + pace.seconds, 0
    while done < pace.most and (done < pace.least or time.perf_counter() < end):
        for i in (0, 1) if done % 2 else (1, 0):
            times[i].append(1e3 * _seconds(calls[i], repeats, device) / repeats)
        done += 1
    factors = sorted(b / a for b, a in zip(*times))
    low, high = (factors[round(q * (len(factors) - 1))] for q in (0.1, 0.9))
    ratio = {"median": _digits(statistics.median(factors)), "low": _digits(low), "high": _digits(high)}
    before, after = ({"median": _digits(statistics.median(t)), "min": _digits(min(t))} for t in times)
    return {"before_ms": before, "after_ms": after, "ratio": ratio, "rounds": done, "calls": repeats}


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
