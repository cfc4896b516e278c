"""Small layers written as speech models write theirs: the same keys, shapes, formulas, signatures and return values.

``Wg``: WaveGlow, ``Rad``: RAD-TTS and NeMo, ``Gt``: Glow-TTS, ``Vits``: VITS. Masks: ``[B, 1, T]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .splines import rational_quadratic


def _rotation(channels: int) -> torch.Tensor:
    """Of determinant 1."""
    w = torch.linalg.qr(torch.randn(channels, channels))[0]
    if torch.linalg.det(w) < 0:
        w[:, 0] *= -1
    return w


class WgInvertible1x1Conv(nn.Module):
    """Keeps the first inverse that it makes."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv.weight.data = _rotation(channels)[:, :, None].contiguous()

    def forward(self, z, reverse=False):
        w = self.conv.weight.squeeze()
        if reverse:
            if not hasattr(self, "W_inverse"):
                self.W_inverse = w.float().inverse()[..., None]
            return F.conv1d(z, self.W_inverse)
        return self.conv(z), z.shape[0] * z.shape[2] * torch.logdet(w)


class RadInvertible1x1Conv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv.weight.data = _rotation(channels)[:, :, None].contiguous()

    def forward(self, z, inverse=False):
        w = self.conv.weight.squeeze()
        if inverse:
            return F.conv1d(z, w.float().inverse()[..., None])
        return self.conv(z), torch.logdet(w).clone()


class RadInvertible1x1ConvLUS(nn.Module):
    def __init__(self, channels):
        super().__init__()
        p, lower, upper = torch.linalg.lu(_rotation(channels))
        self.register_buffer("p", p)
        self.register_buffer("lower_diag", torch.ones(channels))
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper_diag = nn.Parameter(upper.diagonal().clone())
        self.upper = nn.Parameter(upper.triu(1))

    def forward(self, z, inverse=False):
        upper = self.upper.triu(1) + torch.diag(self.upper_diag)
        w = self.p @ (self.lower.tril(-1) + torch.diag(self.lower_diag)) @ upper
        if inverse:
            return F.conv1d(z, w.float().inverse()[..., None])
        return F.conv1d(z, w[..., None]), self.upper_diag.abs().log().sum()


class _ConvNet(nn.Module):
    """Of data and context side by side; takes lengths and does not need them."""

    def __init__(self, inside, outside):
        super().__init__()
        self.first, self.last = nn.Conv1d(inside, 6, 3, padding=1), nn.Conv1d(6, outside, 1)

    def forward(self, x, seq_lens=None):
        x = torch.cat(x, 1) if isinstance(x, tuple) else x
        return self.last(torch.tanh(self.first(x)))


