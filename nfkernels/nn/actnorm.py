"""ActNorm: a learned scale and bias per channel that starts from the statistics of one batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_channels, per_channel, positions, valid_mask


class StartsFromData(Bijection):
    """A bijection with a data-dependent start: its flag is a buffer (saved, moved), mirrored by a Python bool.

    Only the mirror is read on the hot path, so no forward waits for the device. The first forward in training mode
    calls :meth:`start`; evaluation before that uses the parameters as they are.
    """

    initialized: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._started = False

    def start(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> None:
        """Sets the parameters from this batch."""
        raise NotImplementedError

    def start_if_due(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> None:
        if not self.training or self._started:
            return
        # The buffer decides where both disagree (it may have been filled in place, by an averaged copy for one).
        if not torch.compiler.is_compiling() and not self.initialized.is_meta and bool(self.initialized):
            self._started = True
        else:
            self._start(x, context, lengths)

    @torch.no_grad()
    def initialize(self, x, context=None, *, lengths=None):
        self._start(x, context, lengths)
        return self(x, context, lengths=lengths)[0]

    def _start(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> None:
        if x.is_meta or (x.numel() == 0 and world_size() == 1):
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.start(x.detach(), context, lengths)
            self.initialized.fill_(True)
        self._started = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started = not self.initialized.is_meta and bool(self.initialized)


class ActNorm(StartsFromData):
    """``y = exp(log_scale) * x + bias`` per channel of ``x [B, C, *spatial]``; logdet ``P * sum(log_scale)``.

    The first batch in training mode (or :meth:`initialize`) sets ``log_scale`` and ``bias`` so that every channel of
    that batch comes out with mean 0 and variance 1. A (nearly) constant channel is only shifted: its standard
    deviation is taken as at least 1e-4 of the largest channel's. Under ``torch.distributed`` the statistics are those
    of the batches of all ranks together, so replicas start equal.

    Cost: one pass over x. Reference: Kingma & Dhariwal 2018 (Glow), section 3.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, context=None, *, lengths=None):
        check_channels(x, self.channels, "ActNorm")
        self.start_if_due(x, context, lengths)
        mask = valid_mask(x, lengths)
        y = x * torch.exp(per_channel(self.log_scale, x)) + per_channel(self.bias, x)
        y = y.to(x.dtype)
        return y if mask is None else torch.where(mask, y, 0.0), self._logdet(x, lengths)

    def inverse(self, z, context=None, *, lengths=None):
        check_channels(z, self.channels, "ActNorm")
        mask = valid_mask(z, lengths)
        x = (z - per_channel(self.bias, z)) * torch.exp(-per_channel(self.log_scale, z))
        x = x.to(z.dtype)
        return x if mask is None else torch.where(mask, x, 0.0), -self._logdet(z, lengths)

    def _logdet(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        total = self.log_scale.to(compute_dtype(x)).sum() * positions(x, lengths)
        return total.expand(x.shape[0])

    def start(self, x, context, lengths):
        log_scale, bias = whitening(x, valid_mask(x, lengths))
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)

    def extra_repr(self) -> str:
        return f"{self.channels}"


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(v: Tensor) -> Tensor:
    if world_size() > 1:
        v = v.contiguous()
        dist.all_reduce(v)
    return v


def whitening(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(log_scale, bias)``, each ``[C]``, that bring every channel of x (of all ranks' x) to mean 0 and variance 1."""
    dtype = compute_dtype(x)
    x = x.to(dtype)
    axes = [0, *range(2, x.dim())]
    if mask is None:
        count = x.new_full((1,), x.shape[0] * x.shape[2:].numel())
    else:
        x, count = torch.where(mask, x, 0.0), mask.sum(dtype=dtype).reshape(1)
    sums = _sum_over_ranks(torch.cat([x.sum(axes), count]))
    count = sums[-1].clamp(min=1)
    mean = sums[:-1] / count
    centred = x - mean.reshape(-1, *[1] * (x.dim() - 2))
    if mask is not None:
        centred = torch.where(mask, centred, 0.0)
    std = (_sum_over_ranks(centred.square().sum(axes)) / count).sqrt()
    largest = std.max()
    std = torch.where(largest > 0, std.clamp(min=1e-4 * largest), torch.ones_like(std))
    return -std.log(), -mean / std
