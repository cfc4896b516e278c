"""What running a layer a second time needs: the random numbers of the first, and gradients of what has any."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RandomState = tuple[Tensor, Tensor | None]
_thread = threading.local()


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Around a backward that runs layers again: nothing starts from data there."""
    before, _thread.replays = replays(), True
    try:
        yield
    finally:
        _thread.replays = before


def replays() -> bool:
    return getattr(_thread, "replays", False)


def random_state(device: torch.device) -> RandomState:
    """Torch's global generators of the CPU and of ``device``."""
    own = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


def set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """What :func:`as_in_forward` brings back."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextlib.contextmanager
def as_in_forward(device: torch.device, autocast: tuple[bool, torch.dtype]) -> Iterator[None]:
    """With the forward's autocast; the caller's random numbers are put back afterwards."""
    state = random_state(device)
    enabled, dtype = autocast
    try:
        # Without autocast's cache: weights cast in here would outlive the graph they were cast in.
        with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False), replaying():
            yield
    finally:
        set_random_state(state, device)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor | None], **options: Any
) -> list[Tensor | None]:
    """``torch.autograd.grad`` of those outputs that have a graph and were given a gradient; None where none flows."""
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    out, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(out, inputs, grads, allow_unused=True, **options))


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], options: Any = None) -> Any:
    """``torch.func.functional_call`` with stand-ins for parameters, by the names of ``named_parameters()``.

    Each place of a parameter is told to it once: where a module has two names, torch's own search for them fills its
    places twice, and afterwards puts the stand-in back where the parameter was.
    """
    stand_ins = {p: tensors[name] for name, p in module.named_parameters() if name in tensors}
    places = {
        f"{prefix}.{name}" if prefix else name: stand_ins[p]
        for prefix, part in module.named_modules()
        for name, p in part._parameters.items()
        if p is not None and p in stand_ins
    }
    return torch.func.functional_call(module, places, tuple(args), options, tie_weights=False)
