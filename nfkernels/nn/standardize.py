"""Standardize: fixed numbers that bring data to a convenient range."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_device, check_floating, valid_mask


class Standardize(Bijection):
    """``z = (x - shift) / scale`` with fixed float32 buffers; logdet ``-sum log|scale|``.

    ``shift`` and ``scale`` are numbers, tensors ``[C]`` (one value per channel) or any shape that broadcasts to one
    sample ``[C, *spatial]``. Raises ``ValueError`` if a scale is zero or not finite.
    """

    shift: Tensor
    scale: Tensor
    uses_context = False

    def __init__(self, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        shift, scale = (torch.as_tensor(v, dtype=torch.float32).clone() for v in (shift, scale))
        if not scale.is_meta and not bool((torch.isfinite(scale) & (scale != 0)).all()):
            raise ValueError("Standardize needs scales that are finite and not zero")
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, scale, mask = self._fit(x, lengths)
        z = ((x - shift) / scale).to(x.dtype)
        return z if mask is None else torch.where(mask, z, 0.0), -self._logdet(x, scale, mask)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, scale, mask = self._fit(z, lengths)
        x = (z * scale + shift).to(z.dtype)
        return x if mask is None else torch.where(mask, x, 0.0), self._logdet(z, scale, mask)

    def _fit(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check_floating(x, "Standardize")
        shift, scale = (fit_to_sample(getattr(self, name), x, "Standardize", name) for name in ("shift", "scale"))
        return shift, scale, valid_mask(x, lengths)

    def _logdet(self, x: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
        log_scale = scale.abs().log().expand(x.shape[1:])
        if mask is None:
            return log_scale.sum().expand(x.shape[0])
        return torch.where(mask, log_scale, 0.0).flatten(1).sum(1)


def fit_to_sample(v: Tensor, x: Tensor, layer: str, name: str) -> Tensor:
    """``v`` shaped to broadcast over ``x [B, C, *spatial]`` (``[C]``: per channel), in the arithmetic's type."""
    check_device(x, v, layer)
    v = v.to(compute_dtype(x))
    v = v.reshape(-1, *[1] * (x.dim() - 2)) if v.dim() == 1 else v
    event = x.shape[1:]
    if v.dim() > len(event) or any(m not in (1, n) for m, n in zip(reversed(v.shape), reversed(event))):
        raise ValueError(f"{layer} has a {name} {tuple(v.shape)}, which does not fit data {tuple(x.shape)}")
    return v
