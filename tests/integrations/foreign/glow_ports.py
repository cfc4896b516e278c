"""Small layers written as ports of Glow write theirs: the same keys, shapes, formulas, signatures and return values.

``Ro``: rosinality, ``Ch``: chrischute, ``Y0``: y0ast, ``Sv``: SurVAE, ``Fi``: FInCFlow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv_net(inside: int, outside: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, outside, 3, padding=1))


def _rotation(channels: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(channels, channels))[0]


def _per_channel_moments(x, unbiased: bool):
    over = [d for d in range(x.dim()) if d != 1]
    return x.mean(over, keepdim=True), x.std(over, keepdim=True, unbiased=unbiased)


# --- ActNorm ----------------------------------------------------------------------------------------------------------


class RoActNorm(nn.Module):
    def __init__(self, channels, logdet=True):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = logdet

    def forward(self, input):
        if not self.initialized.item():
            mean, std = _per_channel_moments(input.detach(), True)
            self.loc.data.copy_(-mean)
            self.scale.data.copy_(1 / (std + 1e-6))
            self.initialized.fill_(1)
        z = (input + self.loc) * self.scale
        if not self.logdet:
            return z
        return z, self.scale.abs().log().sum() * (input.shape[2] * input.shape[3])

    def reverse(self, output):
        return output / self.scale - self.loc


class _BiasLogs(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def start(self, x):
        mean, std = _per_channel_moments(x.detach(), False)
        self.bias.data.copy_(-mean)
        self.logs.data.copy_(-torch.log(std + 1e-6))

    def both(self, x, ldj, reverse):
        amount = self.logs.sum() * x.shape[2] * x.shape[3]
        if reverse:
            return x * torch.exp(-self.logs) - self.bias, None if ldj is None else ldj - amount
        return (x + self.bias) * torch.exp(self.logs), None if ldj is None else ldj + amount


class ChActNorm(_BiasLogs):
    def __init__(self, channels, return_ldj=False):
        super().__init__(channels)
        self.register_buffer("is_initialized", torch.zeros(1))
        self.return_ldj = return_ldj

    def forward(self, x, ldj=None, reverse=False):
        if not self.is_initialized and self.training:
            self.start(x)
            self.is_initialized += 1.0
        z, ldj = self.both(x, ldj, reverse)
        return (z, ldj) if self.return_ldj else z


class Y0ActNorm2d(_BiasLogs):
    def __init__(self, channels):
        super().__init__(channels)
        self.inited = False

    def forward(self, input, logdet=None, reverse=False):
        if not self.inited:
            if not self.training:
                raise ValueError("not started, and in eval mode")
            self.start(input)
            self.inited = True
        return self.both(input, logdet, reverse)


class SvActNorm(nn.Module):
    def __init__(self, channels, dims=2):
        super().__init__()
        self.register_buffer("initialized", torch.zeros(1))
        self.shift = nn.Parameter(torch.zeros(1, channels, *[1] * dims))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, *[1] * dims))

    def forward(self, x):
        if self.training and not self.initialized:
            mean, std = _per_channel_moments(x.detach(), True)
            self.shift.data.copy_(mean)
            self.log_scale.data.copy_(torch.log(std + 1e-6))
            self.initialized += 1.0
        amount = -self.log_scale.sum() * x.shape[2:].numel()
        return (x - self.shift) * torch.exp(-self.log_scale), amount.expand(x.shape[0])

    def inverse(self, z):
        return z * torch.exp(self.log_scale) + self.shift


class FiActNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.translation = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(0))

    def _broad(self, x):
        return (p.view(1, -1, *[1] * (x.dim() - 2)) for p in (self.translation, self.log_scale))

    def forward(self, input, context=None):
        if not self.initialized:
            mean, std = _per_channel_moments(input.detach(), True)
            self.translation.data.copy_(mean.flatten())
            self.log_scale.data.copy_(torch.log(std.flatten() + 1e-8))
            self.initialized.fill_(1)
        translation, log_scale = self._broad(input)
        amount = -self.log_scale.sum().expand(input.shape[0]) * input.shape[2:].numel()
        return (input - translation) * torch.exp(-log_scale), amount

    def reverse(self, input, context=None):
        translation, log_scale = self._broad(input)
        return input * torch.exp(log_scale) + translation


# --- invertible 1x1 convolutions --------------------------------------------------------------------------------------


def _mix(x, weight):
    return F.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1))


class RoInvConv2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(_rotation(channels)[:, :, None, None])

    def forward(self, input):
        amount = torch.linalg.slogdet(self.weight.squeeze().double())[1].float()
        return F.conv2d(input, self.weight), input.shape[2] * input.shape[3] * amount

    def reverse(self, output):
        return _mix(output, self.weight.squeeze().inverse())


class RoInvConv2dLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        p, lower, upper = torch.linalg.lu(_rotation(channels))
        s = upper.diagonal()
        mask = torch.ones(channels, channels).triu(1)
        self.register_buffer("w_p", p)
        self.register_buffer("u_mask", mask)
        self.register_buffer("l_mask", mask.T.contiguous())
        self.register_buffer("s_sign", s.sign())
        self.register_buffer("l_eye", torch.eye(channels))
        self.w_l = nn.Parameter(lower.clone())
        self.w_s = nn.Parameter(s.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def matrix(self):
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p @ (self.w_l * self.l_mask + self.l_eye) @ upper

    def forward(self, input):
        return _mix(input, self.matrix()), input.shape[2] * input.shape[3] * sum(self.w_s)

    def reverse(self, output):
        return _mix(output, self.matrix().inverse())


class ChInvConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(_rotation(channels))

    def forward(self, x, sldj, reverse=False):
        amount = torch.linalg.slogdet(self.weight)[1] * x.shape[2] * x.shape[3]
        if reverse:
            return _mix(x, torch.inverse(self.weight.double()).float()), sldj - amount
        return _mix(x, self.weight), sldj + amount


class Y0InvertibleConv1x1(nn.Module):
    def __init__(self, channels, LU_decomposed):
        super().__init__()
        self.LU_decomposed = LU_decomposed
        w = _rotation(channels)
        if not LU_decomposed:
            self.weight = nn.Parameter(w)
            return
        p, lower, upper = torch.linalg.lu(w)
        self.register_buffer("p", p)
        self.register_buffer("sign_s", upper.diagonal().sign())
        self.lower = nn.Parameter(lower)
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.upper = nn.Parameter(upper.triu(1))

    def matrix(self):
        if not self.LU_decomposed:
            return self.weight, torch.linalg.slogdet(self.weight)[1]
        lower = self.lower.tril(-1) + torch.eye(len(self.log_s), dtype=self.lower.dtype)
        upper = self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())
        return self.p @ lower @ upper, self.log_s.sum()

    def forward(self, input, logdet=None, reverse=False):
        weight, amount = self.matrix()
        amount = amount * input.shape[2] * input.shape[3]
        if reverse:
            return _mix(input, weight.inverse()), None if logdet is None else logdet - amount
        return _mix(input, weight), None if logdet is None else logdet + amount


class SvConv1x1(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(_rotation(channels))

    def forward(self, x):
        amount = torch.linalg.slogdet(self.weight)[1] * x.shape[2:].numel()
        return _mix(x, self.weight), amount.expand(x.shape[0])

    def inverse(self, z):
        return _mix(z, self.weight.inverse())


class FiConv1x1(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.W = nn.Parameter(_rotation(channels))

    def forward(self, x, context=None):
        return _mix(x, self.W), x.shape[2] * x.shape[3] * torch.linalg.slogdet(self.W)[1]

    def reverse(self, z, context=None):
        return _mix(z, self.W.inverse())


class FiConv1x1Householder(nn.Module):
    def __init__(self, channels, reflections):
        super().__init__()
        self.V = nn.Parameter(torch.randn(reflections, channels))

    def matrix(self):
        eye = torch.eye(self.V.shape[1], dtype=self.V.dtype)
        q = eye
        for v in self.V:
            q = q @ (eye - 2 * torch.outer(v, v) / v.dot(v))
        return q

    def forward(self, x, context=None, reverse=False):
        q = self.matrix()
        return _mix(x, q.T if reverse else q), 0.0

    def reverse(self, z, context=None):
        return self(z, context, reverse=True)[0]


# --- couplings --------------------------------------------------------------------------------------------------------


class RoAffineCoupling(nn.Module):
    def __init__(self, channels, affine=True):
        super().__init__()
        self.affine = affine
        self.net = conv_net(channels // 2, channels if affine else channels // 2)

    def forward(self, input):
        a, b = input.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b + self.net(a)], 1), None
        raw, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(raw + 2)
        return torch.cat([a, (b + t) * s], 1), s.log().flatten(1).sum(1)

    def reverse(self, output):
        a, b = output.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b - self.net(a)], 1)
        raw, t = self.net(a).chunk(2, 1)
        return torch.cat([a, b / torch.sigmoid(raw + 2) - t], 1)


class ChCoupling(nn.Module):
    def __init__(self, half):
        super().__init__()
        self.nn = conv_net(half, 2 * half)
        self.scale = nn.Parameter(torch.ones(half, 1, 1))

    def forward(self, x, ldj, reverse=False):
        change, same = x.chunk(2, 1)
        st = self.nn(same)
        s, t = self.scale * torch.tanh(st[:, 0::2]), st[:, 1::2]
        if reverse:
            change, ldj = change * torch.exp(-s) - t, ldj - s.flatten(1).sum(1)
        else:
            change, ldj = (change + t) * torch.exp(s), ldj + s.flatten(1).sum(1)
        return torch.cat([change, same], 1), ldj


class ElementwiseParams2d(nn.Module):
    """``[B, 2 C, H, W] -> [B, C, H, W, 2]``."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        b, c, h, w = x.shape
        if self.mode == "interleaved":
            return x.reshape(b, c // 2, 2, h, w).permute(0, 1, 3, 4, 2)
        return x.reshape(b, 2, c // 2, h, w).permute(0, 2, 3, 4, 1)


class SvAffineCoupling(nn.Module):
    def __init__(self, channels, mode="interleaved", scale_fn=torch.exp):
        super().__init__()
        same = channels - channels // 2
        self.coupling_net = nn.Sequential(conv_net(same, 2 * (channels - same)), ElementwiseParams2d(mode))
        self.scale_fn = scale_fn

    def forward(self, x):
        same, change = x.chunk(2, 1)
        params = self.coupling_net(same)
        s = self.scale_fn(params[..., 0])
        return torch.cat([same, s * change + params[..., 1]], 1), s.log().flatten(1).sum(1)

    def inverse(self, z):
        with torch.no_grad():
            same, change = z.chunk(2, 1)
            params = self.coupling_net(same)
            return torch.cat([same, (change - params[..., 1]) / self.scale_fn(params[..., 0])], 1)


class FiCoupling(nn.Module):
    def __init__(self, channels, context=0):
        super().__init__()
        self.half = channels // 2
        self.net = conv_net(self.half + context, channels)

    def _split(self, x, context):
        same, change = x[:, : self.half], x[:, self.half :]
        h = self.net(same if context is None else torch.cat([same, context], 1))
        return same, change, 2.0 * torch.tanh(h[:, ::2] / 2.0), h[:, 1::2]

    def forward(self, input, context=None):
        same, change, log_s, t = self._split(input, context)
        return torch.cat([same, change * torch.exp(log_s) + t], 1), log_s.flatten(1).sum(-1)

    def reverse(self, input, context=None):
        same, change, log_s, t = self._split(input, context)
        return torch.cat([same, (change - t) * torch.exp(-log_s)], 1)
