"""Masks for couplings: bool, True where an element is transformed, False where it passes through.

``[C]`` chooses among channels (the columns of a table), ``[1, *spatial]`` among positions; see :class:`Coupling`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


def alternating(features: int, *, even: bool = True) -> Tensor:
    """``[features]``: every other feature is transformed, those of even number (the first one too) or the others."""
    _check_features(features)
    return (torch.arange(features) % 2 == 0) == even


def halves(features: int, identity: Literal["first", "second"] = "first") -> Tensor:
    """``[features]``: one half passes through, the ``features - features // 2`` first or the others (second)."""
    _check_features(features)
    if identity not in ("first", "second"):
        raise ValueError(f"the half that passes through is 'first' or 'second', got {identity!r}")
    return (torch.arange(features) >= features - features // 2) == (identity == "first")


def channels(count: int, transformed: Iterable[int]) -> Tensor:
    """``[count]``: the channels whose numbers are given are transformed."""
    _check_features(count)
    numbers = [int(n) for n in transformed]
    wrong = [n for n in numbers if not 0 <= n < count]
    if wrong:
        raise ValueError(f"there are channels 0 to {count - 1}, got {wrong[0]}")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[numbers] = True
    return mask


def checkerboard(*sizes: int, even: bool = True) -> Tensor:
    """``[1, *sizes]`` (height and width, or a length): positions whose coordinates sum to an even number, or to an odd
    one, are transformed. Reference: Dinh et al. 2017 (RealNVP), section 3.4."""
    if not sizes or any(n < 1 for n in sizes) or torch.Size(sizes).numel() < 2:
        raise ValueError(f"a checkerboard needs at least 2 positions, got sizes {sizes}")
    total = torch.zeros((), dtype=torch.int64)
    for n in sizes:
        total = total[..., None] + torch.arange(n)
    return (total % 2 == 0)[None] == even


def random(features: int, transformed: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """``[features]``: ``transformed`` of them (half by default, rounded up), drawn by ``generator`` or torch's own."""
    _check_features(features)
    count = (features + 1) // 2 if transformed is None else transformed
    if not 0 < count < features:
        raise ValueError(f"from 1 to {features - 1} of {features} features can be transformed, got {count}")
    return channels(features, torch.randperm(features, generator=generator)[:count].tolist())


def _check_features(features: int) -> None:
    if features < 2:
        raise ValueError(f"a coupling needs at least 2 features, one of which passes through, got {features}")
