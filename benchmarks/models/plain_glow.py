"""A Glow in plain PyTorch, written the way every port writes it: the yardstick for nfkernels.models.Glow.

Same architecture, one small call after another, ``conv2d`` networks, activations stored. ``copy_weights`` gives it the
parameters of an nfkernels Glow, so that both compute the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Autocast = Literal["everything", "networks"] | None


class ActNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return x * torch.exp(self.log_scale) + self.bias, self.log_scale.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y):
        return (y - self.bias) * torch.exp(-self.log_scale)


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

    def weight(self):
        lower = self.lower * self.mask + self.eye
        upper = self.upper * self.mask.t() + torch.diag(self.sign_s * torch.exp(self.log_s))
        return self.permutation @ lower @ upper

    def forward(self, x):
        return F.conv2d(x, self.weight()[:, :, None, None]), self.log_s.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y):
        weight = self.weight()  # autocast's is bfloat16, which has no inverse
        weight = torch.inverse(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return F.conv2d(y, weight[:, :, None, None])


class ZeroConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.log_scale = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x):
        return self.conv(x) * torch.exp(3 * self.log_scale)


class Coupling(nn.Module):
    def __init__(self, channels: int, hidden: int, dropout: float, autocast: Autocast) -> None:
        super().__init__()
        self.autocast = autocast
        self.net = nn.Sequential(
            nn.Conv2d(channels - channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            ZeroConv(hidden, 2 * (channels // 2)),
        )

    def parts(self, x):
        x1, x2 = halves(x)
        if self.autocast == "networks":
            with torch.autocast(x.device.type, torch.bfloat16):
                params = self.net(x1)
            params = params.to(x.dtype)
        else:
            params = self.net(x1)
        shift, raw = params.chunk(2, 1)
        return x1, x2, shift, torch.sigmoid(raw + 2)

    def forward(self, x):
        x1, x2, shift, scale = self.parts(x)
        return torch.cat([x1, (x2 + shift) * scale], 1), torch.log(scale).sum((1, 2, 3))

    def inverse(self, y):
        y1, y2, shift, scale = self.parts(y)
        return torch.cat([y1, y2 / scale - shift], 1)


class Step(nn.Module):
    def __init__(self, channels: int, hidden: int, dropout: float, autocast: Autocast) -> None:
        super().__init__()
        self.actnorm, self.mix = ActNorm(channels), InvConv(channels)
        self.coupling = Coupling(channels, hidden, dropout, autocast)

    def forward(self, x):
        x, a = self.actnorm(x)
        x, b = self.mix(x)
        x, c = self.coupling(x)
        return x, a + b + c

    def inverse(self, y):
        return self.actnorm.inverse(self.mix.inverse(self.coupling.inverse(y)))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    kept = x.shape[1] - x.shape[1] // 2
    return x[:, :kept], x[:, kept:]


def squeeze(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def unsqueeze(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)


def normal(z: Tensor) -> Tensor:
    return (-0.5 * (z * z + math.log(2 * math.pi))).sum((1, 2, 3))


class PlainGlow(nn.Module):
    """``autocast``: bfloat16 for everything, as most people have it (the 1x1 convolutions, and with them the data, are
    rounded too), or for the networks only."""

    def __init__(
        self,
        shape,
        *,
        levels: int,
        steps: int,
        hidden: int,
        grey_levels: int,
        dropout: float = 0.0,
        autocast: Autocast = None,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.dims, self.grey_levels, self.autocast = math.prod(shape), grey_levels, autocast
        self.levels, self.priors, self.shapes = nn.ModuleList(), nn.ModuleList(), []
        for level in range(levels):
            channels, height, width = channels * 4, height // 2, width // 2
            self.levels.append(nn.ModuleList(Step(channels, hidden, dropout, autocast) for _ in range(steps)))
            if level < levels - 1:
                self.priors.append(ZeroConv(channels - channels // 2, 2 * (channels // 2)))
                self.shapes.append((channels // 2, height, width))
                channels -= channels // 2
        self.shapes.append((channels, height, width))
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """``[B]`` for dequantised ``x`` in [0, 1)."""
        return self.bits_and_latents(x)[0]

    def latents(self, x: Tensor) -> list[Tensor]:
        """What leaves at each level, finest first, in the coordinates of its prior."""
        return self.bits_and_latents(x)[1]

    def bits_and_latents(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self.precision(x.device):
            x, total, latents = x - 0.5, 0.0, []
            for level, steps in enumerate(self.levels):
                x = squeeze(x)
                for step in steps:
                    x, logdet = step(x)
                    total = total + logdet
                if level < len(self.priors):
                    x, z = halves(x)
                    loc, log_scale = self.priors[level](x).chunk(2, 1)
                else:
                    z, loc, log_scale = x, self.loc, self.log_scale.expand_as(x)
                latents.append((z - loc) * torch.exp(-log_scale))
                total = total + normal(latents[-1]) - log_scale.sum((1, 2, 3))
            return -total / (self.dims * math.log(2)) + math.log2(self.grey_levels), latents

    def rebuild(self, latents: list[Tensor]) -> Tensor:
        """The x of :meth:`latents`."""
        with self.precision(latents[0].device):
            x = latents[-1] * torch.exp(self.log_scale) + self.loc
            for level in reversed(range(len(self.levels))):
                if level < len(self.priors):
                    loc, log_scale = self.priors[level](x).chunk(2, 1)
                    x = torch.cat([x, latents[level] * torch.exp(log_scale) + loc], 1)
                for step in reversed(self.levels[level]):
                    x = step.inverse(x)
                x = unsqueeze(x)
            return x + 0.5

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Images, uint8."""
        latents = [torch.randn(count, *shape, device=self.loc.device) for shape in self.shapes]
        x = self.rebuild(latents).float()
        return (x * self.grey_levels).floor().clamp(0, self.grey_levels - 1).to(torch.uint8)

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast == "everything")


