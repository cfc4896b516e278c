"""Fully connected networks made of ``nn.Linear``, run in one call where that is faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ops.dense_net import pays, run
from ..reference.dense_net import Activation, Share
from .hooks import hooked

_PLAIN = (nn.Parameter, Tensor)  # no distributed, fake or other tensors


def run_at_once(
    x: Tensor,
    layers: Iterable[nn.Module],
    *,
    residual: bool,
    activation: str,
    shares: Tensor | None = None,
    share: str = "none",
) -> Tensor | None:
    """``dense_net`` of these layers, or None where the layers have to be called one by one: what is not a plain
    ``nn.Linear`` in x's type, what carries a hook, autocast, data that do not fit, and wherever it does not pay."""
    weights: list[Tensor] = []
    for layer in layers:
        state = layer.__dict__
        if type(layer) is not nn.Linear or hooked(layer):
            return None
        weight, bias = state["_parameters"].get("weight"), state["_parameters"].get("bias")
        if type(weight) not in _PLAIN or type(bias) not in _PLAIN or weight.dtype is not x.dtype:
            return None
        weights += (weight, bias)
    if activation not in Activation.__members__ or not pays(x, weights) or torch.is_autocast_enabled("cpu"):
        return None
    return run(x, shares, weights, residual, int(Activation[activation]), int(Share[share]))
