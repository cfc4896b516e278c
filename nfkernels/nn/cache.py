"""What a layer's inverse needs of its parameters, kept while they stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bijection import reads_values

_KEY = "_inverse_cache"


def cached(layer: nn.Module, slot: str, key: Any, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
    """``make()``, or what it gave last time for the same ``key`` and the same values in ``sources``.

    Values are compared, not version counters, which a write through ``.data`` does not move: what is returned is never
    stale. So this is for the CPU and without gradients; anywhere else ``make`` runs every time (on a GPU the comparison
    would wait for the device, and the work saved is a launch or two). One entry for each slot of a layer.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    if needs_grad or not all(reads_values(t) for t in sources):
        return make()
    # Past Module.__setattr__: no part of the layer's state.
    slots = layer.__dict__.setdefault(_KEY, {})
    kept = slots.get(slot)
    if kept is not None and kept[0] == key and all(_same(a, b) for a, b in zip(kept[1], sources, strict=True)):
        return kept[2]
    # No inference tensors, which would fail in a later gradient.
    with torch.inference_mode(False), torch.no_grad():
        value = make()
        slots[slot] = (key, tuple(t.detach().clone() for t in sources), value)
    return value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
