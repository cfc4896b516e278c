"""The activations of other people's networks, by the names that the ops have for them."""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", F.leaky_relu: "leaky_relu", F.elu: "elu", F.silu: "silu", F.tanh: "tanh",
    torch.tanh: "tanh", F.softplus: "softplus",
}  # fmt: skip
# With the only settings that the ops compute.
_MODULES: dict[type, tuple[str, dict[str, float]]] = {
    nn.ReLU: ("relu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.SiLU: ("silu", {}),
    nn.Tanh: ("tanh", {}),
}


def activation_of(function: Any, names: Container[str]) -> str | None:
    """The name of an activation, function or module; None for one that is not among an op's ``names``."""
    if isinstance(function, nn.Module):
        name, settings = _MODULES.get(type(function), (None, {}))
        same = all(getattr(function, n) == value for n, value in settings.items())
    else:
        name, same = _FUNCTIONS.get(function) if isinstance(function, Hashable) else None, True
    return name if same and name in names else None
