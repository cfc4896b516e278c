"""nflows' conditioner networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nflows.nn.nets import MLP, ResidualNet

from . import Case

# Networks run low under autocast, as everywhere.
_NETWORK = {"autocast": "a network, not data"}

CASES = [
    Case(
        "nflows.ResidualNet",
        lambda: ResidualNet(3, 7, hidden_features=12),
        lambda: (torch.randn(9, 3),),
        skip=_NETWORK,
    ),
    Case(
        "nflows.ResidualNet, context",
        lambda: ResidualNet(3, 7, hidden_features=12, context_features=4, activation=torch.tanh),
        lambda: (torch.randn(9, 3), torch.randn(9, 4)),
        skip=_NETWORK,
    ),
    Case(
        "nflows.MLP",
        lambda: MLP((3,), (5,), [16, 16], activation=F.elu),
        lambda: (torch.randn(9, 3),),
        skip=_NETWORK,
    ),
]
