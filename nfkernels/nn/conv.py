"""Convolutions of conditioners: bias and ReLU in the same pass, and weight gradients by matrix products on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._library import under_transform


def conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int, *, relu: bool = False) -> Tensor:
    """``conv(x)``, then perhaps a ReLU, at stride 1 on ``x [B, C, *spatial]``, of one or two dimensions, as the weight.

    The size must stay: ``padding`` is half of the kernel's odd side. oneDNN (float32 and bfloat16, channels-last, CPU)
    and cuDNN (16-bit, channels-last, CUDA) apply the ReLU in the convolution's own pass; neither of those calls
    records a gradient, so it is written here. Everything else is what PyTorch does. Of NaN oneDNN's ReLU makes 0, where
    the two calls keep it.
    """
    # A compiler fuses by itself, and transforms need what PyTorch knows about.
    if torch.compiler.is_compiling() or under_transform() or not _special(x, weight, bias, relu):
        y = _plain(x, weight, bias, padding)
        return F.relu_(y) if relu else y
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Conv.apply(x, weight, bias, padding, relu)
    return _FORWARD[x.device.type](x, weight, bias, padding, relu)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return (F.conv2d if weight.dim() == 4 else F.conv1d)(x, weight, bias, padding=padding)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool) -> Tensor:
    pad, ones = [padding, padding], [1, 1]
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, ones, ones, 1, after, [], "")


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool) -> Tensor:
    assert relu
    return torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (padding, padding), (1, 1), 1)


_FORWARD = {"cpu": _onednn, "cuda": _cudnn}


def _special(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> bool:
    if weight.dim() != 4 or not x.dtype == weight.dtype == bias.dtype:
        return False
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.numel():
        return False
    if not weight.is_contiguous(memory_format=torch.channels_last) or x.is_meta:
        return False
    if x.device.type == "cpu":
        # Float16 convolutions exist on few CPUs; bfloat16 ones on all, in whatever way.
        return x.dtype != torch.float16 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    if (
        not relu
        or x.dtype == torch.float32
        or x.device.type != "cuda"
        or not torch.backends.cudnn.enabled
        or torch.version.cuda is None
    ):
        return False
    # cuDNN has fused kernels for whole vectors of channels, and does not promise to choose the same one every time.
    whole = weight.shape[0] % 8 == weight.shape[1] % 8 == 0
    return whole and not torch.are_deterministic_algorithms_enabled()


class _Conv(torch.autograd.Function):
    """Saves the input, and the output where its zeros are the ReLU's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool) -> Tensor:
        y = _FORWARD[x.device.type](x, weight, bias, padding, relu)
        ctx.save_for_backward(x, weight, bias, y if relu else None)
        ctx.padding, ctx.relu = padding, relu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # second derivatives
            inputs = [t.view_as(t) for t in (x, weight, bias)]
            wanted = [t for t, n in zip(inputs, need, strict=True) if n]
            out = _plain(inputs[0], inputs[1], inputs[2], ctx.padding)
            found = iter(torch.autograd.grad(F.relu(out) if ctx.relu else out, wanted, dy, create_graph=True))
            return *(next(found) if n else None for n in need), None, None
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        by_products = x.device.type == "cpu"
        pad, ones = [ctx.padding, ctx.padding], [1, 1]
        asked = [need[0], *(n and not by_products for n in need[1:])]
        grads: list[Tensor | None] = [None, None, None]
        if any(asked):
            grads = list(
                torch.ops.aten.convolution_backward(
                    dy, x, weight, [bias.shape[0]], ones, pad, ones, False, [0, 0], 1, asked
                )
            )
        if by_products and need[1]:
            grads[1] = weight_gradient(x, dy, weight.shape[2])
        if by_products and need[2]:
            grads[2] = _rows(dy).sum(0)
        return *grads, None, None


def weight_gradient(x: Tensor, dy: Tensor, side: int) -> Tensor:
    """Of a convolution that keeps the size: one product of all pixels' rows. oneDNN's own gradient of a weight takes up
    to a hundred times as long in 16 bits where channels are few or images small (2.13, AMX), and about as long in
    float32."""
    inputs, outputs = x.shape[1], dy.shape[1]
    if inputs <= outputs:  # the narrower of the two is the one that is laid out tap by tap
        found = torch.mm(_rows(dy).t(), _taps(x, side, 1))
        return found.view(outputs, side, side, inputs).permute(0, 3, 1, 2)
    found = torch.mm(_taps(dy, side, -1).t(), _rows(x))
    return found.view(side, side, outputs, inputs).permute(2, 3, 0, 1)


def _rows(t: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B H W, C]``; a view of channels-last."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _taps(t: Tensor, side: int, sign: int) -> Tensor:
    """``[B H W, side * side * C]``: for each pixel what the kernel's taps meet there, shifted one way or the other."""
    if side == 1:
        return _rows(t)
    half, (height, width) = side // 2, t.shape[2:]
    padded = F.pad(t.permute(0, 2, 3, 1), (0, 0, half, half, half, half))
    shifts = [i if sign > 0 else side - 1 - i for i in range(side)]
    parts = [padded[:, i : i + height, j : j + width] for i in shifts for j in shifts]
    return torch.cat(parts, 3).view(-1, side * side * t.shape[1])
