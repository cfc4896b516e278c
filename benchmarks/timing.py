"""How time is told. A timer takes prepared calls over rotated buffers and gives microseconds per call.

On a GPU: a CUDA graph of the calls, replayed between events (``kernel_us``: what the device needs), the calls one by
one between events (``call_us``: with the launches in the way), one call and the wait for it by the wall clock
(``wall_us``) and the host's part alone (``host_us``). On a CPU a call is its wall clock (``call_us``); rounds of all
contenders are interleaved, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass
class Prepared:
    """One contender, ready: a call per set of buffers, and what must be in force while they run."""

    calls: list[Call]
    context: Callable[[], AbstractContextManager]


def spread_of(times: list[float]) -> dict[str, float]:
    """Fastest, median and 90th percentile of microseconds, in four digits."""
    times = sorted(times)
    found = {"min": times[0], "median": statistics.median(times), "p90": times[int(0.9 * (len(times) - 1))]}
    return {k: float(f"{v:.4g}") for k, v in found.items()}


class CpuTimer:
    """Wall clock, contenders interleaved."""

    def __init__(self, seconds: float = 0.8, rounds: int = 150) -> None:
        self.seconds, self.rounds = seconds, rounds

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def measure(self, contenders: dict[str, Prepared], host: bool) -> dict[str, dict]:
        per_turn = {name: self._calls_per_turn(p) for name, p in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        end, done = time.perf_counter() + self.seconds * len(contenders), 0
        while done < self.rounds and (done < 5 or time.perf_counter() < end):
            for name, prepared in contenders.items():
                calls = prepared.calls
                turn = [calls[(done * per_turn[name] + i) % len(calls)] for i in range(per_turn[name])]
                with prepared.context():
                    start = time.perf_counter()
                    for call in turn:
                        call()
                    times[name].append((time.perf_counter() - start) / len(turn) * 1e6)
            done += 1
        return {name: {"call_us": spread_of(t), "rounds": len(t)} for name, t in times.items()}

    @staticmethod
    def _calls_per_turn(prepared: Prepared) -> int:
        """A turn lasts about a millisecond or one call; two calls first, to warm up."""
        with prepared.context():
            prepared.calls[0]()
            start = time.perf_counter()
            prepared.calls[-1]()
            return max(1, min(50, round(1e-3 / (time.perf_counter() - start))))


class CudaTimer:
    """CUDA events and graphs on a stream of its own, one contender after the other."""

    def __init__(self, device: torch.device, seconds: float = 0.15, replays: int = 100) -> None:
        self.device, self.seconds, self.replays = device, seconds, replays
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def measure(self, contenders: dict[str, Prepared], host: bool) -> dict[str, dict]:
        found = {}
        for name, prepared in contenders.items():
            with prepared.context():
                found[name] = self._measure(prepared.calls, host)
        return found

    def _measure(self, calls: list[Call], host: bool) -> dict:
        keep: deque = deque(maxlen=len(calls))  # outputs live until their buffers' turn comes again

        def batch(repeat: int = 1) -> None:
            for _ in range(repeat):
                for call in calls:
                    keep.append(call())

        batch(3)
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch()
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        repeat = max(1, min(16, round(1e-3 / took)))
        count = repeat * len(calls)
        found = {"call_us": spread_of(self._between_events(lambda: batch(repeat), count))}
        found["wall_us"] = spread_of(self._wall(calls))
        if host:
            found["host_us"] = spread_of(self._host(calls))
        try:
            graph = self._captured(lambda: batch(repeat))
            graph.replay()
            found["kernel_us"] = spread_of(self._between_events(graph.replay, count))
            del graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            found["graph"] = str(error).splitlines()[0]
        keep.clear()
        return found

    @staticmethod
    def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what ``run`` issues to the current stream. No garbage is collected meanwhile: freeing what another
        stream holds would end the capture."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()
        try:
            graph.capture_begin()
            try:
                run()
            finally:
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph

    def _between_events(self, run: Callable[[], object], count: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < self.replays and (len(times) < 7 or time.perf_counter() < end):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(self.stream)
            run()
            after.record(self.stream)
            after.synchronize()
            times.append(before.elapsed_time(after) / count * 1e3)
        return times

    def _wall(self, calls: list[Call]) -> list[float]:
        times = []
        for i in range(20):
            start = time.perf_counter()
            kept = calls[i % len(calls)]()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e6)
            del kept
        return times

    def _host(self, calls: list[Call], turns: int = 20, per_turn: int = 50) -> list[float]:
        """Time until a call returns, the device far from behind: only for work that is shorter than its launch."""
        times = []
        for _ in range(turns):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(per_turn):
                calls[i % len(calls)]()
            times.append((time.perf_counter() - start) / per_turn * 1e6)
        torch.cuda.synchronize()
        return times
