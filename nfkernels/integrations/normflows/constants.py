"""What is known when a layer is swapped: kept on its class, one tensor for each device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import qualified
from ..swap import original_of


@functools.cache
def _specialised(layer: type, state: tuple) -> type:
    return type(layer.__name__, (layer,), dict(state))


def specialised(layer: type, **state: Any) -> type:
    """The one subclass of ``layer`` with these (hashable) class attributes."""
    return _specialised(layer, tuple(state.items()))


class Constant:
    """A tensor that never changes: hashable, and made once for each device and type."""

    def __init__(self, values: Sequence | Tensor, dtype: torch.dtype, shape: Sequence[int] = (-1,)) -> None:
        flat = values.flatten().tolist() if isinstance(values, Tensor) else values
        self._values, self._dtype, self._shape = tuple(flat), dtype, tuple(shape)
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        key = device, dtype or self._dtype
        if key not in self._made:
            with torch.inference_mode(False):  # the next call may train
                self._made[key] = torch.tensor(self._values, dtype=key[1], device=device).view(self._shape)
        return self._made[key]

    def _key(self) -> tuple:
        return self._values, self._dtype, self._shape

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def class_of(module: nn.Module) -> str:
    """The qualified name of a module's class, swapped or not."""
    return qualified(original_of(type(module)))


def has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
