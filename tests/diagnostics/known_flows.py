"""Flows whose posteriors, levels and Jacobians are known."""

from __future__ import annotations

import math

import torch

from nfkernels import nn as N


class Shifted(N.Bijection):
    """``z = (theta - context / 2) / (width * sqrt(1/2))``: the posterior of theta ~ N(0, 1) seen with noise N(0, 1),
    where ``width`` is 1; narrower or wider than it, moved by ``bias``, elsewhere."""

    def __init__(self, width: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.width, self.bias = width, bias

    def forward(self, x, context=None, *, lengths=None):
        scale = self.width * math.sqrt(0.5)
        return (x - context / 2 - self.bias) / scale, x.new_full((len(x),), -x.shape[1] * math.log(scale))

    def inverse(self, z, context=None, *, lengths=None):
        scale = self.width * math.sqrt(0.5)
        return z * scale + context / 2 + self.bias, z.new_full((len(z),), z.shape[1] * math.log(scale))


def posterior(width: float = 1.0, bias: float = 0.0, features: int = 2) -> N.Flow:
    return N.Flow(Shifted(width, bias), N.StandardNormal(features))


def pairs(count: int, features: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(count, features, generator=generator)
    return theta, theta + torch.randn(count, features, generator=generator)


def gaussian(scale: float = 1.0, features: int = 2) -> N.Flow:
    """N(0, scale^2 I)."""
    layer = N.ActNorm(features)
    with torch.no_grad():
        layer.log_scale.fill_(-math.log(scale))
    return N.Flow(layer, N.StandardNormal(features)).eval()