class RadAffineTransformationLayer(nn.Module):
    def __init__(self, channels, context, scaling_fn="tanh", affine_model="simple_conv"):
        super().__init__()
        self.affine_model, self.scaling_fn, self.n_mel_channels = affine_model, scaling_fn, channels
        self.affine_param_predictor = _ConvNet(channels // 2 + context, channels)

    def scale(self, raw):
        if self.scaling_fn == "translate":
            return torch.exp(raw * 0), raw * 0
        if self.scaling_fn == "exp":
            return torch.exp(raw), raw
        s = torch.tanh(raw) + 1 if self.scaling_fn == "tanh" else torch.sigmoid(raw + 10)
        return s + 1e-6, (s + 1e-6).log()

    def forward(self, z, context, inverse=False, seq_lens=None):
        half = self.n_mel_channels // 2
        same, change = z[:, :half], z[:, half:]
        if self.affine_model == "wavenet":
            params = self.affine_param_predictor((same, context), seq_lens=seq_lens)
        else:
            params = self.affine_param_predictor(torch.cat((same, context), 1), seq_lens=seq_lens)
        s, log_s = self.scale(params[:, :half])
        if inverse:
            return torch.cat((same, (change - params[:, half:]) / s), 1)
        return torch.cat((same, s * change + params[:, half:]), 1), log_s


class GtActNorm(nn.Module):
    def __init__(self, channels, ddi=False):
        super().__init__()
        self.initialized = not ddi
        self.logs = nn.Parameter(torch.zeros(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x, x_mask=None, reverse=False, **kwargs):
        if x_mask is None:
            x_mask = x.new_ones(x.shape[0], 1, x.shape[2])
        if not self.initialized:
            self.start(x.detach(), x_mask)
            self.initialized = True
        if reverse:
            return (x - self.bias) * torch.exp(-self.logs) * x_mask, None
        return (self.bias + torch.exp(self.logs) * x) * x_mask, self.logs.sum() * x_mask.sum([1, 2])

    def start(self, x, x_mask):
        count = x_mask.sum([0, 2])
        mean = (x * x_mask).sum([0, 2]) / count
        logs = 0.5 * ((x * x * x_mask).sum([0, 2]) / count - mean**2).clamp_min(1e-6).log()
        self.bias.data.copy_((-mean * torch.exp(-logs)).view_as(self.bias))
        self.logs.data.copy_(-logs.view_as(self.logs))

    def set_ddi(self, ddi):
        self.initialized = not ddi


class GtInvConvNear(nn.Module):
    def __init__(self, channels, n_split=4, no_jacobian=False):
        super().__init__()
        self.channels, self.n_split, self.no_jacobian = channels, n_split, no_jacobian
        self.weight = nn.Parameter(_rotation(n_split))

    def forward(self, x, x_mask=None, reverse=False, **kwargs):
        b, c, t = x.shape
        n = self.n_split
        lengths = x.new_full((b,), t) if x_mask is None else x_mask.sum([1, 2])
        x = x.view(b, 2, c // n, n // 2, t).permute(0, 1, 3, 2, 4).reshape(b, n, c // n, t)
        logdet = None
        if reverse:
            kept = hasattr(self, "weight_inv")
            weight = self.weight_inv if kept else torch.inverse(self.weight.float()).to(self.weight.dtype)
        else:
            weight = self.weight
            logdet = 0 if self.no_jacobian else torch.logdet(self.weight) * (c / n) * lengths
        z = F.conv2d(x, weight.view(n, n, 1, 1))
        z = z.view(b, 2, n // 2, c // n, t).permute(0, 1, 3, 2, 4).reshape(b, c, t)
        return z * (1 if x_mask is None else x_mask), logdet

    def store_inverse(self):
        self.weight_inv = torch.inverse(self.weight.float()).to(self.weight.dtype)


class _WaveNet(nn.Module):
    def __init__(self, hidden, condition=0):
        super().__init__()
        self.layer = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.condition = nn.Conv1d(condition, hidden, 1) if condition else None

    def forward(self, x, x_mask=None, g=None, **kwargs):
        h = self.layer(x)
        h = h if g is None else h + self.condition(g)
        return torch.tanh(h) * x_mask


class GtCouplingBlock(nn.Module):
    def __init__(self, in_channels, hidden_channels, condition=0, sigmoid_scale=False, normed=False):
        super().__init__()
        self.in_channels, self.sigmoid_scale = in_channels, sigmoid_scale
        self.start = nn.Conv1d(in_channels // 2, hidden_channels, 1)
        if normed:
            nn.utils.parametrizations.weight_norm(self.start)
        self.end = nn.Conv1d(hidden_channels, in_channels, 1)
        self.wn = _WaveNet(hidden_channels, condition)

    def forward(self, x, x_mask=None, reverse=False, g=None, **kwargs):
        x_mask = 1 if x_mask is None else x_mask
        half = self.in_channels // 2
        same, change = x[:, :half], x[:, half:]
        out = self.end(self.wn(self.start(same) * x_mask, x_mask, g))
        m, logs = out[:, :half], out[:, half:]
        if self.sigmoid_scale:
            logs = torch.log(1e-6 + torch.sigmoid(logs + 2))
        if reverse:
            return torch.cat([same, (change - m) * torch.exp(-logs) * x_mask], 1), None
        logdet = (logs * x_mask).sum([1, 2])
        return torch.cat([same, (m + torch.exp(logs) * change) * x_mask], 1), logdet


class VitsElementwiseAffine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(channels, 1))
        self.logs = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x, x_mask, reverse=False, **kwargs):
        if reverse:
            return (x - self.m) * torch.exp(-self.logs) * x_mask
        return (self.m + torch.exp(self.logs) * x) * x_mask, (self.logs * x_mask).sum([1, 2])


class VitsResidualCouplingLayer(nn.Module):
    def __init__(self, channels, hidden_channels, condition=0, mean_only=False):
        super().__init__()
        self.half_channels, self.mean_only = channels // 2, mean_only
        self.pre = nn.Conv1d(self.half_channels, hidden_channels, 1)
        self.enc = _WaveNet(hidden_channels, condition)
        self.post = nn.Conv1d(hidden_channels, self.half_channels * (2 - mean_only), 1)

    def forward(self, x, x_mask, g=None, reverse=False):
        same, change = x.split([self.half_channels] * 2, 1)
        stats = self.post(self.enc(self.pre(same) * x_mask, x_mask, g=g)) * x_mask
        m, logs = (stats, torch.zeros_like(stats)) if self.mean_only else stats.chunk(2, 1)
        if reverse:
            return torch.cat([same, (change - m) * torch.exp(-logs) * x_mask], 1)
        return torch.cat([same, m + change * torch.exp(logs) * x_mask], 1), logs.sum([1, 2])


class VitsConvFlow(nn.Module):
    def __init__(self, in_channels, filter_channels, num_bins=10, tail_bound=5.0):
        super().__init__()
        self.filter_channels, self.num_bins, self.tail_bound = filter_channels, num_bins, tail_bound
        self.half_channels = in_channels // 2
        self.pre = nn.Conv1d(self.half_channels, filter_channels, 1)
        self.convs = _WaveNet(filter_channels)
        self.proj = nn.Conv1d(filter_channels, self.half_channels * (3 * num_bins - 1), 1)

    def forward(self, x, x_mask, g=None, reverse=False):
        same, change = x.split([self.half_channels] * 2, 1)
        h = self.proj(self.convs(self.pre(same), x_mask, g=g)) * x_mask
        b, c, t = same.shape
        h = h.reshape(b, c, -1, t).permute(0, 1, 3, 2)
        k, root = self.num_bins, math.sqrt(self.filter_channels)
        sizes = h[..., :k] / root, h[..., k : 2 * k] / root
        change, logs = rational_quadratic(change, *sizes, h[..., 2 * k :], self.tail_bound, reverse)
        x = torch.cat([same, change], 1) * x_mask
        return x if reverse else (x, (logs * x_mask).sum([1, 2]))


class VitsFlip(nn.Module):
    def forward(self, x, *args, reverse=False, **kwargs):
        x = torch.flip(x, [1])
        return x if reverse else (x, x.new_zeros(x.shape[0]))
