"""A residual network of convolutions, the conditioner of RealNVP's image flows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._library import under_transform
from .config import Recorded
from .conv import conv
from .conv_net import arranged_for, check_context, check_network, is_channels_last, network_dtype, refuse_context


class ConvResidualNet(Recorded, nn.Module):
    """A residual network of convolutions, ``[B, in, H, W] -> [B, out, H, W]``; the last one, 1 x 1, starts at zero.

    Args:
        in_channels, hidden, out_channels: widths.
        blocks: pre-activation blocks ``h + conv(relu(conv(relu(h))))``; they start near the identity.
        context_channels: E of a context ``[B, E]`` or ``[B, E, H, W]``, linear maps of which (zero at the start) are
            added to the first convolution's output and to every block's.
        kernel: odd side of all but the last convolution; the size stays.
        dropout: probability, inside every block.

    Raises ``ValueError`` for options that are none, for a context it was not built for, and for one that is missing.
    Reference: Dinh et al. 2017 (RealNVP), section 4.1; He et al. 2016.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        blocks: int = 2,
        context_channels: int = 0,
        kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"a ConvResidualNet needs at least 1 block, got {blocks}")
        check_network((kernel,), dropout, "element")
        self.in_channels, self.out_channels, self.context_channels = in_channels, out_channels, context_channels
        self.dropout = dropout
        self.first = nn.Conv2d(in_channels, hidden, kernel, padding=kernel // 2)
        self.inner = nn.ModuleList(nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2) for _ in range(blocks))
        outer = [nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2) for _ in range(blocks)]
        for layer in outer:
            nn.init.uniform_(layer.weight, -1e-3, 1e-3)
            nn.init.uniform_(layer.bias, -1e-3, 1e-3)
        self.outer = nn.ModuleList(outer)
        self.last = nn.Conv2d(hidden, out_channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_channels, (blocks + 1) * hidden, bias=False) if context_channels else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, in, H, W] -> [B, out, H, W]``, in the caller's autocast precision."""
        dtype = network_dtype(self.first.weight)
        first, *shares = self._shares(context, dtype)
        h = _conv(x.to(dtype), self.first)
        h = h if first is None else h + first
        for inner, outer, share in zip(self.inner, self.outer, shares, strict=True):
            t = _conv(F.relu(h), inner, relu=True)
            t = _conv(F.dropout(t, self.dropout) if self.training and self.dropout else t, outer)
            h = h + (t if share is None else t + share)
        return _conv(F.relu(h), self.last)

    def _shares(self, context: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
        """What of the context is added to the first convolution's output, and to every block's."""
        count = len(self.inner) + 1
        if self.context is None:
            refuse_context(context, "ConvResidualNet")
            return [None] * count
        context = check_context(context, self.context_channels, "ConvResidualNet").to(dtype)
        weight = self.context.weight.to(dtype)
        if context.dim() == 2:
            return list(F.linear(context, weight)[:, :, None, None].chunk(count, 1))
        return list(torch.einsum("he,be...->bh...", weight, context).chunk(count, 1))


def _conv(x: Tensor, layer: Any, *, relu: bool = False) -> Tensor:
    weight = arranged_for(layer.weight, x.dtype)
    if not under_transform() and is_channels_last(weight):
        x = x.contiguous(memory_format=torch.channels_last)
    return conv(x, weight, layer.bias.to(x.dtype), layer.padding[0], relu=relu)
