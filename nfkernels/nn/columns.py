"""A bijection on some of the columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bijection import Bijection, check_device, check_floating


class Columns(Bijection):
    """``bijection`` on the channels whose numbers are ``columns``, in their order; the others pass through.

    Takes ``x [B, C, *spatial]`` of any C that has them; the bijection keeps their number and the positions. Raises
    ``ValueError`` for columns that are none, or not there. Cost: one copy of x beside the bijection's.
    """

    index: Tensor

    def __init__(self, bijection: Bijection, columns: Sequence[int]) -> None:
        super().__init__()
        numbers = [int(c) for c in columns]
        if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
            raise ValueError(f"columns are different numbers from 0 on, at least one, got {numbers}")
        self.bijection, self.columns = bijection, numbers
        self.register_buffer("index", torch.tensor(numbers))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        part = self._part(x)
        y, logdet = self.bijection(part, context, lengths=lengths)
        return x.index_copy(1, self.index, y), logdet

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        part = self._part(z)
        x, logdet = self.bijection.inverse(part, context, lengths=lengths)
        return z.index_copy(1, self.index, x), logdet

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        return x.index_copy(1, self.index, self.bijection.initialize(self._part(x), context, lengths=lengths))

    @property
    def uses_context(self) -> bool:
        return self.bijection.uses_context

    def _part(self, x: Tensor) -> Tensor:
        check_floating(x, "Columns")
        check_device(x, self.index, "Columns")
        if x.dim() < 2 or x.shape[1] <= max(self.columns):
            raise ValueError(f"this layer acts on columns {self.columns}, got data {tuple(x.shape)}")
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"columns={self.columns}"
