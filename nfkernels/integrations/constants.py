"""What is known when a layer is swapped: kept on its class, as one tensor for each device and type that asks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _specialised(layer: type, state: tuple) -> type:
    return type(layer.__name__, (layer,), dict(state))


def specialised(layer: type, **state: Any) -> type:
    """The one subclass of ``layer`` with these (hashable) class attributes."""
    return _specialised(layer, tuple(state.items()))


class Constant:
    """A tensor that never changes: hashable, so that a class can be made for it, and made once for each device and
    type, so that ``torch.compile`` sees constants. Of numbers, or of a tensor, whose shape it has unless told."""

    def __init__(
        self, values: Sequence | Tensor, dtype: torch.dtype = torch.int64, shape: Sequence[int] | None = None
    ) -> None:
        if isinstance(values, Tensor):
            shape = values.shape if shape is None else shape
            values = values.flatten().tolist()
        self._values, self._dtype, self._shape = tuple(values), dtype, (-1,) if shape is None else tuple(shape)
        self._hash = hash((self._values, self._dtype, self._shape))
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        key = device, dtype or self._dtype
        if key not in self._made:
            with torch.inference_mode(False):  # the next call may train
                self._made[key] = torch.tensor(self._values, dtype=key[1], device=device).view(self._shape)
        return self._made[key]

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and (self._values, self._dtype, self._shape) == (
            other._values, other._dtype, other._shape,
        )  # fmt: skip

    def __hash__(self) -> int:
        return self._hash
