"""The CUDA timer's own logic, over a torch.cuda that only plays its part: a clock that every call moves."""

import contextlib

import pytest
import torch

from benchmarks.timing import CudaTimer, Prepared


class Played:
    """A device on which a launch takes 10 us of the host and 4 us of the device; a graph's launch takes 2 us."""

    def __init__(self, monkeypatch, capture_fails=False):
        self.device = 0.0
        self.capturing: list | None = None
        self.replays = 0
        played = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = played.device

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class Graph:
            def capture_begin(self):
                played.capturing = []

            def capture_end(self):
                self.calls, played.capturing = played.capturing, None
                if capture_fails:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")

            def replay(self):
                played.replays += 1
                played.device += 2 + 4 * len(self.calls)

        for name, value in {"Stream": lambda device: object(), "Event": Event, "CUDAGraph": Graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())

    def call(self):
        if self.capturing is not None:
            self.capturing.append(1)
        else:
            self.device += 10
        return object()


def measure(played, host):
    timer = CudaTimer(torch.device("cuda", 0), seconds=0.0, replays=10)
    with timer.ready():
        return timer.measure({"a": Prepared([played.call] * 5, torch.no_grad)}, host)["a"]


def test_whole_calls_and_replayed_graphs_are_told_apart(monkeypatch):
    played = Played(monkeypatch)
    found = measure(played, host=True)
    assert found["call_us"]["median"] == 10.0
    assert 4.0 < found["kernel_us"]["median"] <= 4.4  # 2 us for the graph's own launch, spread over its calls
    assert played.replays == 8  # one to warm up, seven timed
    assert set(found) == {"call_us", "wall_us", "host_us", "kernel_us"}


def test_host_time_only_where_asked(monkeypatch):
    assert "host_us" not in measure(Played(monkeypatch), host=False)


def test_what_cannot_be_captured_keeps_its_other_times(monkeypatch):
    found = measure(Played(monkeypatch, capture_fails=True), host=False)
    assert found["graph"] == "operation not permitted when stream is capturing"
    assert "kernel_us" not in found
    assert found["call_us"]["median"] == 10.0


@pytest.mark.gpu
def test_on_a_gpu():
    timer = CudaTimer(torch.device("cuda", 0))
    with timer.ready():
        x = torch.randn(1 << 24, device="cuda")
        found = timer.measure({"a": Prepared([lambda: x.sin()] * 2, torch.no_grad)}, host=True)["a"]
    assert 0 < found["kernel_us"]["min"] <= found["wall_us"]["median"]
    assert found["host_us"]["median"] < found["wall_us"]["median"]
