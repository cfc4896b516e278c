"""``relu(conv2d(x))`` with bias and ReLU in the convolution's own pass, where the library offers that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._library import under_transform


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """``relu(conv(x))`` at stride 1 on ``x [B, C, *spatial]``, one- or two-dimensional as the weight is.

    oneDNN (16-bit, channels-last, CPU) and cuDNN (16-bit, channels-last, CUDA) do both at once; neither of those calls
    records a gradient, so it is written here. Everything else is a convolution and a ReLU in place. Of NaN oneDNN's
    ReLU makes 0, where the two calls keep it.
    """
    if not torch.compiler.is_compiling() and not under_transform() and _fuses(x, weight, bias):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
            return _ConvRelu.apply(x, weight, bias, padding)
        return _FUSED[x.device.type](x, weight, bias, padding)
    return F.relu_(_conv(x, weight, bias, padding))


def _conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return (F.conv2d if weight.dim() == 4 else F.conv1d)(x, weight, bias, padding=padding)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    pad, ones = [padding, padding], [1, 1]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, ones, ones, 1, "relu", [], "")


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (padding, padding), (1, 1), 1)


_FUSED = {"cpu": _onednn, "cuda": _cudnn}


def _fuses(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if weight.dim() != 4 or not x.dtype == weight.dtype == bias.dtype:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.numel():
        return False
    if not weight.is_contiguous(memory_format=torch.channels_last) or x.is_meta:
        return False
    if x.device.type == "cpu":
        # Float16 convolutions exist on few CPUs; bfloat16 ones on all, in whatever way.
        return x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return x.device.type == "cuda" and torch.backends.cudnn.enabled and torch.version.cuda is not None


class _ConvRelu(torch.autograd.Function):
    """Saves what the two would: the input and the output, whose zeros are the ReLU's."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, padding):
        y = _FUSED[x.device.type](x, weight, bias, padding)
        ctx.save_for_backward(x, weight, bias, y)
        ctx.padding = padding
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, bias, y = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # second derivatives
            inputs = [t.view_as(t) for t in (x, weight, bias)]
            wanted = [t for t, n in zip(inputs, need, strict=True) if n]
            found = iter(torch.autograd.grad(F.relu(_conv(*inputs, ctx.padding)), wanted, dy, create_graph=True))
            return *(next(found) if n else None for n in need), None
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
        pad, ones = [ctx.padding, ctx.padding], [1, 1]
        grads = torch.ops.aten.convolution_backward(
            dy, x, weight, [bias.shape[0]], ones, pad, ones, False, [0, 0], 1, list(need)
        )
        return *grads, None
