"""What the op benchmarks share: contenders, the correctness gate before any timing, and bytes saved for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COPY = "copy of the same bytes"


def saved_bytes(step: Callable[[], object], keep: set[int]) -> int:
    """Bytes that autograd keeps for the backward of ``step()``, each storage once, those in ``keep`` left out."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in keep:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = step()
    del alive
    return sum(storages.values())


def copy_of(n_bytes: int) -> Callable[[], Tensor]:
    """A copy that reads half of ``n_bytes`` and writes the other half."""
    source = torch.randn(n_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def assert_close(got, want, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