Pair = tuple[str, Tensor, Tensor, Callable[[Tensor], Tensor]]


def pairs(plain: PlainGlow, glow) -> Iterator[Pair]:
    """A name, the plain model's parameter, that of an ``nfkernels.models.Glow`` of the same architecture, and how to
    get the former (or its gradient) from the latter (or its gradient)."""
    for level, (steps, part) in enumerate(zip(plain.levels, glow.bijection[1].levels, strict=True)):
        flow, prior = part[1], part[2]
        for k, step in enumerate(steps):
            last = step.coupling.net[5]
            for name, theirs in (
                ("log_scale", step.actnorm.log_scale), ("bias", step.actnorm.bias),
                ("lower", step.mix.lower), ("upper", step.mix.upper), ("log_s", step.mix.log_s),
            ):  # fmt: skip
                yield f"{level}.{k}.{name}", theirs, getattr(flow, name), like(theirs, k)
            for name, theirs in (
                ("weight1", step.coupling.net[0].weight), ("bias1", step.coupling.net[0].bias),
                ("weight2", step.coupling.net[2].weight), ("bias2", step.coupling.net[2].bias),
                ("weight3", last.conv.weight), ("bias3", last.conv.bias), ("log_scale3", last.log_scale),
            ):  # fmt: skip
                yield f"{level}.{k}.{name}", theirs, getattr(flow, name), like(theirs, k, len(steps))
        if level < len(plain.priors):
            mine, own = plain.priors[level], prior.conditioner
            for name, theirs in (("weight", mine.conv.weight), ("bias", mine.conv.bias), ("log_scale", mine.log_scale)):
                yield f"{level}.prior.{name}", theirs, getattr(own, name), like(theirs)
        else:
            yield f"{level}.prior.loc", plain.loc, prior.loc, like(plain.loc)
            yield f"{level}.prior.log_scale", plain.log_scale, prior.log_scale, like(plain.log_scale)


def like(theirs: Tensor, k: int | None = None, chunks: int | None = None) -> Callable[[Tensor], Tensor]:
    """Row k, or the k-th of the chunks that stand one after the other, in the shape of ``theirs``."""
    shape = theirs.shape

    def view(t: Tensor) -> Tensor:
        if chunks is not None:
            t = t.chunk(chunks)[k]
        elif k is not None:
            t = t[k]
        return t.reshape(shape)

    return view


@torch.no_grad()
def copy_weights(plain: PlainGlow, glow) -> None:
    """The parameters of an ``nfkernels.models.Glow`` of the same architecture, layer by layer."""
    for _, theirs, ours, view in pairs(plain, glow):
        theirs.copy_(view(ours))
    for steps, part in zip(plain.levels, glow.bijection[1].levels, strict=True):
        for k, step in enumerate(steps):
            step.mix.sign_s.copy_(part[1].sign_s[k])
            step.mix.permutation.copy_(permutation_matrix(part[1].permutation[k]))


def permutation_matrix(order: Tensor) -> Tensor:
    """``[C, C]`` that puts row ``order[i]`` into row i."""
    return torch.eye(len(order), device=order.device)[order]
