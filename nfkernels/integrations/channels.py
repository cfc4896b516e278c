"""Orders of whole channels, known when a layer is swapped; and the half that a coupling's network is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._library import under_transform
from .constants import Constant


class Order:
    """A permutation of channels: ``y[:, i] = x[:, places[i]]``. Hashable, so that a class can be made for it."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = places
        self._there, self._back = Constant(places), Constant(torch.tensor(places, dtype=torch.int64).argsort())

    @staticmethod
    def of(matrix: Tensor) -> Order | None:
        """The order that a matrix ``[C, C]`` of zeros and ones stands for; None if it is no permutation."""
        one = matrix.detach() == 1
        if not bool((one | (matrix == 0)).all()) or not bool((one.sum(0) == 1).all() & (one.sum(1) == 1).all()):
            return None
        return Order(tuple(one.to(torch.uint8).argmax(1).tolist()))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The order and its inverse, int64 ``[C]``."""
        return self._there.on(device), self._back.on(device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.places == other.places

    def __hash__(self) -> int:
        return hash(self._there)


def shared(x: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """x for the coupling alone, and its channels ``[start, start + length)`` for the network: in the backward the
    network's gradient is added to the coupling's in place, where a slice would be padded to the size of x first."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not under_transform():
        return _Shared.apply(x, start, length)
    return x, x.narrow(1, start, length)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, start, length):
        ctx.set_materialize_grads(False)
        ctx.where, ctx.channels = (start, length), x.shape[1]
        return x, x.narrow(1, start, length)

    @staticmethod
    def backward(ctx: Any, dx, dpart):
        start, length = ctx.where
        if dpart is None:
            return dx, None, None
        if dx is not None and not torch.is_grad_enabled() and not under_transform():
            dx.narrow(1, start, length).add_(dpart)  # the coupling's backward has made dx for this node alone
            return dx, None, None
        before, after = start, ctx.channels - start - length
        padded = torch.nn.functional.pad(dpart, [0, 0] * (dpart.dim() - 2) + [before, after])
        return padded if dx is None else dx + padded, None, None
