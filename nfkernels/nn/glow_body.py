"""K Glow steps as functions of their tensors: forward, inverse, and the walk back from the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import (
    ConditionerInput,
    ScaleMap,
    affine_coupling,
    affine_coupling_from_output,
    channel_mix,
    channel_mix_from_output,
    coupling_mix,
)
from ..ops.affine_coupling import OrderName
from .conv_net import Drop, check_precision, conv_net, drop_by_key, is_channels_last
from .replay import gradients


class GlowTensors(NamedTuple):
    """What the steps are made of, all K of each together.

    mix, shift: a step begins with ``mix[k] x + shift[k]``, ``[K, C, C]`` and ``[K, C]``; unmix: the inverses of mix.
    Without mix the shift is the inverse's: ``x = unmix[k] y + shift[k]``.
    extra: the context's part of the networks' first layers, ``[B, K hidden]``. drop: factors ``[K, B, hidden]`` or a
    key, int64 ``[2]``. The rest: the networks' arranged weights, stacked along axis 0.
    """

    mix: Tensor | None
    shift: Tensor
    unmix: Tensor | None
    extra: Tensor | None
    drop: Tensor | None
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    weight3: Tensor
    bias3: Tensor


_FIRST_WEIGHT = GlowTensors._fields.index("weight1")


@dataclass(frozen=True)
class GlowBody:
    """The options of K steps; ``matrices``, ``kernels`` as for ``conv_net``, ``rate`` of a dropout by key."""

    steps: int
    split: int
    kernels: tuple[int, int]
    matrices: bool
    scale_map: ScaleMap
    order: OrderName
    rate: float = 0.0

    def forward(self, x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """``(z, logdet)``, logdet that of the couplings alone."""
        t = GlowTensors(*tensors)
        mixes, shifts, networks = t.mix.unbind(0), t.shift.unbind(0), self.networks(t)
        unmixes = (None,) * self.steps if t.unmix is None else t.unmix.unbind(0)
        # What a network reads leaves the mix in its own dtype and layout.
        reads = ConditionerInput(0, self.split, t.weight1.dtype, is_channels_last(t.weight1))
        logdet = None
        x = channel_mix(x, mixes[0], shifts[0])
        part = x.narrow(1, 0, self.split)
        for k, network in enumerate(networks):
            if k + 1 == self.steps:
                return self.couple(x, network, logdet, part=part)
            params = self._params(part, x, network)
            x, logdet, part = coupling_mix(
                x, params, mixes[k + 1], shifts[k + 1], inverse_weight=unmixes[k + 1], scale_map=self.scale_map,
                order=self.order, identity="first", logdet=logdet, extra=reads,
            )  # fmt: skip
        raise AssertionError("there is no Glow without steps")

    def inverse(self, z: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        return self.inverse_and_logdet(z, tensors)[0]

    def inverse_and_logdet(self, z: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """``(x, logdet)`` of the inverse, again without the mixes' logdet; needs ``unmix``, with a graph if wanted."""
        *_, last = self.undone(z, tensors)
        return last

    def undone(self, z: Tensor, tensors: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's input and the log-determinant so far, from the last step to the first."""
        t = GlowTensors(*tensors)
        shifts = t.shift if t.mix is None else -(t.unmix * t.shift[:, None]).sum(2)
        logdet = None
        for network, unmix, shift in zip(*map(reversed, (self.networks(t), t.unmix.unbind(0), shifts.unbind(0)))):
            z, logdet = self.couple(z, network, logdet, inverse=True)
            z = channel_mix(z, unmix, shift)
            yield z, logdet

    def done(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Each step's output, from the first to the last."""
        t = GlowTensors(*tensors)
        for network, mix, shift in zip(self.networks(t), t.mix.unbind(0), t.shift.unbind(0), strict=True):
            x, _ = self.couple(channel_mix(x, mix, shift), network)
            yield x

    def backward(self, z, dz, dlogdet, tensors, wanted):
        _, dx, grads = self.walk_back(z, torch.zeros_like(z) if dz is None else dz, dlogdet, tensors, wanted)
        return dx, grads

    def walk_back(self, z, dz, dlogdet, tensors, wanted) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """``(x, dx, gradients of the tensors that are wanted)`` from the output alone; no graph."""
        t = GlowTensors(*tensors)
        mixes, unmixes, shifts = t.mix.unbind(0), t.unmix.unbind(0), t.shift.unbind(0)
        networks = self.networks(GlowTensors(*(None if v is None else v.detach() for v in t)))
        found: list[list[Tensor]] = [[] for _ in wanted]  # by tensor, the last step's gradient first
        places = [i for i, w in enumerate(wanted) if w and (i >= _FIRST_WEIGHT or t._fields[i] == "extra")]
        for k in reversed(range(self.steps)):
            weights, extra, drop = networks[k]
            leaves = {i: v.requires_grad_() for i, v in enumerate(weights, _FIRST_WEIGHT) if wanted[i]}
            if wanted[t._fields.index("extra")] and extra is not None:
                leaves[t._fields.index("extra")] = extra.requires_grad_()
            kept = z.narrow(1, 0, self.split).detach().requires_grad_()
            with torch.enable_grad():
                params = self._params(kept, z, (weights, extra, drop))
            x, dx, dparams, _ = affine_coupling_from_output(
                z, params.detach(), dz, dlogdet, scale_map=self.scale_map, order=self.order, identity="first"
            )
            through, *rest = gradients([params], [kept, *(leaves[i] for i in places)], [dparams])
            del params, dparams
            if through is not None:
                dx.narrow(1, 0, self.split).add_(through)
            for i, grad in zip(places, rest, strict=True):
                found[i].append(torch.zeros_like(leaves[i]) if grad is None else grad)
            z, dz, dmix, dshift = channel_mix_from_output(x, mixes[k], unmixes[k], shifts[k], dx)
            found[0].append(dmix)
            found[1].append(dshift)
        grads: list[Tensor | None] = [None] * len(wanted)
        grads[0], grads[1] = (torch.stack(v[::-1]) for v in found[:2])
        for i in places:
            grads[i] = torch.cat(found[i][::-1], 1 if t._fields[i] == "extra" else 0)
        return z, dz, grads

    # --- a step's parts -----------------------------------------------------------------------------------------------

    def networks(self, t: GlowTensors) -> list[tuple[tuple[Tensor, ...], Tensor | None, Drop]]:
        """Every network's weights, its part of the context, and what it drops."""
        weights = zip(*(v.split(v.shape[0] // self.steps) for v in t[_FIRST_WEIGHT:]), strict=True)
        extra = (None,) * self.steps if t.extra is None else t.extra.split(t.extra.shape[1] // self.steps, 1)
        return list(zip(weights, extra, self._drops(t.drop), strict=True))

    def _drops(self, drop: Tensor | None) -> Sequence[Drop]:
        if drop is None:
            return (None,) * self.steps
        if drop.dim() == 3:
            return drop.unbind(0)
        step = torch.arange(self.steps, device=drop.device)
        keys = torch.stack([drop[0].expand(self.steps), drop[1] + step], 1).unbind(0)
        return [lambda h, key=key: drop_by_key(h, self.rate, key) for key in keys]

    def _params(self, part: Tensor, x: Tensor, network: tuple) -> Tensor:
        weights, extra, drop = network
        params = conv_net(part, weights, extra, None, drop, self.matrices, self.kernels)
        return check_precision(params, x, "GlowSteps")

    def couple(
        self, x: Tensor, network: tuple, logdet: Tensor | None = None, *, part: Tensor | None = None,
        inverse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One coupling; ``part`` is what its network reads, where that exists already."""
        part = x.narrow(1, 0, self.split) if part is None else part
        params = self._params(part, x, network)
        return affine_coupling(
            x, params, scale_map=self.scale_map, order=self.order, identity="first", inverse=inverse, logdet=logdet
        )
