"""Stand-ins for what only a GPU or a long time has: a timer, a shell, a clock, and made-up results."""

from __future__ import annotations

import contextlib

from benchmarks.stages import Finished


class FakeTimer:
    """Calls everything once and says a fixed time; counts how often it was asked."""

    def __init__(self, clock=None, seconds: float = 0.0) -> None:
        self.measured: list[str] = []
        self.clock, self.seconds = clock, seconds

    @contextlib.contextmanager
    def ready(self):
        yield

    def measure(self, contenders, host):
        found = {}
        for name, prepared in contenders.items():
            with prepared.context():
                for call in prepared.calls:
                    call()
            self.measured.append(name)
            times = {"min": 9.0, "median": 10.0, "p90": 12.0}
            found[name] = {"call_us": times, "kernel_us": times, "wall_us": times} | (
                {"host_us": times} if host else {}
            )
        if self.clock:
            self.clock.now += self.seconds
        return found


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeShell:
    """Answers commands by the first of its words that it knows."""

    def __init__(self, **answers: Finished) -> None:
        self.answers, self.commands, self.extras = answers, [], []

    def __call__(self, command, limit, extra):
        self.commands.append(command)
        self.extras.append(extra)
        return next((a for word, a in self.answers.items() if any(word in part for part in command)), Finished(0, ""))


def times(microseconds: float) -> dict[str, float]:
    return {"min": microseconds * 0.9, "median": microseconds, "p90": microseconds * 1.2}


def made_up_case(op: str, direction: str, shape: list[int], contenders: dict, *, moved: float, headline: bool = True):
    elements = 1
    for n in shape:
        elements *= n
    return {
        "id": f"{op} {direction} {'x'.join(map(str, shape))}", "op": op, "direction": direction, "shape": shape,
        "variant": "",
        "dtype": "torch.float32", "params_dtype": "torch.float32", "channels_last": False, "data_bytes": 4 * elements,
        "headline": headline, "bytes": moved * 4 * elements, "flops": 0,
        "floor_us": moved * 4 * elements / 4e12 * 1e6, "sets": 3, "past_cache": True, "contenders": contenders,
    }  # fmt: skip


def made_up_run(cases: list[dict], **changes) -> dict:
    return {
        "schema": 1, "kind": "gpu", "folder": "nvidia-h200",
        "machine": {"name": "NVIDIA H200", "capability": "9.0", "driver": "1.2", "multiprocessors": 132,
                    "memory_bytes": 2**37, "last_level_cache_bytes": 2**26, "count": 1, "cpu": "?"},
        "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "nvcc": "13.0", "nfkernels": "0.1.0"},
        "commit": "aaaaaaa", "dirty": False, "date": "2030-01-02", "time": "03:04:05 UTC", "quick": False,
        "command": "python -m benchmarks gpu", "finished": True, "seconds": 400.0,
        "stages": {"tests": {"status": "done", "reason": "12 passed"}}, "roofline": {"copy_bytes_per_s": 4e12},
        "cases": cases, **changes,
    }  # fmt: skip


def measured(call: float, kernel: float | None = None, **more) -> dict:
    return {"status": "measured", "error": 1e-7, "call_us": times(call), "kernel_us": times(kernel or call), **more}
