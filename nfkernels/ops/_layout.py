"""Memory layouts: kernels see ``[B, C, P]`` with strides, so contiguous and channels-last tensors pass untouched."""

from __future__ import annotations

from torch import Tensor


def collapsible(x: Tensor) -> bool:
    """Whether the axes after the channels are one axis to a stride."""
    if x.dim() <= 3 or x.is_contiguous():
        return True
    length = step = 0
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size == 1:
            continue
        if length and stride != step * length:
            return False
        length, step = (length * size, step) if length else (size, stride)
    return True


def canonical(x: Tensor) -> Tensor:
    """``x`` itself where strides over ``[B, C, P]`` describe it, else a contiguous copy."""
    return x if collapsible(x) else x.contiguous()
