"""The networks inside couplings: they read what passes through and give the parameters of what is transformed.

They are the one part of a flow that runs in the caller's autocast precision. They start at zero output, so that a new
coupling does (almost) nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Recorded
from .conv_net import (
    Drop,
    Dropout,
    arrange,
    by_matrices,
    channel_factors,
    check_context,
    check_network,
    conv_net,
    fold_log_scale,
    network_dtype,
    refuse_context,
)
from .dense import run_at_once

Activation = Literal["relu", "silu", "gelu", "tanh", "elu", "leaky_relu", "softplus"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
}


class ConvConditioner(Recorded, nn.Module):
    """conv k, ReLU, conv 1, ReLU, dropout, conv k: Glow's coupling network, from ``[B, in, *]`` to ``[B, out, *]``.

    Args:
        in_channels, hidden, out_channels: widths. A coupling of Ct transformed channels needs ``out_channels = 2 Ct``
            (Ct if additive).
        context_channels: E of a context ``[B, E]`` or ``[B, E, *spatial]``, added to the first convolution's output
            through a (zero-initialised) linear map.
        kernel, last_kernel: odd sides of the first and the last convolution, alike by default; the size stays.
        dropout: probability, before the last convolution; ``dropout_of`` whole ``"channel"`` s or single
            ``"element"`` s.
        dims: 2 for images, 1 for sequences.

    The last convolution starts at zero and has a learned log-scale per channel, folded into its weight and bias.
    Given ``mask`` (bool, broadcastable, True at valid positions) nothing leaks out of the others.

    Raises ``ValueError`` for options that are none, for a context it was not built for, and for one that is missing.
    """

    takes_mask = True

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        context_channels: int = 0,
        kernel: int = 3,
        last_kernel: int | None = None,
        dropout: float = 0.0,
        dropout_of: Dropout = "element",
        dims: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        last_kernel = kernel if last_kernel is None else last_kernel
        check_network((kernel, last_kernel), dropout, dropout_of)
        if dims not in (1, 2):
            raise ValueError(f"ConvConditioner works in 1 or 2 dimensions, got dims={dims}")
        self.in_channels, self.out_channels, self.context_channels = in_channels, out_channels, context_channels
        self.dropout, self.dropout_of, self.kernels = dropout, dropout_of, (kernel, last_kernel)
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        self.first = conv(in_channels, hidden, kernel, padding=kernel // 2)
        self.middle = conv(hidden, hidden, 1)
        self.last = conv(hidden, out_channels, last_kernel, padding=last_kernel // 2)
        self.last_log_scale = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_channels, hidden, bias=False) if context_channels else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """``[B, in, *spatial] -> [B, out, *spatial]``, in the caller's autocast precision."""
        dtype = network_dtype(self.first.weight)
        matrices = mask is None and by_matrices(x, dtype)
        extra = None
        if self.context is None:
            refuse_context(context, "ConvConditioner")
        else:
            context = check_context(context, self.context_channels, "ConvConditioner")
            weight = self.context.weight.to(dtype)
            if context.dim() == 2:
                extra = F.linear(context.to(dtype), weight)
            else:
                extra = torch.einsum("he,be...->bh...", weight, context.to(dtype))
        last = fold_log_scale(self.last.weight, self.last.bias, self.last_log_scale)
        layers = (self.first.weight, self.first.bias, self.middle.weight, self.middle.bias, *last)
        weights = arrange([v.to(dtype) for v in layers], matrices)
        return conv_net(x, weights, extra, mask, self._drop(x, dtype), matrices, self.kernels)

    def _drop(self, x: Tensor, dtype: torch.dtype) -> Drop:
        if not self.training or not self.dropout:
            return None
        if self.dropout_of == "element":
            return lambda h: F.dropout(h, self.dropout)
        return channel_factors((x.shape[0], self.first.out_channels), self.dropout, dtype, x.device)


