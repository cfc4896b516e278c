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
