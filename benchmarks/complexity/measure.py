"""One line of the table: the gate first, then counted operations, then times over the size and their exponents."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..record import NOT_REACHED
from .count import count
from .layers import ROWS, Cost, Sweep
from .peers import Peer

OURS = "nfkernels"
DIRECTIONS = ("inverse", "logdet")
SLOW = 0.3  # seconds a call, after which a contender's sizes end
LEAST_ROUNDS = 4
TOP = 4  # powers of two that an exponent is fitted to: the top decade
EXCESS = 0.25  # of a fitted exponent over the promised one
LARGEST_JACOBIAN = 1024


@dataclass(frozen=True)
class Pace:
    """How long a size is measured: seconds for each call, rounds at most."""

    seconds: float = 0.15
    rounds: int = 60
    sizes: int | None = None  # how many, from the smallest; None for all


QUICK = Pace(seconds=0.01, rounds=3, sizes=TOP)


def made(sweep: Sweep, size: int) -> torch.nn.Module:
    torch.manual_seed(size)
    return made_from(sweep.build(size))


def made_from(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with parameters that are nothing special, far from singular, ready to sample."""
    layer.eval()
    with torch.no_grad():
        for p in layer.parameters():
            wide = p[0].numel() if p.dim() > 1 else 1
            p += 0.1 * torch.randn_like(p) / math.sqrt(wide)
    return layer


def as_peer(layer: torch.nn.Module, shape: tuple[int, ...]) -> Peer:
    like = torch.zeros(ROWS, *shape)
    return Peer(lambda x: layer(x)[0], lambda z: layer.inverse(z)[0], lambda: log_abs_det(layer, like),
                list(layer.parameters()))  # fmt: skip


def log_abs_det(layer: torch.nn.Module, like: Tensor) -> Tensor:
    return layer.log_abs_det(like)


# --- the gate ---------------------------------------------------------------------------------------------------------


def check_ours(sweep: Sweep) -> str | None:
    """What is wrong with the layer at the smallest size, in float64; None if nothing is."""
    size = sweep.sizes[0]
    shape = sweep.shape(size)
    layer = made(sweep, size).double()
    x = torch.randn(ROWS, *shape, dtype=torch.float64)
    with torch.no_grad():
        z, logdet = layer(x)
        back, negative = layer.inverse(z)
        dense = jacobian(lambda v: layer(v)[0], shape, torch.float64)
        expected = torch.linalg.slogdet(dense)[1].expand(ROWS)
        pairs = {
            "inverse(forward(x)) and x": (back, x),
            "forward(x) and the dense matrix": (
                z - layer(torch.zeros_like(x))[0],
                (x.flatten(1) @ dense.mT).view_as(z),
            ),
            "forward's log-determinant and slogdet": (logdet, expected),
            "inverse's log-determinant and -slogdet": (negative, -expected),
            "log_abs_det and slogdet": (log_abs_det(layer, x), expected),
        }
    return next((f"{what} differ" for what, (a, b) in pairs.items() if not close(a, b, 1e-8)), None)


def check_peer(peer: Peer, shape: tuple[int, ...]) -> dict[str, str | None]:
    """The same of a peer, in float32, by direction."""
    x, found = torch.randn(ROWS, *shape), dict.fromkeys(DIRECTIONS)
    for direction in DIRECTIONS:
        try:
            if direction == "inverse" and not close(peer.inverse(peer.forward(x)), x, 1e-3):
                found[direction] = "wrong: inverse(forward(x)) and x differ"
            elif direction == "logdet" and peer.logdet is None:
                found[direction] = "unavailable: its log-determinant comes with the whole transform only"
            elif direction == "logdet":
                dense = jacobian(peer.forward, shape, torch.float32).double()
                positions = math.prod(shape[1:])
                if not close(positions * peer.logdet().double(), torch.linalg.slogdet(dense)[1], 1e-3):
                    found[direction] = "wrong: its log-determinant and slogdet differ"
        except Exception as error:
            found[direction] = f"failed: {sentence(error)}"
    return found


