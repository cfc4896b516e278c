"""A Glow as the PyTorch ports of OpenAI's code have it: ActNorm with a raw scale, an LU-decomposed 1 x 1 convolution,
and a coupling that shifts before it scales. Nothing of it can be imported from a package: ``nfkernels.accelerate`` has
to know these layers by their parameters and to prove them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    """``scale (x + loc)``; the first batch decides both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = True

    def initialize(self, input):
        with torch.no_grad():
            mean = input.mean((0, 2, 3), keepdim=True)
            std = input.std((0, 2, 3), keepdim=True)
            self.loc.data.copy_(-mean)
            self.scale.data.copy_(1 / (std + 1e-6))

    def forward(self, input):
        _, _, height, width = input.shape
        if self.initialized.item() == 0:
            self.initialize(input)
            self.initialized.fill_(1)
        logdet = height * width * torch.sum(torch.log(torch.abs(self.scale)))
        return self.scale * (input + self.loc), logdet

    def reverse(self, output):
        return output / self.scale - self.loc


class InvConv2dLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        diagonal = upper.diagonal().clone()
        ones = torch.ones(channels, channels)
        self.register_buffer("w_p", permutation)
        self.register_buffer("u_mask", ones.triu(1))
        self.register_buffer("l_mask", ones.tril(-1))
        self.register_buffer("s_sign", diagonal.sign())
        self.register_buffer("l_eye", torch.eye(channels))
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(diagonal.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def calc_weight(self):
        weight = (
            self.w_p
            @ (self.w_l * self.l_mask + self.l_eye)
            @ (self.w_u * self.u_mask + torch.diag(self.s_sign * torch.exp(self.w_s)))
        )
        return weight.unsqueeze(2).unsqueeze(3)

    def forward(self, input):
        _, _, height, width = input.shape
        return F.conv2d(input, self.calc_weight()), height * width * torch.sum(self.w_s)

    def reverse(self, output):
        return F.conv2d(output, self.calc_weight().squeeze().inverse().unsqueeze(2).unsqueeze(3))


class ZeroConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.scale = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, input):
        return self.conv(F.pad(input, [1, 1, 1, 1], value=1)) * torch.exp(self.scale * 3)


class AffineCoupling(nn.Module):
    """``(x_b + t) sigmoid(s + 2)``, with ``s, t`` from ``x_a``, the first half."""

    def __init__(self, channels: int, width: int, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            ZeroConv2d(width, channels if affine else channels // 2),
        )

    def forward(self, input):
        in_a, in_b = input.chunk(2, 1)
        log_s, t = self.net(in_a).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([in_a, (in_b + t) * s], 1), torch.sum(torch.log(s).view(input.shape[0], -1), 1)

    def reverse(self, output):
        out_a, out_b = output.chunk(2, 1)
        log_s, t = self.net(out_a).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([out_a, out_b / s - t], 1)


class Flow(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv2dLU(channels)
        self.coupling = AffineCoupling(channels, width)

    def forward(self, input):
        out, logdet = self.actnorm(input)
        out, det1 = self.invconv(out)
        out, det2 = self.coupling(out)
        return out, logdet + det1 + det2

    def reverse(self, output):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(output)))


def _log_normal(x: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    density = -0.5 * math.log(2 * math.pi) - log_sd - 0.5 * (x - mean) ** 2 / torch.exp(2 * log_sd)
    return density.flatten(1).sum(1)


class Block(nn.Module):
    """A level: squeeze, steps, and a prior that reads what goes on (or nothing, at the last)."""

    def __init__(self, channels: int, steps: int, width: int, split: bool) -> None:
        super().__init__()
        self.flows = nn.ModuleList(Flow(4 * channels, width) for _ in range(steps))
        self.split = split
        self.prior = ZeroConv2d(2 * channels if split else 4 * channels, 4 * channels if split else 8 * channels)

    def forward(self, input):
        b, c, h, w = input.shape
        out = input.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        logdet = 0
        for flow in self.flows:
            out, det = flow(out)
            logdet = logdet + det
        out, z = out.chunk(2, 1) if self.split else (None, out)
        mean, log_sd = self.prior(torch.zeros_like(z) if out is None else out).chunk(2, 1)
        return out, logdet, _log_normal(z, mean, log_sd), z

    def reverse(self, output, eps):
        mean, log_sd = self.prior(torch.zeros_like(eps) if output is None else output).chunk(2, 1)
        z = mean + torch.exp(log_sd) * eps
        out = z if output is None else torch.cat([output, z], 1)
        for flow in reversed(self.flows):
            out = flow.reverse(out)
        b, c, h, w = out.shape
        return out.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


class PortedGlow(nn.Module):
    def __init__(self, channels: int, steps: int, levels: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels * 2**i, steps, width, split=i < levels - 1) for i in range(levels)
        )  # fmt: skip

    def forward(self, input):
        """The log-density ``[B]`` and the latents, finest first."""
        log_p, latents, out = 0, [], input
        for block in self.blocks:
            out, det, density, z = block(out)
            log_p = log_p + det + density
            latents.append(z)
        return log_p, latents

    def reverse(self, latents):
        out = None
        for block, eps in zip(reversed(self.blocks), reversed(latents)):
            out = block.reverse(out, eps)
        return out
