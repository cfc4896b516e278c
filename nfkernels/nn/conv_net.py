"""Glow's coupling network as a function of its weights, shared by ConvConditioner and GlowSteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import philox_uniform
from .conditioning import ContextError
from .conv import conv

# Glow's factor on the learned log-scale of a network's last convolution (Kingma & Dhariwal's code, `conv2d_zeros`).
LOG_SCALE_FACTOR = 3.0

# On the CPU images of at most this many pixels are convolved as matrix products: a training step takes 0.55 to 0.65
# of the time at 4 x 4, where a convolution's set-up costs more than its arithmetic; about even from 7 x 7 on.
MATRIX_PIXELS = 16

Dropout = Literal["element", "channel"]
# What drops: a factor per sample and channel [B, hidden], or a function of the activations.
Drop = Tensor | Callable[[Tensor], Tensor] | None


def check_network(kernels: Sequence[int], dropout: float, dropout_of: str) -> None:
    for kernel in kernels:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"a conditioner's kernel must be odd, got {kernel}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout_of not in ("element", "channel"):
        raise ValueError(f"unknown dropout_of {dropout_of!r}: expected 'element' or 'channel'")


def check_context(context: Tensor | None, channels: int, who: str, *, dims: int | None = None) -> Tensor:
    if context is None:
        raise ContextError(f"this {who} was built with context_channels={channels}: give it a context")
    if context.dim() != (dims or max(2, context.dim())) or context.shape[1] != channels:
        raise ContextError(f"this {who} takes a context [B, {channels}], got shape {tuple(context.shape)}")
    return context


def refuse_context(context: Tensor | None, who: str) -> None:
    if context is not None:
        raise ContextError(f"this {who} was built with context_channels=0: it takes no context")


def check_precision(params: Tensor, x: Tensor, layer: str) -> Tensor:
    """A float64 network would be cut down to the data's precision after the work."""
    if params.dtype == torch.float64 and x.dtype != torch.float64:
        raise ValueError(
            f"the network of this {layer} gives float64 but the data is {str(x.dtype).removeprefix('torch.')}: "
            "give float64 data, or make the network narrower, for example by .float()"
        )
    return params


def network_dtype(weight: Tensor) -> torch.dtype:
    """What a network computes in: the autocast type inside autocast, else its weights' own; float64 stays."""
    device = weight.device.type
    if weight.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def arranged_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weight in the network's type and the layout that is fastest there: channels-last for 16-bit ones
    (a cast does it on its way) and for all on the CPU, where a copy of the weights costs less than it saves."""
    narrow = dtype in (torch.bfloat16, torch.float16) and weight.dtype != dtype
    if weight.dim() == 4 and (narrow or (weight.device.type == "cpu" and dtype != torch.float64)):
        return weight.to(dtype=dtype, memory_format=torch.channels_last)
    return weight.to(dtype)


def is_channels_last(weight: Tensor) -> bool:
    """Whether a convolution's weight asks for that layout; one that is in both (a 1x1 kernel) asks where it pays."""
    if weight.dim() != 4 or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    return not weight.is_contiguous() or weight.device.type == "cpu" or weight.dtype in (torch.bfloat16, torch.float16)


