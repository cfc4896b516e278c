"""Index sets of couplings, known when a layer is swapped: no mask is looked at during a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.coupling import as_slice


@dataclass(frozen=True)
class Split:
    """Which of C channels a coupling transforms; the others decide. Hashable, so that a class can be made for it."""

    transformed: tuple[int, ...]
    identity: tuple[int, ...]

    @staticmethod
    def of(transformed: Tensor, identity: Tensor) -> Split | None:
        """The split of two index tensors; None unless they are the two ascending parts of one whole, as a channel map
        needs them."""
        t, i = tuple(transformed.tolist()), tuple(identity.tolist())
        whole = sorted(t + i) == list(range(len(t) + len(i))) and list(t) == sorted(t) and bool(t)
        return Split(t, i) if whole else None

    def channel_map(self, device: torch.device) -> Tensor:
        """int64 ``[C]``: the place of each transformed channel among the conditioner's outputs, -1 for the others."""
        return _channel_map(self, device)

    def kept(self, x: Tensor) -> Tensor:
        """The channels of x that pass through: a view wherever a stride describes them."""
        piece, index = _kept(self, x.device)
        return x[:, piece] if piece is not None else x.index_select(1, index)


@functools.cache
def _channel_map(split: Split, device: torch.device) -> Tensor:
    places = [-1] * (len(split.transformed) + len(split.identity))
    for place, channel in enumerate(split.transformed):
        places[channel] = place
    return torch.tensor(places, dtype=torch.int64, device=device)


@functools.cache
def _kept(split: Split, device: torch.device) -> tuple[slice | None, Tensor | None]:
    index = torch.tensor(split.identity, dtype=torch.int64)
    piece = as_slice(index) if split.identity else slice(0, 0)
    return (piece, None) if piece is not None else (None, index.to(device))
