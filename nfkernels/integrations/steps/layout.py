"""Channels-last conditioners: the memory format of their convolutions' weights, never a value."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

# The convolutions whose weights are laid out otherwise than they were.
_changed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def channels_last(networks: Iterable[nn.Module]) -> int:
    """Lays the weights of the networks' 2-D convolutions out channels-last; how many were not so before."""
    found = 0
    for network in networks:
        for conv in network.modules():
            if isinstance(conv, nn.Conv2d) and isinstance(conv._parameters.get("weight"), nn.Parameter):
                weight = conv.weight
                if weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                    _changed.add(conv)
                    found += 1
    return found


def put_back(model: nn.Module) -> None:
    for conv in [m for m in model.modules() if m in _changed]:
        conv.weight.data = conv.weight.data.contiguous()
        _changed.discard(conv)
