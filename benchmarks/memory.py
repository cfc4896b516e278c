"""Memory that a call takes: bytes kept for the backward, and the peak over what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of ``forward()``: every storage once, inputs among them."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = forward()
    del alive
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """``{"peak_bytes": ...}``, outputs included; nothing on a CPU, whose allocator does not count."""
    if device.type != "cuda":
        return {}
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}


class Traced:
    """Bytes that a call takes, as PyTorch's allocator counts them, on a CPU as well: ``held`` when it has returned and
    its result is still there, and ``peak`` while it ran, both over what was there before."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            kept = call()
            torch.cuda.synchronize(device)
            self.held = torch.cuda.memory_allocated(device) - before
            self.peak = torch.cuda.max_memory_allocated(device) - before
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
                kept = call()
            changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            self.held = self.peak = 0
            for event in sorted(changes, key=lambda e: e.start_ns()):
                self.held += event.nbytes()
                self.peak = max(self.peak, self.held)
        del kept
