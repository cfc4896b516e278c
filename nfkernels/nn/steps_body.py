"""K steps of (channel mix, coupling) as functions of their tensors: both directions, and the walk back from the output.

What a step's network is, is left to who derives from it: weights stacked for all K (Glow's own), or modules that
somebody else has written (``integrations.steps``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from ..ops.affine_coupling import IdentityName, LayoutName, OrderName
from .replay import gradients

Tensors = Sequence[Tensor | None]
Leaves = dict[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepsBody:
    """The options of K steps that have the same ones; ``split`` channels pass through their couplings.

    The first three of the tensors are ``mix [K, C, C]``, ``shift [K, C]`` and ``unmix``, the inverses of mix: a step
    mixes by ``mix[k] x + shift[k]`` and then couples, or the other way round (``couples_first``). Without mix the
    shift is the inverse's: ``x = unmix[k] y + shift[k]``.
    """

    steps: int
    split: int
    scale_map: ScaleMap
    order: OrderName
    layout: LayoutName = "shift_scale"
    identity: IdentityName = "first"
    couples_first: bool = False

    # --- what a network is --------------------------------------------------------------------------------------------

    def networks(self, tensors: Tensors) -> Sequence[Any]:
        """The K networks, as :meth:`params` takes them."""
        raise NotImplementedError

    def params(self, part: Tensor, x: Tensor, network: Any) -> Tensor:
        """What one network makes of the ``part`` of ``x`` that passes through."""
        raise NotImplementedError

    def reads(self, x: Tensor, tensors: Tensors) -> tuple[torch.dtype, bool]:
        """The type that the networks read, and whether they read it channels-last."""
        raise NotImplementedError

    def again(self, kept: Tensor, x: Tensor, network: Any, wanted: Sequence[bool]) -> tuple[Tensor, Leaves]:
        """``params`` once more, with a graph, and the network's leaves by their places among the tensors."""
        raise NotImplementedError

    def joined(self, place: int, grads: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """One tensor's gradient, from the steps' ``(leaf, gradient)``, the last step's first."""
        raise NotImplementedError

    # --- both directions ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """``(z, logdet)``, logdet that of the couplings alone."""
        mixes, shifts = tensors[0].unbind(0), tensors[1].unbind(0)
        unmixes = (None,) * self.steps if tensors[2] is None else tensors[2].unbind(0)
        # What a network reads leaves the mix in its own dtype and layout.
        start = self._start(x)
        reads = ConditionerInput(start, self.split, *self.reads(x, tensors))
        logdet = None
        if not self.couples_first:
            x = channel_mix(x, mixes[0], shifts[0])
        part = x.narrow(1, start, self.split)
        for k, network in enumerate(self.networks(tensors)):
            ends = k + 1 == self.steps
            if ends and not self.couples_first:
                return self.couple(x, network, logdet, part=part)
            params = self.params(part, x, network)
            j = k if self.couples_first else k + 1
            x, logdet, *more = coupling_mix(
                x, params, mixes[j], shifts[j], inverse_weight=unmixes[j], scale_map=self.scale_map,
                layout=self.layout, order=self.order, identity=self.identity, logdet=logdet,
                extra=None if ends else reads,
            )  # fmt: skip
            part = more[0] if more else None
        return x, logdet

    def inverse(self, z: Tensor, tensors: Tensors) -> Tensor:
        return self.inverse_and_logdet(z, tensors)[0]

    def inverse_and_logdet(self, z: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """``(x, logdet)`` of the inverse, again without the mixes' logdet; needs ``unmix``, with a graph if wanted."""
        *_, last = self.undone(z, tensors)
        return last

    def undone(self, z: Tensor, tensors: Tensors) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's input and the log-determinant so far, from the last step to the first."""
        mix, shift, unmix = tensors[:3]
        shifts = shift if mix is None else -(unmix * shift[:, None]).sum(2)
        logdet = None
        for network, back, shift in zip(*map(reversed, (self.networks(tensors), unmix.unbind(0), shifts.unbind(0)))):
            if self.couples_first:
                z = channel_mix(z, back, shift)
            z, logdet = self.couple(z, network, logdet, inverse=True)
            if not self.couples_first:
                z = channel_mix(z, back, shift)
            yield z, logdet

    def done(self, x: Tensor, tensors: Tensors) -> Iterator[Tensor]:
        """Each step's output, from the first to the last."""
        for network, mix, shift in zip(self.networks(tensors), tensors[0].unbind(0), tensors[1].unbind(0), strict=True):
            x = x if self.couples_first else channel_mix(x, mix, shift)
            x, _ = self.couple(x, network)
            x = channel_mix(x, mix, shift) if self.couples_first else x
            yield x

    def couple(
        self, x: Tensor, network: Any, logdet: Tensor | None = None, *, part: Tensor | None = None,
        inverse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One coupling; ``part`` is what its network reads, where that exists already."""
        part = x.narrow(1, self._start(x), self.split) if part is None else part
        params = self.params(part, x, network)
        return affine_coupling(x, params, inverse=inverse, logdet=logdet, **self._options())

    # --- from the output ----------------------------------------------------------------------------------------------

    def backward(
        self, z: Tensor, dz: Tensor | None, dlogdet: Tensor | None, tensors: Tensors, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        _, dx, grads = self.walk_back(z, torch.zeros_like(z) if dz is None else dz, dlogdet, tensors, wanted)
        return dx, grads

    def walk_back(
        self, z: Tensor, dz: Tensor, dlogdet: Tensor | None, tensors: Tensors, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """``(x, dx, gradients of the tensors that are wanted)`` from the output alone; no graph."""
        mixes, shifts, unmixes = (t.unbind(0) for t in tensors[:3])
        start = self._start(z)
        networks = self.networks([None if t is None else t.detach() for t in tensors])
        dmixes, dshifts = [], []
        found: dict[int, list[tuple[Tensor, Tensor | None]]] = {}  # by tensor, the last step's gradient first
        for k in reversed(range(self.steps)):
            if self.couples_first:
                z, dz, dmix, dshift = channel_mix_from_output(z, mixes[k], unmixes[k], shifts[k], dz)
            kept = z.narrow(1, start, self.split).detach().requires_grad_()
            with torch.enable_grad():
                params, leaves = self.again(kept, z, networks[k], wanted)
            z, dx, dparams, _ = affine_coupling_from_output(z, params.detach(), dz, dlogdet, **self._options())
            through, *rest = gradients([params], [kept, *leaves.values()], [dparams])
            del params, dparams
            if through is not None:
                dx.narrow(1, start, self.split).add_(through)
            for (place, leaf), grad in zip(leaves.items(), rest, strict=True):
                found.setdefault(place, []).append((leaf, grad))
            dz = dx
            if not self.couples_first:
                z, dz, dmix, dshift = channel_mix_from_output(z, mixes[k], unmixes[k], shifts[k], dx)
            dmixes.append(dmix)
            dshifts.append(dshift)
        grads: list[Tensor | None] = [None] * len(wanted)
        grads[0], grads[1] = torch.stack(dmixes[::-1]), torch.stack(dshifts[::-1])
        for place, of_steps in found.items():
            grads[place] = self.joined(place, of_steps)
        return z, dz, grads

    def _start(self, x: Tensor) -> int:
        """The first channel that passes through."""
        return 0 if self.identity == "first" else x.shape[1] - self.split

    def _options(self) -> dict[str, Any]:
        return {"scale_map": self.scale_map, "layout": self.layout, "order": self.order, "identity": self.identity}