def fold_log_scale(weight: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A factor per output channel, on the small weight instead of a pass over the activations."""
    factor = torch.exp(LOG_SCALE_FACTOR * log_scale)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), bias * factor


def uniform_init(weight: Tensor, bias: Tensor) -> None:
    """As ``nn.Conv2d`` starts, for weights of many convolutions stacked along axis 0."""
    bound = 1 / math.sqrt(max(1, weight.shape[1:].numel()))
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


def by_matrices(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the network is computed as matrix products; the same numbers, another order of summation."""
    small = x.dim() == 4 and x.shape[0] > 0 and 0 < x.shape[2] * x.shape[3] <= MATRIX_PIXELS
    return small and x.device.type == "cpu" and dtype in (torch.float32, torch.float64)


def arrange(weights: Sequence[Tensor], matrices: bool) -> list[Tensor]:
    """``(w1, b1, w2, b2, w3, b3)``, of one network or of many stacked along axis 0, in the form conv_net wants."""
    if not matrices:
        return list(weights)
    w1, b1, w2, b2, w3, b3 = weights
    # The last convolution multiplies first and then sums shifted results: the kernel is turned around, a tap is a row,
    # and the bias sits on the middle tap, which every pixel gets once.
    taps = w3.shape[2] * w3.shape[3]
    w3, b3 = w3.flatten(2).mT, b3[:, None]
    if taps > 1:
        w3, b3 = w3.flip(1), F.pad(b3, (taps // 2, taps // 2))
    return [w1.flatten(1), b1[:, None], w2.flatten(1), b2[:, None], w3, b3]


def conv_net(
    x: Tensor,
    weights: Sequence[Tensor],
    extra: Tensor | None,
    mask: Tensor | None,
    drop: Drop,
    matrices: bool,
    kernels: tuple[int, int],
) -> Tensor:
    """The three convolutions in the (arranged) weights' dtype and layout; ``extra [B, hidden, ..]`` joins the first.

    ``kernels`` are the sides of the first and the last one.
    """
    if matrices:
        return _by_matrices(x, weights, extra, drop, kernels)
    w1, b1, w2, b2, w3, b3 = weights
    if is_channels_last(w1):
        x = x.to(dtype=w1.dtype, memory_format=torch.channels_last)  # cast and reordered in one pass
    else:
        x = x.to(w1.dtype)
    if extra is None:
        h = conv(x, w1, b1, kernels[0] // 2, relu=True)
    else:
        h = conv(x, w1, b1, kernels[0] // 2)
        h = F.relu_(h + extra.reshape(*extra.shape, *[1] * (h.dim() - extra.dim())))
    if mask is not None:
        h = h * mask
    h = conv(h, w2, b2, 0, relu=True)
    if mask is not None:
        h = h * mask
    if isinstance(drop, Tensor):
        h = h * drop.reshape(*drop.shape, *[1] * (h.dim() - 2))
    elif drop is not None:
        h = drop(h)
    return conv(h, w3, b3, kernels[1] // 2)


def _by_matrices(
    x: Tensor,
    weights: Sequence[Tensor],
    extra: Tensor | None,
    drop: Drop,
    kernels: tuple[int, int],
) -> Tensor:
    """The same on ``[channels, B * pixels]``: three matrix products, between im2col and col2im."""
    w1, b1, w2, b2, w3, b3 = weights
    batch, channels, size, pixels = x.shape[0], x.shape[1], x.shape[2:], x.shape[2] * x.shape[3]
    side, last_side = kernels
    columns = x.to(w1.dtype)
    if side > 1:  # unfold and fold loop over samples but not over channels: the batch goes in as channels
        columns = F.unfold(columns.reshape(1, batch * channels, *size), side, padding=side // 2)
    columns = columns.reshape(batch, w1.shape[1], pixels).transpose(0, 1).reshape(w1.shape[1], batch * pixels)
    h = torch.addmm(b1, w1, columns)
    if extra is not None:
        extra = extra.transpose(0, 1).flatten(2) if extra.dim() > 2 else extra.t()[:, :, None]
        h = (h.view(-1, batch, pixels) + extra).view(-1, batch * pixels)
    h = F.relu_(torch.addmm(b2, w2, F.relu_(h)))
    if isinstance(drop, Tensor):
        h = (h.view(-1, batch, pixels) * drop.t()[:, :, None]).view(-1, batch * pixels)
    elif drop is not None:
        h = drop(h)
    h = torch.addmm(b3.reshape(-1, 1), w3.flatten(0, 1), h).view(-1, batch, pixels).transpose(0, 1)
    if last_side > 1:
        h = F.fold(h.reshape(1, -1, pixels), size, last_side, padding=last_side // 2)
    return h.reshape(batch, -1, *size)


def channel_factors(shape: Sequence[int], p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Dropout of whole channels: 0 with probability ``p``, else ``1 / (1 - p)``."""
    return torch.empty(shape, dtype=dtype, device=device).bernoulli_(1 - p).mul_(1 / (1 - p))


def drop_by_key(h: Tensor, p: float, key: Tensor) -> Tensor:
    """Dropout of single elements that the key alone decides, so that it can be played again."""
    u = philox_uniform(torch.empty(h.shape, dtype=torch.float32, device=h.device), key)
    return h * (u >= p).to(h.dtype).mul_(1 / (1 - p))
