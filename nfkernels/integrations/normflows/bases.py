"""normflows' Gaussian base distributions: ``normflows.distributions.base``. ``forward`` samples."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...ops import gaussian_log_density
from ..adapter import Adapter, Call
from ..registry import register
from .affine import exact

_BASES = "normflows.distributions.base"


class _Base(Adapter):
    """Sampling draws the numbers that the original draws: ``torch.randn`` of the same shape, type and device."""

    def trials(self, module: nn.Module, call: Call) -> list[Call]:
        """Both ways of a base distribution, whichever was seen: the density of what it samples, samples of as many."""
        if call.method == "log_prob":
            z, *y = call.args or (call.kwargs["z"],)
            return [call, replace(call, method="forward", args=(z.shape[0], *y), kwargs=_without(call.kwargs, "z"))]
        rows, *y = call.args or (call.kwargs.get("num_samples", 1),)
        kwargs = _without(call.kwargs, "num_samples")
        given = next((v for v in (*y, kwargs.get("y")) if v is not None), None)
        rows = rows if given is None else len(given)
        like = next(module.parameters(), None)
        like = next(module.buffers()) if like is None else like
        z = torch.randn(rows, *module.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        classes = getattr(module, "num_classes", None)
        if classes is not None and given is None:
            y, kwargs = (torch.arange(rows, device=like.device) % classes,), _without(kwargs, "y")
        return [call, replace(call, method="log_prob", args=(z.to(like.device), *y), kwargs=kwargs)]


def _without(kwargs: dict, name: str) -> dict:
    return {k: v for k, v in kwargs.items() if k != name}


def _sampled(rows: int, self: nn.Module, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    eps = torch.randn((rows, *self.shape), dtype=loc.dtype, device=loc.device)
    return torch.addcmul(loc, torch.exp(log_scale), eps), gaussian_log_density(eps)


def _density(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Of the standardised data, [B]: the log-scales are the caller's to subtract."""
    scale = torch.exp(-log_scale)
    return gaussian_log_density(torch.addcmul(-loc * scale, z, scale))


def _cooled(self: nn.Module, log_scale: Tensor) -> Tensor:
    return log_scale if self.temperature is None else log_scale + math.log(self.temperature)


@register(f"{_BASES}.DiagGaussian")
class DiagGaussian(_Base):
    """A mean and a log-scale for every element."""

    class Layer:
        def forward(self, num_samples=1, context=None):
            log_scale = _cooled(self, self.log_scale)
            z, log_p = _sampled(num_samples, self, self.loc, log_scale)
            return z, log_p - log_scale.sum()

        def log_prob(self, z, context=None):
            log_scale = _cooled(self, self.log_scale)
            return _density(z, self.loc, log_scale) - log_scale.sum()


@register(f"{_BASES}.ClassCondDiagGaussian")
class ClassCondDiagGaussian(_Base):
    """A mean and a log-scale for every element of every class; y holds classes ``[B]`` or their weights ``[B, K]``."""

    class Layer:
        def log_prob(self, z, y):
            if self.temperature is not None:
                return super().log_prob(z, y)
            both = torch.cat((self.loc, self.log_scale))
            if y.dim() == 1:
                params = both.index_select(-1, y)
            else:
                with exact(z):
                    params = both @ y.t()
            return gaussian_log_density(z, params.permute(*self.perm))


@register(f"{_BASES}.GlowBase")
class GlowBase(_Base):
    """A mean and a log-scale for each channel, and each class where there are classes."""

    class Layer:
        def forward(self, num_samples=1, y=None):
            if self.class_cond and y is None:
                y = torch.randint(self.num_classes, (num_samples,), device=self.loc.device)
            rows = len(y) if self.class_cond else num_samples
            loc, log_scale = _of_channels(self, y)
            z, log_p = _sampled(rows, self, loc, log_scale)
            return z, log_p - math.prod(self.shape[1:]) * log_scale.sum(self.sum_dim)

        def log_prob(self, z, y=None):
            loc, log_scale = _of_channels(self, y)
            return _density(z, loc, log_scale) - math.prod(self.shape[1:]) * log_scale.sum(self.sum_dim)


def _of_channels(self: nn.Module, y: Tensor | None) -> tuple[Tensor, Tensor]:
    factor = self.logscale_factor
    loc = self.loc * torch.exp(self.loc_logs * factor)
    log_scale = self.log_scale * torch.exp(self.log_scale_logs * factor)
    if self.class_cond:
        shape = len(y), self.shape[0], *[1] * (self.n_dim - 1)
        loc = loc + _of_class(self.loc_cc, y).view(shape)
        log_scale = log_scale + _of_class(self.log_scale_cc, y).view(shape)
    return loc, _cooled(self, log_scale)


def _of_class(table: Tensor, y: Tensor) -> Tensor:
    """Rows of classes, not products with zeros and ones; those of weights are not rounded by autocast."""
    if y.dim() == 1:
        return table.index_select(0, y)
    with exact(y):
        return y @ table
