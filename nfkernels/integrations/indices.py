"""Index sets of couplings, known when a layer is swapped: no mask is looked at during a call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..nn.coupling import as_slice


class Split:
    """Which of C channels a coupling transforms; the others decide. Hashable, so that a class can be made for it.

    Its tensors are kept by device: what builds them runs once, and ``torch.compile`` sees constants.
    """

    def __init__(self, transformed: tuple[int, ...], identity: tuple[int, ...]) -> None:
        self.transformed, self.identity = transformed, identity
        self.piece = as_slice(torch.tensor(identity, dtype=torch.int64)) if identity else slice(0, 0)
        places = [-1] * (len(transformed) + len(identity))
        for place, channel in enumerate(transformed):
            places[channel] = place
        self._places = tuple(places)
        self._maps: dict[torch.device, Tensor] = {}
        self._indices: dict[torch.device, Tensor] = {}

    @staticmethod
    def of(transformed: Tensor, identity: Tensor) -> Split | None:
        """The split of two index tensors; None unless they are the two ascending parts of one whole, as a channel map
        needs them."""
        t, i = tuple(transformed.tolist()), tuple(identity.tolist())
        whole = sorted(t + i) == list(range(len(t) + len(i))) and list(t) == sorted(t) and bool(t)
        return Split(t, i) if whole else None

    def channel_map(self, device: torch.device) -> Tensor:
        """int64 ``[C]``: the place of each transformed channel among the conditioner's outputs, -1 for the others."""
        if device not in self._maps:
            self._maps[device] = _made(self._places, device)
        return self._maps[device]

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
        if x.device not in self._indices:
            self._indices[x.device] = _made(self.identity, x.device)
        return x.index_select(1, self._indices[x.device])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and (self.transformed, self.identity) == (other.transformed, other.identity)

    def __hash__(self) -> int:
        return hash((self.transformed, self.identity))


class Table:
    """Whole numbers known when a layer is swapped, as an int64 tensor on each device that asks. Hashable."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._shape = tuple(values.flatten().tolist()), tuple(values.shape)
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            self._tensors[device] = _made(self._values, device).view(self._shape)
        return self._tensors[device]

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and (self._values, self._shape) == (other._values, other._shape)

    def __hash__(self) -> int:
        return hash((self._values, self._shape))


def _made(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Never an inference tensor: the next call may train."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device=device)
