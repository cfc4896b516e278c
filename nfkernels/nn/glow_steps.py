"""K steps of Glow as one module: their small parameters stacked, so that one launch serves all K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ScaleMap, affine_coupling, channel_mix, lu_compose
from ..ops.affine_coupling import OrderName, _choice
from ..ops.lu_compose import LUMatrices
from ..reference.affine_coupling import Order, compute_dtype
from .actnorm import StartsFromData, whitening
from .bijection import check_channels, refuse_lengths
from .conv_net import (
    Dropout,
    arrange,
    by_matrices,
    check_context,
    check_network,
    check_precision,
    conv_net,
    fold_log_scale,
    network_dtype,
    uniform_init,
)
from .invertible_conv import plu
from .linear_bijection import checked_log_scale, random_rotations


class GlowSteps(StartsFromData):
    """``steps`` times (ActNorm, 1x1 convolution, affine coupling) on ``[B, C, H, W]``; logdet ``[B]``.

    Args:
        channels: C, at least 2; the first ``C - C // 2`` pass through every coupling.
        steps: K.
        hidden: width of the coupling networks (conv, ReLU, 1x1, ReLU, dropout, conv).
        context_channels: E of a context ``[B, E]`` that shifts the first convolution's output; 0 for none.
        kernel, last_kernel: odd sides of the first and the last convolution of those networks (by default alike).
        dropout, dropout_of: see :class:`ConvConditioner`.
        scale_map, order: see :func:`nfkernels.affine_coupling`.

    It computes what a chain of :class:`ActNorm`, :class:`InvertibleConv1x1` and :class:`AffineCoupling` would. ActNorm
    is folded into the 1x1 (``W diag(e^s)`` and ``W b``), all K matrices are composed, inverted and differentiated in
    one batch, and the weights of the K networks lie stacked along axis 0: a step is one channel mix, one network and
    one coupling.
    Cost per step: O(B C^2 P) and the network. Reference: Kingma & Dhariwal 2018 (Glow), table 1.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        hidden: int,
        *,
        context_channels: int = 0,
        kernel: int = 3,
        last_kernel: int | None = None,
        dropout: float = 0.0,
        dropout_of: Dropout = "element",
        scale_map: ScaleMap | str = "glow",
        order: OrderName = "shift_first",
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"GlowSteps needs at least 2 channels (squeeze images first), got {channels}")
        if steps < 1 or hidden < 1:
            raise ValueError(f"GlowSteps needs at least 1 step and 1 hidden channel, got {steps} and {hidden}")
        last_kernel = kernel if last_kernel is None else last_kernel
        check_network((kernel, last_kernel), dropout, dropout_of)
        _choice(Order, order, "order")
        self.channels, self.steps, self.hidden, self.context_channels = channels, steps, hidden, context_channels
        self.dropout, self.dropout_of, self.order = dropout, dropout_of, order
        self.kernels = (kernel, last_kernel)
        self.scale_map = ScaleMap.parse(scale_map)
        self.split = channels - channels // 2
        out = (2 if self.scale_map.has_scale else 1) * (channels // 2)

        self.log_scale = nn.Parameter(torch.zeros(steps, channels))
        self.bias = nn.Parameter(torch.zeros(steps, channels))
        permutation, lower, upper, log_s, sign_s = plu(random_rotations(steps, channels))
        self.lower, self.upper, self.log_s = nn.Parameter(lower), nn.Parameter(upper), nn.Parameter(log_s)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign_s", sign_s)

        # Four axes each, so that .to(memory_format=torch.channels_last) reaches them.
        self.weight1 = nn.Parameter(torch.empty(steps * hidden, self.split, kernel, kernel))
        self.bias1 = nn.Parameter(torch.empty(steps * hidden))
        self.weight2 = nn.Parameter(torch.empty(steps * hidden, hidden, 1, 1))
        self.bias2 = nn.Parameter(torch.empty(steps * hidden))
        self.weight3 = nn.Parameter(torch.zeros(steps * out, hidden, last_kernel, last_kernel))
        self.bias3 = nn.Parameter(torch.zeros(steps * out))
        self.log_scale3 = nn.Parameter(torch.zeros(steps * out))
        self.context_weight = nn.Parameter(torch.zeros(steps * hidden, context_channels)) if context_channels else None
        uniform_init(self.weight1, self.bias1)
        uniform_init(self.weight2, self.bias2)

    @property
    def uses_context(self):
        return self.context_channels > 0

    def forward(self, x, context=None, *, lengths=None):
        check_channels(x, self.channels, "GlowSteps", least=4, own=self.bias)
        refuse_lengths(lengths, "GlowSteps")
        self.start_if_due(x, context, lengths)
        dtype = compute_dtype(x)
        made = self._composed(dtype, inverse=False)
        # y = W (e^s x + b) = (W e^s) x + W b; sums and not products, which TF32 would round.
        mixing = made.weight * torch.exp(self.log_scale.to(dtype))[:, None]
        shift = (made.weight * self.bias[:, None]).sum(2)
        logdet = None
        networks = self._networks(x, context)
        for weight, bias, network in zip(mixing.unbind(0), shift.unbind(0), networks, strict=True):
            x = channel_mix(x, weight, bias)
            x, logdet = self._couple(x, network, logdet, False)
        return x, logdet + self._constant(made, x)

    def inverse(self, z, context=None, *, lengths=None):
        check_channels(z, self.channels, "GlowSteps", least=4, own=self.bias)
        refuse_lengths(lengths, "GlowSteps")
        dtype = compute_dtype(z)
        made = self._composed(dtype, weight=False)
        unscale = torch.exp(-self.log_scale.to(dtype))
        weights, biases = (unscale[..., None] * made.inverse).unbind(0), (-self.bias * unscale).unbind(0)
        logdet = None
        for k, network in reversed(list(enumerate(self._networks(z, context)))):
            z, logdet = self._couple(z, network, logdet, True)
            z = channel_mix(z, weights[k], biases[k])
        return z, logdet - self._constant(made, z)

    def start(self, x, context, lengths):
        check_channels(x, self.channels, "GlowSteps", least=4, own=self.bias)
        dtype = compute_dtype(x)
        matrices = self._composed(dtype, inverse=False).weight
        found = []
        for k, network in enumerate(self._networks(x, context)):
            log_scale, bias = whitening(x, layer="GlowSteps")
            found.append((log_scale, bias))
            weight = matrices[k]
            x = channel_mix(x, weight * torch.exp(log_scale), weight @ bias)
            x, _ = self._couple(x, network, None, False)
        # At the end, so that data which is refused half-way leaves nothing behind.
        self.log_scale.copy_(torch.stack([log_scale for log_scale, _ in found]))
        self.bias.copy_(torch.stack([bias for _, bias in found]))

    def _composed(self, dtype: torch.dtype, **options: bool) -> LUMatrices:
        """All K mixing matrices or their inverses, ActNorm not yet in them, ``[K, C, C]``, in one launch."""
        factors = (t.to(dtype) for t in (self.lower, self.upper, checked_log_scale(self.log_s, "GlowSteps")))
        return lu_compose(*factors, sign=self.sign_s, permutation=self.permutation, **options)

    def _constant(self, made: LUMatrices, x: Tensor) -> Tensor:
        """The part of the log-determinant that does not depend on the data."""
        return (made.logdet + self.log_scale.to(made.logdet.dtype).sum()) * (x.shape[2] * x.shape[3])

    def _couple(self, x: Tensor, network: tuple, logdet: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        *weights, extra, matrices = network
        rate = self.dropout if self.training else 0.0
        params = conv_net(
            x.narrow(1, 0, self.split), weights, extra, None, rate, self.dropout_of, matrices, self.kernels
        )
        check_precision(params, x, "GlowSteps")
        return affine_coupling(
            x, params, scale_map=self.scale_map, order=self.order, identity="first", inverse=inverse, logdet=logdet
        )

    def _networks(self, x: Tensor, context: Tensor | None) -> Iterator[tuple]:
        """The weights of each network in turn; cast, arranged, and the last log-scale folded in, for all K at once."""
        dtype = network_dtype(self.weight1)
        matrices = by_matrices(x, dtype)
        last = fold_log_scale(self.weight3, self.bias3, self.log_scale3)
        stacked = [v.to(dtype) for v in (self.weight1, self.bias1, self.weight2, self.bias2, *last)]
        parts = [v.split(v.shape[0] // self.steps) for v in arrange(stacked, matrices)]
        extra: Sequence[Tensor | None] = (None,) * self.steps
        if self.context_weight is not None:
            context = check_context(context, self.context_channels, "GlowSteps")
            extra = F.linear(context.to(dtype), self.context_weight.to(dtype)).split(self.hidden, 1)
        return zip(*parts, extra, (matrices,) * self.steps, strict=True)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, steps={self.steps}, hidden={self.hidden}, scale_map={self.scale_map}"
