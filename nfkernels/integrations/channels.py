"""Moves of whole channels that layers of several libraries are made of, in the fewest passes over the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._library import under_transform


class Order:
    """A permutation of channels that is known when a layer is swapped: ``y[:, i] = x[:, places[i]]``. Hashable, so that
    a class can be made for it; its tensors are kept by device."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places, self._hash = places, hash(places)
        self._tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of(matrix: Tensor) -> Order | None:
        """The order that a matrix ``[C, C]`` of zeros and ones stands for; None if it is no permutation."""
        one = matrix.detach() == 1
        if not bool((one | (matrix == 0)).all()) or not bool((one.sum(0) == 1).all() & (one.sum(1) == 1).all()):
            return None
        return Order(tuple(one.to(torch.uint8).argmax(1).tolist()))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The order and its inverse, int64 ``[C]``."""
        if device not in self._tensors:
            with torch.inference_mode(False):  # a later call may save them for a backward
                there = torch.tensor(self.places, dtype=torch.int64, device=device)
                self._tensors[device] = there, there.argsort()
        return self._tensors[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.places == other.places

    def __hash__(self) -> int:
        return self._hash


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``y[:, i] = x[:, order[i]]``, whose gradient is gathered by ``inverse`` instead of scattered."""
    if x.requires_grad and torch.is_grad_enabled() and not under_transform():
        return _Permute.apply(x, order, inverse)
    return x.index_select(1, order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, dy):
        order, inverse = ctx.saved_tensors
        return permute(dy, inverse, order), None, None


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` with ``scale`` and ``shift`` per channel (``[C]``) of ``x [B, C, *spatial]``.

    One pass forward, and one that sums the gradients of scale and shift together: the batch normalization of running
    statistics 0 and 1. Keeps x and scale for the backward.
    """
    kind = x.shape[1], scale.dtype, x.device
    if kind not in _STANDARD:
        with torch.inference_mode(False):
            _STANDARD[kind] = tuple(torch.full(kind[:1], v, dtype=kind[1], device=kind[2]) for v in (0.0, 1.0))
    mean, variance = _STANDARD[kind]
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, 0.0)


_STANDARD: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}