def jacobian(forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of an affine map, dense: ``[out, in]``."""
    n = math.prod(shape)
    if n > LARGEST_JACOBIAN:
        raise ValueError(f"a sweep's smallest size has {n} elements: its dense matrix is too large a check")
    unit = torch.eye(n, dtype=dtype).reshape(n, *shape)
    return (forward(unit) - forward(torch.zeros_like(unit))).flatten(1).mT


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# --- counts -----------------------------------------------------------------------------------------------------------


def counted(sweep: Sweep, size: int) -> dict[str, dict[str, float]]:
    """Operations and moved elements of both directions, each of a fresh layer: nothing is kept of an earlier call."""
    shape = sweep.shape(size)
    z = torch.randn(ROWS, *shape)
    inverse, logdet = (as_peer(made(sweep, size), shape) for _ in range(2))
    found = {"inverse": count(lambda: inverse.inverse(z)), "logdet": count(logdet.logdet)}
    return {name: {"operations": c.operations, "moved": c.moved} for name, c in found.items()}


def growth(cost: Cost, sizes: list[int], values: list[float]) -> float:
    """The steepest exponent of ``values`` between neighbouring sizes, a logarithm taken out where the cost has one."""
    plain = [v / math.log2(n) if cost.log else v for n, v in zip(sizes, values)]
    steps = [math.log2(b / a) / math.log2(n / m) for a, b, m, n in zip(plain, plain[1:], sizes, sizes[1:]) if a > 0]
    return max(steps, default=0.0)


# --- times ------------------------------------------------------------------------------------------------------------


def measure(sweep: Sweep, pace: Pace, left: Callable[[], float] = lambda: math.inf) -> dict[str, Any]:
    """The sweep's entry. ``left`` says how many seconds there are; whatever fails is in the entry."""
    entry = facts(sweep)
    try:
        entry["gate"] = check_ours(sweep) or "passed"
        entry["counted"] = [[n, counted(sweep, n)] for n in sweep.counted]
    except Exception as error:
        entry["gate"] = f"failed: {sentence(error)}"
    entry["contenders"] = {OURS: {d: {"status": NOT_REACHED, "times": []} for d in DIRECTIONS}}
    states = entry["contenders"]
    if entry["gate"] != "passed":
        states[OURS] = {d: {"status": "wrong", "reason": entry["gate"], "times": []} for d in DIRECTIONS}
    for name, build in sweep.peers.items():
        states[name] = gated(build, sweep)
    for size in sweep.powers()[: pace.sizes]:
        running = {n: s for n, s in states.items() if any(d["status"] in (NOT_REACHED, "measured") for d in s.values())}
        if not running or left() <= 0:
            break
        time_at(sweep, size, running, pace)
    for state in (d for s in states.values() for d in s.values()):
        if state["status"] in ("measured", "slow"):
            state["status"] = "measured"
            state["exponent"] = fitted([(n, median) for n, median, _ in state["times"]])
    return entry


def facts(sweep: Sweep) -> dict[str, Any]:
    costs = {"inverse": sweep.inverse, "logdet": sweep.logdet}
    spelled = {d: [{"text": c.text, "exponent": c.exponent, "log": c.log} for c in pair] for d, pair in costs.items()}
    return {"id": sweep.id, "layer": sweep.layer, "row": sweep.row, "over": sweep.over, "fixed": sweep.fixed,
            "promise": {d: pair[0] for d, pair in spelled.items()},
            "claim": {d: pair[1] for d, pair in spelled.items()}, "counted": []}  # fmt: skip


def gated(build: Callable[[int], Peer], sweep: Sweep) -> dict[str, dict]:
    size = sweep.sizes[0]
    torch.manual_seed(size)
    try:
        with torch.no_grad():
            reasons = check_peer(build(size), sweep.shape(size))
    except Exception as error:
        status = "unavailable" if isinstance(error, ModuleNotFoundError) else "failed"
        reasons = dict.fromkeys(DIRECTIONS, f"{status}: {sentence(error)}")
    found = {}
    for direction, reason in reasons.items():
        status, _, why = (reason or "").partition(": ")
        found[direction] = {"status": status, "reason": why} if reason else {"status": NOT_REACHED}
        found[direction]["times"] = []
    return found


def time_at(sweep: Sweep, size: int, states: dict[str, dict], pace: Pace) -> None:
    """One size: all that are still in, in turns. Who takes longer than SLOW is out of the next."""
    shape = sweep.shape(size)
    z = torch.randn(ROWS, *shape)
    calls = {}
    for name, state in states.items():
        try:
            peer = as_peer(made(sweep, size), shape) if name == OURS else sweep.peers[name](size)
        except Exception as error:
            for d in state.values():
                d.update(status="failed", reason=sentence(error))
            continue
        for direction, call in (("inverse", lambda p=peer: p.inverse(z)), ("logdet", peer.logdet)):
            if state[direction]["status"] in (NOT_REACHED, "measured"):
                calls[name, direction] = (call, peer.weights)
    times = in_turns(calls, pace)
    for (name, direction), found in times.items():
        state = states[name][direction]
        if isinstance(found, str):
            state.update(status="failed", reason=found)
            continue
        median = statistics.median(found)
        state["status"] = "slow" if min(found) > SLOW else "measured"
        state["times"].append([size, *(float(f"{1e6 * t:.4g}") for t in (median, min(found)))])


def in_turns(calls: dict, pace: Pace, turn: float = 1e-3) -> dict[Any, list[float] | str]:
    """Seconds of every call, in interleaved rounds; a weight changes before each, so that nothing kept can serve. A
    turn is one call to wake threads and caches from what the others did, and then ``turn`` seconds that count."""
    times: dict[Any, list[float] | str] = {}
    with torch.no_grad():
        repeats = {}
        for key, (call, weights) in calls.items():
            try:
                timed(call, weights, 0)
                repeats[key] = max(1, min(50, round(turn / timed(call, weights, 1))))
                times[key] = []
            except Exception as error:
                times[key] = sentence(error)
        end, done = time.perf_counter() + pace.seconds * len(repeats), 0
        while done < pace.rounds and (done < LEAST_ROUNDS or time.perf_counter() < end):
            for key, count_ in repeats.items():
                call, weights = calls[key]
                timed(call, weights, done)
                times[key].append(statistics.fmean(timed(call, weights, i) for i in range(count_)))
            done += 1
    return times


def keep_memory() -> bool:
    """Has glibc keep what is freed. Otherwise a tensor of some MiB is new pages at every call, whose zeroing costs more
    than what is computed in them: a step in every curve. False where that cannot be had."""
    no_mappings, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(no_mappings, 0) and libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError, TypeError):
        return False


def timed(call: Callable[[], object], weights: list[Tensor], turn: int) -> float:
    for w in weights:
        w[(0,) * w.dim()] += 1e-3 if turn % 2 else -1e-3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fitted(points: list[tuple[float, float]]) -> float | None:
    """The slope of the last TOP points, both axes logarithmic, by least squares; None of fewer."""
    if len(points) < TOP:
        return None
    xs, ys = ([math.log2(p[i]) for p in points[-TOP:]] for i in (0, 1))
    middle = statistics.fmean(xs)
    slope = sum((x - middle) * y for x, y in zip(xs, ys)) / sum((x - middle) ** 2 for x in xs)
    return round(slope, 3)


def allowed(promise: Cost, sizes: list[int]) -> float | None:
    """The promised function's own slope over the sizes that were fitted."""
    return fitted([(n, promise.at(n)) for n in sizes])
