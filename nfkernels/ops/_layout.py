"""Memory layouts: kernels see ``[B, C, P]`` with strides, so contiguous and channels-last tensors both pass untouched."""

from __future__ import annotations

from torch import Tensor


def collapsible(x: Tensor) -> bool:
    """Whether the axes after the channels are one axis to a stride."""
    if x.dim() <= 3 or x.is_contiguous():
        return True
    size, stride = x.shape, x.stride()
    for i in range(x.dim() - 2, 1, -1):
        if size[i] != 1 and stride[i] != stride[i + 1] * size[i + 1]:
            return False
    return True


def canonical(x: Tensor) -> Tensor:
    """``x`` itself where strides over ``[B, C, P]`` describe it, else a contiguous copy."""
    return x if collapsible(x) else x.contiguous()
