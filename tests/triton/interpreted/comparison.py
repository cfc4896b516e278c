"""Inputs inside NaN-filled buffers, and the gate: the error against float64 is at most twice plain PyTorch's."""

from __future__ import annotations

import math

import torch


def placed(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values inside a larger buffer of NaN: ``contiguous``, ``channels_last`` or ``sliced`` channels."""
    if layout == "sliced":
        buffer = x.new_full((x.shape[0] + 2, x.shape[1] + 3, *x.shape[2:]), math.nan)
        return buffer[1 : 1 + x.shape[0], 2 : 2 + x.shape[1]].copy_(x)
    if layout == "channels_last":
        order = (0, *range(2, x.dim()), 1)
        back = (0, x.dim() - 1, *range(1, x.dim() - 1))
        return placed(x.permute(order).contiguous(), "contiguous").permute(back)
    buffer = x.new_full((x.numel() + 256,), math.nan)
    return buffer[128 : 128 + x.numel()].view(x.shape).copy_(x)


def widened(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_close(name: str, got, plain, exact, condition: float = 0.0) -> None:
    """``got`` and ``plain`` PyTorch in one dtype, ``exact`` in float64; ``condition``: what else is no error."""
    assert (got.shape, got.dtype, got.stride()) == (plain.shape, plain.dtype, plain.stride()), name
    if exact.numel() == 0:
        return
    assert torch.isfinite(exact).all(), f"{name}: the case itself overflows"
    assert torch.isfinite(got).all(), f"{name}: {int((~got.isfinite()).sum())} elements are not finite"
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    slack = 4 * torch.finfo(got.dtype).eps * exact.abs().max().clamp(min=1.0) + condition
    assert error <= 2 * allowed + slack, f"{name}: error {error:.2e}, plain PyTorch {allowed:.2e}, slack {slack:.2e}"
