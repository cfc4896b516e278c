"""One list of cases for each library: a new adapter is tested by being listed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def _forward(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


@dataclass(frozen=True)
class Case:
    """One layer (or a small model) of another library, and how its users call it.

    ``make()`` builds it in float32 (the caller seeds), small and with a small network; ``inputs()`` gives the
    positional arguments, the data first. ``call(module, *inputs)`` is the direction that is trained, and returns what
    the library returns; ``inverse(module, out, *inputs)``, from what ``call`` returned, is the way back, or None.
    ``status`` is what accelerate must report of every layer named in ``layers`` (paths; "" is the module itself).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    call: Callable[..., Any] = _forward
    inverse: Callable[..., Any] | None = None
    layers: tuple[str, ...] = ("",)
    status: str = "fused"
    # Tests that this case cannot take part in, and why: {"compile": "..."}, "func", "double", "autocast", "train" ...
    skip: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def loss_of(out: Any) -> Tensor:
    """A negative log-likelihood, whatever the structure: squares of the data, minus the log-determinants. By a
    library's habits these are 0-dimensional, (1,), (B,), None or the integer 0."""
    leaves = torch.utils._pytree.tree_flatten(out)[0]
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    data = [t for t in tensors if t.dim() > 1]
    logdets = [t for t in tensors if t.dim() <= 1]
    total = sum((0.5 * t.square().flatten(1).sum(1).mean() for t in data), torch.zeros((), dtype=tensors[0].dtype))
    return total - sum(t.mean() for t in logdets)


_LISTS = {
    "nflows_cases": "nflows",
    "nflows_net_cases": "nflows",
    "normflows_cases": "normflows",
    "freia_cases": "FrEIA",
    "zuko_cases": "zuko",
    "glow_port_cases": None,
    "speech_cases": None,
}


def cases() -> list[Case]:
    """All cases of the libraries that are installed here."""
    found: list[Case] = []
    for name, library in _LISTS.items():
        here = importlib.util.find_spec(f"{__name__}.{name}") is not None
        if here and (library is None or importlib.util.find_spec(library) is not None):
            found += importlib.import_module(f"{__name__}.{name}").CASES
    return found
