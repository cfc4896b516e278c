"""What a flow does with a whole batch: looks at it, takes its padding away, cuts it into chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bijection import describe_non_finite, reads_values, valid_mask


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    mask = valid_mask(x, lengths)
    return x if mask is None else torch.where(mask, x, 0.0)


def chunked(function: Callable[..., Any], batch_size: int | None, x: Tensor, *others: Tensor | None) -> Any:
    """``function(x, *others)`` over chunks of the first axis; a tensor or a tuple of tensors, put together again."""
    if batch_size is None or x.shape[0] <= batch_size:
        return function(x, *others)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pieces = (
        [v if v is None or v.shape[0] == 1 else v[i : i + batch_size] for v in (x, *others)]
        for i in range(0, x.shape[0], batch_size)
    )
    parts = [function(*piece) for piece in pieces]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def check_finite(x: Tensor) -> None:
    """Counts and names what is NaN or infinite, on the CPU only: elsewhere it would wait for the device."""
    found = describe_non_finite(x) if reads_values(x) else None
    if found is not None:
        raise ValueError(found)
