"""A model's networks replaced by what they returned once: what a step costs outside networks and optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, fresh):
        ctx.channels = x.shape[1]
        return params.clone() if fresh else params.detach()

    @staticmethod
    def backward(ctx, gradient):
        back = gradient[:, : ctx.channels]
        if back.shape[1] < ctx.channels:  # a network with fewer outputs than inputs
            back = nn.functional.pad(back, [0, 0] * (back.dim() - 2) + [0, ctx.channels - back.shape[1]])
        return back, None, None


class StandIn(nn.Module):
    """In a network's place: forward, the tensor that it gave for these inputs; backward, its gradient's first channels.

    What else a layer asks of its network (a width, a mask) the network still answers. ``fresh``: a copy each time, for
    layers that write into what they are given.
    """

    def __init__(self, network: nn.Module, fresh: bool) -> None:
        super().__init__()
        self.__dict__["network"] = network  # not a submodule: its parameters are out of it
        self.fresh, self.calls, self.params = fresh, 0, None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["network"], name)

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        self.calls += 1
        return _Given.apply(x, self.params, self.fresh)


def without_networks(model: nn.Module, places: list[tuple[nn.Module, str]], run: Any, fresh: bool) -> list[StandIn]:
    """Puts stand-ins in the networks' places for good, after one ``run()`` that shows what the networks return."""
    found: list[StandIn] = []
    for owner, name in places:
        network = getattr(owner, name)
        stand_in = StandIn(network, fresh)

        def note(module: nn.Module, args: Any, out: Any, stand_in: StandIn = stand_in) -> None:
            stand_in.params = out.detach().clone()

        hook = network.register_forward_hook(note)
        found.append(stand_in)
        stand_in.__dict__["hook"] = hook
    with torch.no_grad():
        run()
    for (owner, name), stand_in in zip(places, found):
        stand_in.__dict__["hook"].remove()
        if stand_in.params is None:
            raise RuntimeError(f"the network {name} of a {type(owner).__name__} was not called")
        setattr(owner, name, stand_in)
    return found
