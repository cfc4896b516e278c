"""ActNorm: a learned scale and bias per channel that starts from the statistics of one batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops._library import under_transform
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_channels, describe_non_finite, per_channel, positions, valid_mask
from .replay import replays


class StartsFromData(Bijection):
    """A bijection with a data-dependent start: its flag is a buffer (saved, moved), mirrored by a Python bool.

    Only the mirror is read on the hot path, so no forward waits for the device. The first forward in training mode
    calls :meth:`start`; evaluation before that uses the parameters as they are. A batch with NaN or infinite values is
    refused with a ``ValueError`` and starts nothing (while traced by a compiler no values are looked at).
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
        """Calls :meth:`start` where this is the first batch in training mode: for a subclass's ``forward`` to begin."""
        if not self.training or self._started:
            return
        if not torch.compiler.is_compiling() and replays():  # the inverse of an Inverse
            return
        # The buffer decides where both disagree (it may have been filled in place, by an averaged copy for one).
        if not torch.compiler.is_compiling() and not self.initialized.is_meta and bool(self.initialized):
            self._started = True
        else:
            self._start(x, context, lengths)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
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
    that batch comes out with mean 0 and variance 1. A (nearly) constant channel is only shifted, with scale 1: one
    whose standard deviation is at most 1e-4 of the largest channel's, or is lost in the rounding of its mean. Under
    ``torch.distributed`` the statistics are those of the batches of all ranks together, so replicas start equal.

    Cost: one pass over x. Reference: Kingma & Dhariwal 2018 (Glow), section 3.1.
    """

    uses_context = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(x, self.channels, "ActNorm", own=self.bias)
        self.start_if_due(x, context, lengths)
        mask = valid_mask(x, lengths)
        y = x * torch.exp(per_channel(self.log_scale, x)) + per_channel(self.bias, x)
        y = y.to(x.dtype)
        return y if mask is None else torch.where(mask, y, 0.0), self._logdet(x, lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(z, self.channels, "ActNorm", own=self.bias)
        mask = valid_mask(z, lengths)
        x = (z - per_channel(self.bias, z)) * torch.exp(-per_channel(self.log_scale, z))
        x = x.to(z.dtype)
        return x if mask is None else torch.where(mask, x, 0.0), -self._logdet(z, lengths)

    def _logdet(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        total = self.log_scale.to(compute_dtype(x)).sum() * positions(x, lengths)
        return total.expand(x.shape[0])

    def start(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> None:
        log_scale, bias = whitening(x, valid_mask(x, lengths), layer="ActNorm")
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


def whitening(x: Tensor, mask: Tensor | None = None, *, layer: str) -> tuple[Tensor, Tensor]:
    """``(log_scale, bias)``, each ``[C]``, that bring every channel of x (of all ranks' x) to mean 0 and variance 1.

    Raises ``ValueError`` on every rank if any rank's x is not finite.
    """
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
    # What the sum's rounding left in the mean is taken out again: a constant channel shows variance 0.
    squares, left = (_sum_over_ranks(torch.stack([centred.square().sum(axes), centred.sum(axes)])) / count).unbind(0)
    mean, std = mean + left, (squares - left.square()).clamp(min=0).sqrt()
    _check_start(x, std, layer)
    floor = torch.maximum(1e-4 * std.max(), 2 * torch.finfo(dtype).eps * mean.abs())
    std = torch.where(std > floor, std, 1.0)
    return -std.log(), -mean / std


def _check_start(x: Tensor, std: Tensor, layer: str) -> None:
    """Waits for the device, once per start. ``std`` is that of all ranks, so all of them raise or none does."""
    if torch.compiler.is_compiling() or under_transform() or bool(torch.isfinite(std).all()):
        return
    found = describe_non_finite(x)
    if found is None:
        found = "its variance overflows" if world_size() == 1 else "another rank's part is not finite"
    raise ValueError(f"{layer} cannot start from this batch: {found}")
