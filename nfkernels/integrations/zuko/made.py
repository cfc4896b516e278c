"""zuko's masked networks as ``autoregressive_inverse`` takes them: degrees found from the masks."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.hooks import hooked
from ...ops import Degrees
from ...ops.autoregressive_inverse import ActivationName
from ..activations import activation_of
from ..constants import Constant
from ..registry import qualified
from .univariates import Univariate


class Plan:
    """A masked network's shape: its activation, what sees what, and the order of its hidden units by degree.

    ``masked``: its masks have more zeros than the degrees say, so that the weights must be multiplied by them.
    """

    def __init__(self, activation: str, degrees: Degrees, orders: tuple[Constant, ...], masked: bool) -> None:
        self.activation, self.degrees, self.orders, self.masked = activation, degrees, orders, masked
        self._key = (activation, degrees.features, degrees.hidden, orders, masked)

    @staticmethod
    def of(network: nn.Module, features: int, count: int) -> Plan | None:
        """Of a network with ``count`` params for each feature; None where the op does not know it."""
        layers = list(network) if qualified(type(network)) == "zuko.nn.MaskedMLP" else []
        linears, acts = layers[0::2], layers[1::2]
        if not 2 <= len(linears) <= 9 or len(acts) != len(linears) - 1:
            return None
        if any(qualified(type(layer)) != "zuko.nn.MaskedLinear" for layer in linears):
            return None
        activation = _activation(acts)
        masks = [layer.mask.detach().cpu().bool() for layer in linears]
        if activation is None or masks[0].shape[1] < features or masks[-1].shape[0] != features * count:
            return None
        masks[0] = masks[0][:, :features]
        seen = [masks[0]]  # which features every unit sees
        for mask in masks[1:]:
            seen.append((mask.float() @ seen[-1].float()) > 0)
        degrees = _degrees(seen.pop().view(features, count, features).any(1))
        if degrees is None:
            return None
        hidden = [((degrees + 1) * units).amax(1) for units in seen]
        orders = [torch.argsort(h, stable=True) for h in hidden]
        try:
            found = Degrees(degrees.tolist(), tuple(h[o].tolist() for h, o in zip(hidden, orders)))
        except ValueError:
            return None
        rows = [*orders, torch.arange(features * count)]
        columns = [torch.arange(features), *orders]
        own = [mask[r][:, c] for mask, r, c in zip(masks, rows, columns)]
        masked = any(not torch.equal(a, b) for a, b in zip(own, found.masks(count)))
        return Plan(activation, found, tuple(map(Constant, orders)), masked)

    def serves(self, network: nn.Module, x: Tensor) -> bool:
        """Whether the op does now what calling the network would: in its type, without autocast, past no hook and no
        ``forward`` of an instance's own (zuko's Bayesian models put one there for a while)."""
        if torch.is_autocast_enabled(x.device.type) or next(network.parameters()).dtype != x.dtype:
            return False
        return not any(_altered(part) for part in network.modules())

    def of_call(self, network: nn.Module, context: Tensor | None, univariate: Univariate) -> dict[str, Any]:
        """The op's arguments; ``context [N, E]``."""
        linears = list(network)[0::2]
        weights = [layer.mask * layer.weight if self.masked else layer.weight for layer in linears]
        biases = [layer.bias for layer in linears]
        indices = [order.on(weights[0].device) for order in self.orders]
        features = len(self.degrees.features)
        for i, index in enumerate(indices):
            weights[i] = weights[i].index_select(0, index)
            biases[i] = None if biases[i] is None else biases[i].index_select(0, index)
            weights[i + 1] = weights[i + 1].index_select(1, index)
        first = weights[0]
        if context is not None:
            weights[0] = first[:, :features]
            context = F.linear(context, first[:, features:])
        return {
            "weights": weights, "biases": biases, "degrees": self.degrees, "context": context,
            "activation": self.activation, "transform": univariate.form, "layout": "shift_scale",
        }  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _altered(part: nn.Module) -> bool:
    own = vars(part).get("forward")
    replaced = own is not None and getattr(own, "__func__", None) is not type(part).forward
    return replaced or hooked(part)


def _activation(acts: list[nn.Module]) -> str | None:
    """The name of the one activation they all are, as the op knows it."""
    names = {activation_of(a, get_args(ActivationName)) for a in acts}
    return names.pop() if len(names) == 1 else None


def _degrees(sees: Tensor) -> Tensor | None:
    """From bool ``[D, D]``, what each feature sees: the longest chain of features before it. None for a cycle."""
    degrees = torch.zeros(sees.shape[0], dtype=torch.int64)
    for _ in range(sees.shape[0]):
        longer = ((degrees + 1) * sees).amax(1)
        if torch.equal(longer, degrees):
            return degrees
        degrees = longer
    return None
