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


def readable(x: Tensor) -> Tensor:
    """``x`` itself where strides over ``[B, C, P]`` describe it (a stride of 0 does), else a contiguous copy."""
    return x if collapsible(x) else x.contiguous()


def canonical(x: Tensor) -> Tensor:
    """As :func:`readable`, for tensors that outputs are laid out like: ``empty_like`` orders axes by their strides, so
    an expanded tensor (stride 0) would give an output whose spatial axes are torn apart."""
    return x if collapsible(x) and (x.is_contiguous() or 0 not in x.stride()) else x.contiguous()
