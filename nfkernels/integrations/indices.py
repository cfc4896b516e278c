"""Index sets of couplings, known when a layer is swapped: no mask is looked at during a call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..nn.coupling import as_slice
from .constants import Constant


class Split:
    """Which of C channels a coupling transforms; the others decide. Hashable, so that a class can be made for it."""

    def __init__(self, transformed: tuple[int, ...], identity: tuple[int, ...]) -> None:
        self.transformed, self.identity = transformed, identity
        self.piece = as_slice(torch.tensor(identity, dtype=torch.int64)) if identity else slice(0, 0)
        places = [-1] * (len(transformed) + len(identity))
        for place, channel in enumerate(transformed):
            places[channel] = place
        self._map, self._kept = Constant(places), Constant(identity)

    @staticmethod
    def of(transformed: Tensor, identity: Tensor) -> Split | None:
        """The split of two index tensors; None unless they are the two ascending parts of one whole, as a channel map
        needs them."""
        t, i = tuple(transformed.tolist()), tuple(identity.tolist())
        whole = sorted(t + i) == list(range(len(t) + len(i))) and list(t) == sorted(t) and bool(t)
        return Split(t, i) if whole else None

    def channel_map(self, device: torch.device) -> Tensor:
        """int64 ``[C]``: the place of each transformed channel among the conditioner's outputs, -1 for the others."""
        return self._map.on(device)

    @functools.cached_property
    def others(self) -> Split:
        return Split(self.identity, self.transformed)

    def other_map(self, device: torch.device) -> Tensor:
        """As :meth:`channel_map`, for the channels that are not transformed."""
        return self.others.channel_map(device)

    def kept(self, x: Tensor) -> Tensor:
        """The channels of x that pass through: a view wherever a stride describes them."""
        if self.piece is not None:
            return x[:, self.piece]
        return x.index_select(1, self._kept.on(x.device))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and (self.transformed, self.identity) == (other.transformed, other.identity)

    def __hash__(self) -> int:
        return hash((self.transformed, self.identity))
