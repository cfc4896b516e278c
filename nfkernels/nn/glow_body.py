"""K Glow steps as functions of their tensors, the weights of their K networks stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conv_net import Drop, check_precision, conv_net, drop_by_key, is_channels_last
from .steps_body import Leaves, StepsBody, Tensors


class GlowTensors(NamedTuple):
    """What the steps are made of, all K of each together.

    mix, shift, unmix: see :class:`StepsBody`.
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


_EXTRA = GlowTensors._fields.index("extra")
_FIRST_WEIGHT = GlowTensors._fields.index("weight1")


@dataclass(frozen=True, kw_only=True)
class GlowBody(StepsBody):
    """The options of K steps; ``matrices``, ``kernels`` as for ``conv_net``, ``rate`` of a dropout by key."""

    kernels: tuple[int, int]
    matrices: bool
    rate: float = 0.0

    def networks(self, tensors: Tensors) -> list[tuple[tuple[Tensor, ...], Tensor | None, Drop]]:
        """Every network's weights, its part of the context, and what it drops."""
        t = GlowTensors(*tensors)
        weights = zip(*(v.split(v.shape[0] // self.steps) for v in t[_FIRST_WEIGHT:]), strict=True)
        extra = (None,) * self.steps if t.extra is None else t.extra.split(t.extra.shape[1] // self.steps, 1)
        return list(zip(weights, extra, self._drops(t.drop), strict=True))

    def reads(self, x: Tensor, tensors: Tensors) -> tuple[torch.dtype, bool]:
        first = GlowTensors(*tensors).weight1
        return first.dtype, is_channels_last(first)

    def params(self, part: Tensor, x: Tensor, network: Any) -> Tensor:
        weights, extra, drop = network
        params = conv_net(part, weights, extra, None, drop, self.matrices, self.kernels)
        return check_precision(params, x, "GlowSteps")

    def again(self, kept: Tensor, x: Tensor, network: Any, wanted: Sequence[bool]) -> tuple[Tensor, Leaves]:
        weights, extra, _ = network
        leaves: Leaves = {i: v.requires_grad_() for i, v in enumerate(weights, _FIRST_WEIGHT) if wanted[i]}
        if wanted[_EXTRA] and extra is not None:
            leaves[_EXTRA] = extra.requires_grad_()
        return self.params(kept, x, network), leaves

    def joined(self, place: int, grads: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        of_steps = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in grads[::-1]]
        return torch.cat(of_steps, 1 if place == _EXTRA else 0)

    def _drops(self, drop: Tensor | None) -> Sequence[Drop]:
        if drop is None:
            return (None,) * self.steps
        if drop.dim() == 3:
            return drop.unbind(0)
        step = torch.arange(self.steps, device=drop.device)
        keys = torch.stack([drop[0].expand(self.steps), drop[1] + step], 1).unbind(0)
        return [partial(drop_by_key, p=self.rate, key=key) for key in keys]
