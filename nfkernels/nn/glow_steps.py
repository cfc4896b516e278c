"""K steps of Glow as one module: their small parameters stacked, so that one launch serves all K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ScaleMap, channel_mix, lu_compose
from ..ops._library import under_transform
from ..ops.affine_coupling import OrderName, _choice
from ..ops.lu_compose import LUMatrices
from ..reference.affine_coupling import Order, compute_dtype
from .actnorm import StartsFromData, whitening
from .bijection import check_channels, refuse_lengths
from .conv_net import (
    Dropout,
    arrange,
    arranged_for,
    by_matrices,
    channel_factors,
    check_context,
    check_network,
    fold_log_scale,
    network_dtype,
    uniform_init,
)
from .fold import Scaling, folded
from .glow_body import GlowBody, GlowTensors
from .invertible_conv import plu
from .linear_bijection import checked_log_scale, random_rotations
from .replay import gradients, random_state, set_random_state
from .reversible import Memory, check_memory, keeping_output, relative_drift


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
        memory: what training keeps for its backward: ``"stored"`` every step's activations; ``"reversible"`` the
            output alone, from which the backward rebuilds each step's input on its way, running every network once
            more (see :class:`ReversibleSequential`). Memory then does not grow with ``steps``.

    It computes what a chain of :class:`ActNorm`, :class:`InvertibleConv1x1` and :class:`AffineCoupling` would. ActNorm
    is folded into the 1x1 (``W diag(e^s)`` and ``W b``), all K matrices are composed, inverted and differentiated in
    one batch, and the weights of the K networks lie stacked along axis 0: a step is one network, and one pass over the
    data that couples it and mixes it for the next step.
    Cost per step: O(B C^2 P) and the network. Raises ``ValueError`` for fewer than 2 channels, no step, data of another
    shape, and on the CPU for a matrix that has become singular. Reference: Kingma & Dhariwal 2018 (Glow), table 1.
    """

    permutation: Tensor
    sign_s: Tensor

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
        memory: Memory = "stored",
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"GlowSteps needs at least 2 channels (squeeze images first), got {channels}")
        if steps < 1 or hidden < 1:
            raise ValueError(f"GlowSteps needs at least 1 step and 1 hidden channel, got {steps} and {hidden}")
        last_kernel = kernel if last_kernel is None else last_kernel
        check_network((kernel, last_kernel), dropout, dropout_of)
        _choice(Order, order, "order")
        check_memory(memory)
        self.channels, self.steps, self.hidden, self.context_channels = channels, steps, hidden, context_channels
        self.dropout, self.dropout_of, self.order, self.memory = dropout, dropout_of, order, memory
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
    def uses_context(self) -> bool:
        return self.context_channels > 0

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(x, self.channels, "GlowSteps", least=4, own=self.bias)
        refuse_lengths(lengths, "GlowSteps")
        self.start_if_due(x, context, lengths)
        tensors, constant = self._tensors(x, context, unmix=torch.is_grad_enabled())
        body = self._body(x)
        z, logdet = keeping_output(body, x, tensors) if self.memory == "reversible" else body.forward(x, tensors)
        return z, logdet + constant

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(z, self.channels, "GlowSteps", least=4, own=self.bias)
        refuse_lengths(lengths, "GlowSteps")
        tensors, constant = self._tensors(z, context, mix=False)
        x, logdet = self._body(z).inverse_and_logdet(z, tensors)
        return x, logdet - constant

    def from_output(
        self,
        z: Tensor,
        dz: Tensor | None,
        dlogdet: Tensor | None,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        if dz is None:
            dz = torch.zeros_like(z)
        with torch.enable_grad():
            tensors, constant = self._tensors(z, context)
        asked = [t is not None and t.requires_grad for t in tensors]
        x, dx, grads = self._body(z).walk_back(z, dz, dlogdet, tensors, asked)
        # The constant is one number for all samples.
        return x, dx, gradients([*tensors, constant], wanted, [*grads, None if dlogdet is None else dlogdet.sum()])

    @torch.no_grad()
    def drift(self, x: Tensor, context: Tensor | None = None) -> list[float]:
        """Errors of the steps' inputs rebuilt from the output, first step first; see :func:`nfkernels.nn.drift`."""
        tensors, _ = self._tensors(x, context)
        body = self._body(x)
        true = [x, *body.done(x, tensors)]
        rebuilt = [v for v, _ in body.undone(true[-1], tensors)]
        return [relative_drift(a, b) for a, b in zip(true[:-1], reversed(rebuilt), strict=True)]

    def start(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> None:
        check_channels(x, self.channels, "GlowSteps", least=4, own=self.bias)
        matrices = self._composed(compute_dtype(x), inverse=False).weight
        body = self._body(x)
        draws = self.training and self.dropout and not (torch.compiler.is_compiling() or under_transform())
        state = random_state(x.device) if draws else None
        tensors, _ = self._tensors(x, context)
        if state is not None:  # the forward that follows drops the same, as a later replay of it does
            set_random_state(state, x.device)
        found = []
        for weight, network in zip(matrices.unbind(0), body.networks(tensors), strict=True):
            log_scale, bias = whitening(x, layer="GlowSteps")
            found.append((log_scale, bias))
            x = channel_mix(x, weight * torch.exp(log_scale), weight @ bias)
            x, _ = body.couple(x, network)
        # At the end, so that data which is refused half-way leaves nothing behind.
        self.log_scale.copy_(torch.stack([log_scale for log_scale, _ in found]))
        self.bias.copy_(torch.stack([bias for _, bias in found]))

    def _body(self, x: Tensor) -> GlowBody:
        matrices = by_matrices(x, network_dtype(self.weight1))
        return GlowBody(
            steps=self.steps, split=self.split, scale_map=self.scale_map, order=self.order, kernels=self.kernels,
            matrices=matrices, rate=self.dropout,
        )  # fmt: skip

    def _tensors(
        self, x: Tensor, context: Tensor | None, *, mix: bool = True, unmix: bool = True
    ) -> tuple[GlowTensors, Tensor]:
        """What the steps are made of, for all K at once, and the part of the log-determinant that no data changes."""
        dtype = compute_dtype(x)
        made = self._composed(dtype, weight=mix, inverse=unmix)
        log_scale, bias = self.log_scale.to(dtype), self.bias.to(dtype)
        actnorm = Scaling(torch.exp(log_scale), bias, torch.exp(-log_scale))
        made_of = folded(actnorm, made.weight, made.inverse, None)  # W (e^s x + b) = (W e^s) x + W b
        constant = (made.logdet + log_scale.to(made.logdet.dtype).sum()) * (x.shape[2] * x.shape[3])
        shift = made_of.shift if mix else made_of.unshift
        return GlowTensors(made_of.mix, shift, made_of.unmix, *self._networks(x, context)), constant

    def _composed(self, dtype: torch.dtype, **options: Any) -> LUMatrices:
        """All K mixing matrices or their inverses, ActNorm not yet in them, ``[K, C, C]``, in one launch."""
        factors = (self.lower, self.upper, checked_log_scale(self.log_s, "GlowSteps"))
        lower, upper, log_s = (t.to(dtype) for t in factors)
        return lu_compose(lower, upper, log_s, sign=self.sign_s, permutation=self.permutation, **options)

    def _networks(self, x: Tensor, context: Tensor | None) -> list[Tensor | None]:
        """``extra``, ``drop`` and the weights of all K networks: cast and arranged, the last log-scale folded in."""
        dtype = network_dtype(self.weight1)
        last = fold_log_scale(self.weight3, self.bias3, self.log_scale3)
        weights = (self.weight1, self.bias1, self.weight2, self.bias2, *last)
        matrices = by_matrices(x, dtype)
        stacked = [v.to(dtype) if matrices else arranged_for(v, dtype) for v in weights]
        extra = None
        if self.context_weight is not None:
            context = check_context(context, self.context_channels, "GlowSteps")
            extra = F.linear(context.to(dtype), self.context_weight.to(dtype))
        return [extra, self._drop(x, dtype), *arrange(stacked, matrices)]

    def _drop(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What this pass drops, drawn before it begins: a backward that runs a network again drops the same."""
        if not self.training or not self.dropout:
            return None
        if self.dropout_of == "channel":
            return channel_factors((self.steps, x.shape[0], self.hidden), self.dropout, dtype, x.device)
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, steps={self.steps}, hidden={self.hidden}, scale_map={self.scale_map}"
