"""nflows' layers."""

from __future__ import annotations

import torch
from nflows import transforms
from nflows.nn.nets import ResidualNet

from . import Case


def _net(inside: int, outside: int) -> ResidualNet:
    return ResidualNet(inside, outside, hidden_features=16, num_blocks=1)


def _alternating(features: int) -> list[int]:
    return [i % 2 for i in range(features)]


CASES = [
    Case(
        "nflows.AffineCouplingTransform",
        lambda: transforms.AffineCouplingTransform(_alternating(5), _net),
        lambda: (torch.randn(7, 5),),
        inverse=lambda m, out, x: m.inverse(out[0]),
    ),
    Case(
        "nflows.AdditiveCouplingTransform",
        lambda: transforms.AdditiveCouplingTransform(_alternating(5), _net),
        lambda: (torch.randn(7, 5),),
        inverse=lambda m, out, x: m.inverse(out[0]),
    ),
    Case(
        "nflows.PiecewiseRationalQuadraticCouplingTransform",
        lambda: transforms.PiecewiseRationalQuadraticCouplingTransform(
            _alternating(5), _net, num_bins=6, tails="linear", tail_bound=3.0
        ),
        lambda: (2 * torch.randn(7, 5),),
        inverse=lambda m, out, x: m.inverse(out[0]),
    ),
]
