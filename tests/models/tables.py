"""What the tests of flows over tables share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfkernels import nn as N


def moved(flow: N.Flow, by: float = 0.2, seed: int = 0) -> N.Flow:
    """In eval mode, every parameter off its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return flow.eval()


def banana(n: int, seed: int) -> Tensor:
    """Two columns, the second about the square of the first; mean 0 and variance 1, entropy below a Gaussian's."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x[:, 0], (x[:, 0].square() - 1 + 0.3 * x[:, 1]) / math.sqrt(2.09)], 1)


def gaussian_score(x: Tensor) -> float:
    """Mean log-likelihood, in nats, of x under the Gaussian of its own mean and covariance."""
    d = x.shape[1]
    return -0.5 * (d * math.log(2 * math.pi) + torch.logdet(torch.cov(x.T)).item() + d)


def fitted_score(flow: N.Flow, steps: int, lr: float = 5e-3) -> float:
    """Mean log-likelihood of fresh data after a short training on the banana."""
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    for step in range(steps):
        optimizer.zero_grad()
        flow.nll(banana(128, step)).backward()
        optimizer.step()
    with torch.no_grad():
        return flow.eval().log_prob(banana(1000, 10**6)).mean().item()
