"""Learned priors as bijections: latents leave as N(0, I), whatever the model has learned about them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import ScaleMap, affine_coupling
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import no_autocast
from .bijection import Bijection, check_channels, positions, valid_mask
from .conv_net import check_context, check_network, check_precision, fold_log_scale, network_dtype

_EXP = ScaleMap.exp()


class SplitPrior(Bijection):
    """``eps = (z2 - mu(z1)) / sigma(z1)`` on the last ``C // 2`` channels; logdet ``-sum log sigma``.

    The factored-out half of a multi-scale flow, in the coordinates of its learned prior ``N(mu, sigma)``: the data
    keeps its shape, the last half is N(0, I), and :class:`MultiScale` lets it leave. mu and log sigma are one
    convolution of z1 (side ``kernel``; zero-initialised, with a learned log-scale) plus, where ``context_channels``
    is not 0, a linear map of a context ``[B, E]``.

    On ``x [B, C, *spatial]``. Raises ``ValueError`` for fewer than 2 channels, and for a context that does not fit.
    Reference: Dinh et al. 2017 (RealNVP), section 3.6; Kingma & Dhariwal 2018 (Glow), figure 2b.
    """

    def __init__(self, channels: int, *, context_channels: int = 0, kernel: int = 3) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"a SplitPrior needs at least 2 channels, got {channels}")
        self.channels = channels
        self.conditioner = ZeroConv(
            channels - channels // 2, 2 * (channels // 2), context_channels=context_channels, kernel=kernel
        )

    @property
    def uses_context(self) -> bool:
        return self.conditioner.context is not None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(x, context, lengths, True)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(z, context, lengths, False)

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_channels(x, self.channels, "SplitPrior", least=3)
        mask = valid_mask(x, lengths)
        params = self.conditioner(x.narrow(1, 0, self.channels - self.channels // 2), context)
        check_precision(params, x, "SplitPrior")
        return affine_coupling(x, params, scale_map=_EXP, identity="first", inverse=inverse, mask=mask)


class ZeroConv(nn.Module):
    """One convolution that starts at zero, with a learned log-scale per channel (1-d or 2-d, as the data is)."""

    def __init__(self, in_channels: int, out_channels: int, *, context_channels: int = 0, kernel: int = 3) -> None:
        super().__init__()
        check_network((kernel,), 0.0, "element")
        self.out_channels, self.context_channels = out_channels, context_channels
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        self.context = nn.Parameter(torch.zeros(out_channels, context_channels)) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        dtype = network_dtype(self.weight)
        weight, bias = fold_log_scale(self.weight, self.bias, self.log_scale)
        pad = self.weight.shape[-1] // 2
        if x.dim() == 3:  # the middle row of the kernel is a 1-d kernel
            y = nn.functional.conv1d(x.to(dtype), weight[:, :, pad].to(dtype), bias.to(dtype), padding=pad)
        else:
            y = nn.functional.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=pad)
        if self.context is not None:
            context = check_context(context, self.context_channels, "SplitPrior")
            shift = nn.functional.linear(context.to(dtype), self.context.to(dtype))
            y = y + shift.reshape(*shift.shape, *[1] * (y.dim() - 2))
        return y


class DiagonalPrior(Bijection):
    """``eps = (z - mu) / sigma``, mu and sigma learned per channel (and per context): the prior of the last level.

    On ``z [B, C, *spatial]``; logdet ``-P sum log sigma``. With ``context_channels`` a context ``[B, E]`` shifts mu and
    log sigma through a zero-initialised linear map. Raises ``ValueError`` for a context that does not fit.
    """

    def __init__(self, channels: int, *, context_channels: int = 0) -> None:
        super().__init__()
        self.channels, self.context_channels = channels, context_channels
        self.loc = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.context = nn.Parameter(torch.zeros(2 * channels, context_channels)) if context_channels else None

    @property
    def uses_context(self) -> bool:
        return self.context is not None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_scale, mask = self._prior(x, context, lengths)
        y = ((x - loc) * torch.exp(-log_scale)).to(x.dtype)
        return y if mask is None else torch.where(mask, y, 0.0), -self._logdet(x, log_scale, lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_scale, mask = self._prior(z, context, lengths)
        x = (z * torch.exp(log_scale) + loc).to(z.dtype)
        return x if mask is None else torch.where(mask, x, 0.0), self._logdet(z, log_scale, lengths)

    def _prior(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check_channels(x, self.channels, "DiagonalPrior", own=self.loc)
        dtype = compute_dtype(x)
        loc, log_scale = self.loc.to(dtype)[None], self.log_scale.to(dtype)[None]
        if self.context is not None:
            context = check_context(context, self.context_channels, "DiagonalPrior")
            with no_autocast(x.device.type):
                shift = nn.functional.linear(context.to(dtype), self.context.to(dtype))
            loc, log_scale = loc + shift[:, : self.channels], log_scale + shift[:, self.channels :]
        shape = (*loc.shape, *[1] * (x.dim() - 2))
        return loc.reshape(shape), log_scale.reshape(shape), valid_mask(x, lengths)

    def _logdet(self, x: Tensor, log_scale: Tensor, lengths: Tensor | None) -> Tensor:
        return (log_scale.flatten(1).sum(1) * positions(x, lengths)).expand(x.shape[0])

    def extra_repr(self) -> str:
        return f"{self.channels}"