class MLP(Recorded, nn.Module):
    """A fully connected network for tabular couplings, ``[B, in] -> [B, out]``; the last layer starts at zero.

    ``layers`` counts the hidden ones. A context ``[B, E]`` is added to the first layer's output through a linear map.
    ``activation``: ``"relu"``, ``"silu"``, ``"gelu"``, ``"tanh"``, ``"elu"``, ``"leaky_relu"`` or ``"softplus"``.
    On the CPU a small one is one call (``ops.dense_net``).

    Raises ``ValueError`` for options that are none, for a context it was not built for, and for one that is missing.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        layers: int = 2,
        context_channels: int = 0,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"an MLP needs at least 1 hidden layer, got {layers}")
        check_network((), dropout, "element")
        self.in_channels, self.out_channels, self.context_channels = in_channels, out_channels, context_channels
        self.dropout, self.activation, self._act = dropout, activation, activation_of(activation)
        self.first = nn.Linear(in_channels, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, out_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_channels, hidden, bias=False) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, in] -> [B, out]``, in the caller's autocast precision."""
        x = x.to(network_dtype(self.first.weight))
        shares = None
        if self.context is None:
            refuse_context(context, "MLP")
        else:
            shares = self.context(check_context(context, self.context_channels, "MLP", dims=2).to(x.dtype))
        if not (self.dropout and self.training):
            layers, share = (self.first, *self.hidden, self.last), "none" if shares is None else "add"
            y = run_at_once(x, layers, residual=False, activation=self.activation, shares=shares, share=share)
            if y is not None:
                return y
        h = self.first(x)
        h = self._act(h if shares is None else h + shares)
        for layer in self.hidden:
            h = self._act(layer(h))
        return self.last(drop_in_training(h, self.dropout, self.training))


class ResidualNet(Recorded, nn.Module):
    """A residual network for tabular couplings, ``[B, in] -> [B, out]``; the last layer starts at zero.

    Args:
        in_channels, hidden, out_channels: widths.
        blocks: pre-activation blocks of two layers each, ``h + W2 act(W1 act(h))``; they start near the identity.
        context_channels: E of a context ``[B, E]``.
        context_by: ``"glu"``: the context stands beside the input, and gates every block's output,
            ``h + (W2 ...) * sigmoid(V context)``, as in nflows; ``"add"``: linear maps of it are added to the first
            layer's output and to every block's.
        activation: see :class:`MLP`.
        dropout: probability, inside every block.

    On the CPU a small one is one call (``ops.dense_net``). Raises ``ValueError`` as :class:`MLP` does.
    Reference: Durkan et al. 2019 (Neural Spline Flows), appendix B.1; He et al. 2016.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        blocks: int = 2,
        context_channels: int = 0,
        context_by: Literal["glu", "add"] = "glu",
        activation: Activation = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"a ResidualNet needs at least 1 block, got {blocks}")
        if context_by not in ("glu", "add"):
            raise ValueError(f"unknown context_by {context_by!r}: expected 'glu' or 'add'")
        check_network((), dropout, "element")
        self.in_channels, self.out_channels, self.context_channels = in_channels, out_channels, context_channels
        self.context_by, self.activation, self._act = context_by, activation, activation_of(activation)
        self.dropout = dropout
        beside = context_channels if context_by == "glu" else 0
        self.first = nn.Linear(in_channels + beside, hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        outer = [nn.Linear(hidden, hidden) for _ in range(blocks)]
        for layer in outer:
            nn.init.uniform_(layer.weight, -1e-3, 1e-3)
            nn.init.uniform_(layer.bias, -1e-3, 1e-3)
        self.outer = nn.ModuleList(outer)
        self.last = nn.Linear(hidden, out_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        # One product for all blocks' share of the context.
        shares = blocks if context_by == "glu" else blocks + 1
        self.context = nn.Linear(context_channels, shares * hidden) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, in] -> [B, out]``, in the caller's autocast precision."""
        x, shares, share = x.to(network_dtype(self.first.weight)), None, "none"
        if self.context is None:
            refuse_context(context, "ResidualNet")
        else:
            context = check_context(context, self.context_channels, "ResidualNet", dims=2).to(x.dtype)
            shares = self.context(context)
            share = "gate" if self.context_by == "glu" else "add"
            x = torch.cat((x, context), 1) if share == "gate" else x
        if not (self.dropout and self.training):
            layers: list[nn.Module] = [self.first]
            for pair in zip(self.inner, self.outer, strict=True):
                layers += pair
            layers.append(self.last)
            y = run_at_once(x, layers, residual=True, activation=self.activation, shares=shares, share=share)
            if y is not None:
                return y
        h = self.first(x)
        if shares is None:
            return self.last(self._blocks(h, [None] * len(self.inner)))
        parts = shares.split(self.first.out_features, 1)
        if share == "gate":
            return self.last(self._blocks(h, [s.sigmoid() for s in parts]))
        return self.last(self._blocks(h + parts[0], parts[1:]))

    def _blocks(self, h: Tensor, shares: Sequence[Tensor | None]) -> Tensor:
        for inner, outer, share in zip(self.inner, self.outer, shares, strict=True):
            t = outer(drop_in_training(self._act(inner(self._act(h))), self.dropout, self.training))
            if share is not None:
                t = t * share if self.context_by == "glu" else t + share
            h = h + t
        return h


def drop_in_training(h: Tensor, p: float, training: bool) -> Tensor:
    """Without dropout there is not even a call."""
    return F.dropout(h, p) if training and p else h


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]
