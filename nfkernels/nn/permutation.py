"""A fixed order of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .bijection import check_channels, check_width, valid_mask, zero_logdet
from .config import replace_argument
from .linear_bijection import ConstantJacobian


class Permutation(ConstantJacobian):
    """``y[:, i] = x[:, permutation[i]]`` on axis 1 of ``x [B, C, ...]``; logdet 0.

    Args:
        features: C.
        kind: ``"random"`` (drawn once, from torch's generator), ``"reverse"`` or ``"roll"`` (by half of C: what a
            coupling left alone, the next one moves).
        permutation: an order of one's own instead: every number from 0 to C - 1 once.

    The order and its inverse, made once, are int64 buffers. Cost: one pass over x. Raises ``ValueError`` for what is
    no permutation.
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(
        self,
        features: int,
        kind: Literal["random", "reverse", "roll"] = "random",
        *,
        permutation: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_width(features, "Permutation", "feature")
        if permutation is not None:
            order = torch.as_tensor(permutation)
            if order.is_floating_point() or order.shape != (features,):
                raise ValueError(f"a permutation of {features} features is {features} integers, got {permutation}")
            order = order.to(torch.int64, copy=True)
            if not order.is_meta and order.sort().values.tolist() != list(range(features)):
                raise ValueError(f"a permutation of {features} features has each of 0 to {features - 1} once")
            kind = "given"  # type: ignore[assignment]  # told, never asked for
            if isinstance(permutation, np.ndarray):
                replace_argument(self, permutation, order.tolist())
        elif kind == "random":
            order = torch.randperm(features)
        elif kind == "reverse":
            order = torch.arange(features).flip(0)
        elif kind == "roll":
            order = torch.arange(features).roll(-(features // 2))
        else:
            raise ValueError(f"unknown kind {kind!r}: expected 'random', 'reverse' or 'roll'")
        self.features, self.kind = features, kind
        self.register_buffer("permutation", order)
        self.register_buffer("inverse_permutation", order.argsort())

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._ordered(x, self.permutation, lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._ordered(z, self.inverse_permutation, lengths)

    def _ordered(self, x: Tensor, order: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.features, "Permutation", own=order)
        mask = valid_mask(x, lengths)
        y = x.index_select(1, order)
        return y if mask is None else torch.where(mask, y, 0.0), zero_logdet(x)

    def log_abs_det(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return zero_logdet(x)

    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"{self.features}, kind={self.kind!r}"
