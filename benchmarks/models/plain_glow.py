"""A Glow in plain PyTorch, written the way every port writes it: the yardstick for nfkernels.models.Glow.

Same architecture, one small call after another, ``conv2d`` networks, float32, activations stored. ``copy_weights``
gives it the parameters of an nfkernels Glow, so that both compute the same numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return x * torch.exp(self.log_scale) + self.bias, self.log_scale.sum() * x.shape[2] * x.shape[3]


class InvConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_s = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.eye(channels))
        self.register_buffer("sign_s", torch.ones(channels))
        self.register_buffer("mask", torch.tril(torch.ones(channels, channels), -1))
        self.register_buffer("eye", torch.eye(channels))

    def forward(self, x):
        lower = self.lower * self.mask + self.eye
        upper = self.upper * self.mask.t() + torch.diag(self.sign_s * torch.exp(self.log_s))
        weight = self.permutation @ lower @ upper
        return F.conv2d(x, weight[:, :, None, None]), self.log_s.sum() * x.shape[2] * x.shape[3]


class ZeroConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.log_scale = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x):
        return self.conv(x) * torch.exp(3 * self.log_scale)


class Coupling(nn.Module):
    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels - channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            ZeroConv(hidden, 2 * (channels // 2)),
        )

    def forward(self, x):
        kept = x.shape[1] - x.shape[1] // 2
        x1, x2 = x[:, :kept], x[:, kept:]
        shift, raw = self.net(x1).chunk(2, 1)
        scale = torch.sigmoid(raw + 2)
        return torch.cat([x1, (x2 + shift) * scale], 1), torch.log(scale).sum((1, 2, 3))


class Step(nn.Module):
    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.actnorm, self.mix = ActNorm(channels), InvConv(channels)
        self.coupling = Coupling(channels, hidden, dropout)

    def forward(self, x):
        x, a = self.actnorm(x)
        x, b = self.mix(x)
        x, c = self.coupling(x)
        return x, a + b + c


def squeeze(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def normal(z: Tensor) -> Tensor:
    return (-0.5 * (z * z + math.log(2 * math.pi))).sum((1, 2, 3))


class PlainGlow(nn.Module):
    def __init__(self, shape, *, levels: int, steps: int, hidden: int, grey_levels: int, dropout: float = 0.0) -> None:
        super().__init__()
        channels = shape[0]
        self.dims, self.grey_levels = math.prod(shape), grey_levels
        self.levels, self.priors = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            channels *= 4
            self.levels.append(nn.ModuleList(Step(channels, hidden, dropout) for _ in range(steps)))
            if level < levels - 1:
                self.priors.append(ZeroConv(channels - channels // 2, 2 * (channels // 2)))
                channels -= channels // 2
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """``[B]`` for dequantised ``x`` in [0, 1)."""
        x, total = x - 0.5, 0.0
        for level, steps in enumerate(self.levels):
            x = squeeze(x)
            for step in steps:
                x, logdet = step(x)
                total = total + logdet
            if level < len(self.priors):
                kept = x.shape[1] - x.shape[1] // 2
                x, z = x[:, :kept], x[:, kept:]
                loc, log_scale = self.priors[level](x).chunk(2, 1)
                total = total + normal((z - loc) * torch.exp(-log_scale)) - log_scale.sum((1, 2, 3))
        log_scale = self.log_scale.expand_as(x)
        total = total + normal((x - self.loc) * torch.exp(-log_scale)) - log_scale.sum((1, 2, 3))
        return -total / (self.dims * math.log(2)) + math.log2(self.grey_levels)


@torch.no_grad()
def copy_weights(plain: PlainGlow, glow) -> None:
    """The parameters of an ``nfkernels.models.Glow`` of the same architecture, layer by layer."""
    parts = glow.bijection[1].levels
    for level, (steps, part) in enumerate(zip(plain.levels, parts, strict=True)):
        flow, prior = part[1], part[2]
        count = len(steps)
        for k, step in enumerate(steps):
            step.actnorm.log_scale.copy_(flow.log_scale[k].view(1, -1, 1, 1))
            step.actnorm.bias.copy_(flow.bias[k].view(1, -1, 1, 1))
            mix = step.mix
            for name in ("lower", "upper", "log_s", "permutation", "sign_s"):
                getattr(mix, name).copy_(getattr(flow, name)[k])
            net, last = step.coupling.net, step.coupling.net[5]
            for ours, theirs in (
                ("weight1", net[0].weight), ("bias1", net[0].bias), ("weight2", net[2].weight), ("bias2", net[2].bias),
                ("weight3", last.conv.weight), ("bias3", last.conv.bias), ("log_scale3", last.log_scale),
            ):  # fmt: skip
                theirs.copy_(getattr(flow, ours).chunk(count)[k].view_as(theirs))
        if level < len(plain.priors):
            conv = prior.conditioner
            plain.priors[level].conv.weight.copy_(conv.weight)
            plain.priors[level].conv.bias.copy_(conv.bias)
            plain.priors[level].log_scale.copy_(conv.log_scale.view(1, -1, 1, 1))
        else:
            plain.loc.copy_(prior.loc.view(1, -1, 1, 1))
            plain.log_scale.copy_(prior.log_scale.view(1, -1, 1, 1))
