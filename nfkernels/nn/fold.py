"""Algebra in place of passes over the data: an elementwise map before or after a channel mix becomes part of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """``scale x + bias`` for each channel, ``[K, C]`` each; ``unscale`` is ``1 / scale``."""

    scale: Tensor
    bias: Tensor
    unscale: Tensor


class Folded(NamedTuple):
    """``mix x + shift`` and the way back, ``unmix y + unshift``; None for what was not asked for."""

    mix: Tensor | None
    shift: Tensor | None
    unmix: Tensor | None
    unshift: Tensor | None


def folded(before: Scaling | None, weight: Tensor | None, inverse: Tensor | None, after: Scaling | None) -> Folded:
    """``after(weight before(x))`` for K steps at once, ``[K, C, C]``, and back where ``inverse`` is given, there where
    ``weight`` is. Sums and not products, which TF32 would round."""
    mix, unmix, shift, unshift = weight, inverse, None, None
    if weight is not None:
        shift = weight.new_zeros(weight.shape[:2]) if before is None else (weight * before.bias[:, None]).sum(2)
        if before is not None:
            mix = mix * before.scale[:, None]
        if after is not None:
            mix, shift = after.scale[..., None] * mix, after.scale * shift + after.bias
    if inverse is not None:
        if after is not None:
            unshift = -(inverse * (after.unscale * after.bias)[:, None]).sum(2)
            unmix = unmix * after.unscale[:, None]
        if before is not None:
            unmix = before.unscale[..., None] * unmix
            unshift = -before.bias * before.unscale if unshift is None else (unshift - before.bias) * before.unscale
        elif unshift is None:
            unshift = inverse.new_zeros(inverse.shape[:2])
    return Folded(mix, shift, unmix, unshift)


def diagonals(after: Scaling) -> tuple[Tensor, Tensor]:
    """A scaling's matrices and their inverses, where there is no mix that it could be folded into."""
    return torch.diag_embed(after.scale), torch.diag_embed(after.unscale)
