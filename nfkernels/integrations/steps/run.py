"""Running the steps of a chain: their small parameters stacked, their networks called as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...nn.conv_net import is_channels_last
from ...nn.fold import Folded
from ...nn.replay import RandomState, as_in_forward, autocast_state, call_with, random_state, set_random_state
from ...nn.reversible import keeping_output
from ...nn.steps_body import Leaves, StepsBody
from ...reference.affine_coupling import compute_dtype
from .chain import Path, Run, at
from .parts import fold

_SMALL = 3  # mix, shift, unmix: then come the networks' parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleSteps(StepsBody):
    """Steps whose networks are modules, called by ``__call__``. ``parameters`` are theirs, each once, where a backward
    has to run them again; it draws the same random numbers and has the forward's autocast."""

    modules: tuple[nn.Module, ...]
    parameters: list[Tensor] | None = None
    places: list[dict[str, int]] = field(default_factory=list)
    random: dict[int, RandomState] = field(default_factory=dict)
    autocast: tuple | None = None

    def networks(self, tensors):
        return [(k, tensors) for k in range(self.steps)]

    def reads(self, x, tensors):
        first = next((p for p in self.modules[0].parameters() if p.dim() == 4), None)
        return x.dtype, first is not None and is_channels_last(first)

    def params(self, part, x, network):
        k, tensors = network
        module = self.modules[k]
        if self.parameters is None:
            return module(part)
        if k not in self.random:
            self.random[k] = random_state(x.device)
            return module(part)
        set_random_state(self.random[k], x.device)
        if self._holds(k) and all(tensors[i] is self.parameters[i - _SMALL] for i in self.places[k].values()):
            return module(part)
        return call_with(module, {name: tensors[i] for name, i in self.places[k].items()}, (part,))

    def again(self, kept, x, network, wanted):
        k, tensors = network
        held = self._holds(k)
        leaves: Leaves = {
            i: self.parameters[i - _SMALL] if held else tensors[i].requires_grad_()
            for i in self.places[k].values()
            if wanted[i]
        }
        given = [*tensors[:_SMALL], *self.parameters] if held else tensors
        return self.params(kept, x, (k, given)), leaves

    def joined(self, place, grads):
        found = [grad for _, grad in grads if grad is not None]
        return sum(found[1:], found[0]) if found else None

    def forward(self, x, tensors):
        if not self.random:
            return super().forward(x, tensors)
        with as_in_forward(x.device, self.autocast):
            return super().forward(x, tensors)

    def inverse(self, z, tensors):
        with as_in_forward(z.device, self.autocast):
            return super().inverse(z, tensors)

    def backward(self, z, dz, dlogdet, tensors, wanted):
        with as_in_forward(z.device, self.autocast):
            return super().backward(z, dz, dlogdet, tensors, wanted)

    def _holds(self, k: int) -> bool:
        """Whether the network has the parameters that it had in the forward (``functional_call`` may have returned)."""
        now = dict(self.modules[k].named_parameters())
        return all(now[name] is self.parameters[i - _SMALL] for name, i in self.places[k].items())


def run(runs: Sequence[Run], root: nn.Module, x: Tensor, to_data: bool, reversible: bool) -> tuple[Tensor, Tensor]:
    """``(out, logdet [B])`` of the runs, whose layers lie at their paths below ``root``."""
    total = None
    for one in reversed(runs) if to_data else runs:
        x, logdet = _run(one, root, x, to_data, reversible)
        total = logdet if total is None else total + logdet
    return x, total


def _run(one: Run, root: nn.Module, x: Tensor, to_data: bool, reversible: bool) -> tuple[Tensor, Tensor]:
    coupling, graph = one.coupling, torch.is_grad_enabled()
    places = one.places[::-1] if to_data else one.places
    made, constant = _linear(one, places, root, x, weight=graph or not to_data, inverse=graph or to_data)
    maps = (made.unmix, made.unshift, made.mix) if to_data else (made.mix, made.shift, made.unmix)
    flip = None
    if coupling.to_data != to_data:
        coupling = one.turned
        flip, maps = _turned(*maps, coupling.signs(maps[1]), to_data)
        flip = flip.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
    modules = tuple(at(root, of_step[-1] + coupling.network) for of_step in places)
    options = {
        "steps": len(modules), "split": coupling.split, "scale_map": coupling.scale_map, "order": coupling.order,
        "layout": coupling.layout, "identity": coupling.identity, "couples_first": to_data, "modules": modules,
    }  # fmt: skip
    if flip is not None and to_data:
        x = x * flip
    if reversible and graph and not getattr(root, "_is_replica", False):  # whose tensors are no parameters
        parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))
        number = {p: i for i, p in enumerate(parameters, _SMALL)}
        named = [{name: number[p] for name, p in m.named_parameters()} for m in modules]
        body = ModuleSteps(**options, parameters=parameters, places=named, autocast=autocast_state(x.device))
        z, logdet = keeping_output(body, x, [*maps, *parameters])
    else:
        z, logdet = ModuleSteps(**options).forward(x, maps)
    if flip is not None and not to_data:
        z = z * flip
    return z, logdet - constant if to_data else logdet + constant


def _turned(
    mix: Tensor, shift: Tensor, unmix: Tensor | None, signs: Tensor, to_data: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """The maps around couplings that see their data with these signs, and the signs ``[C]`` that are still to be turned
    where there is no map: of what comes in on the way to the data, of what goes out on the way from it."""
    ends = signs.clone()
    ends[-1 if to_data else 0].fill_(1.0)
    left, right = (ends, signs) if to_data else (signs, ends)
    turned = None if unmix is None else right[..., None] * unmix * left[:, None]
    return signs[0], (left[..., None] * mix * right[:, None], left * shift, turned)


def _linear(
    one: Run, places: Sequence[Sequence[Path]], root: nn.Module, x: Tensor, weight: bool, inverse: bool
) -> tuple[Folded, Tensor]:
    """Every step's actnorm and 1x1 as one map, all K in one go; and the log-determinant that no data changes."""
    dtype = compute_dtype(x)
    stacked = []
    for i, part in enumerate(one.linear):
        layers = [at(root, of_step[i]) for of_step in places]
        stacked.append([torch.stack([getattr(m, name) for m in layers]).to(dtype) for name in part.names])
    maps, logdet = fold(one.linear, stacked, weight, inverse)
    return maps, logdet * x.shape[2:].numel()
