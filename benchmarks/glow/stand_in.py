"""Models without their networks: what a step costs outside the conditioners and the optimiser.

Every coupling network (and every convolution of a split prior) is replaced by a stand-in that does no work: forward, it
hands out the same tensor of the right shape every time, made beforehand; backward, it hands its own gradient's first
channels on as the gradient of its input. The graph is the whole one: the coupling still gets params that want a
gradient, and still adds a gradient that comes from a network. The models have width 1, so that weights nobody uses cost
nothing to prepare. What is timed is dequantise, forward, backward, to which everything but the networks belongs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import nfkernels.nn.conv_net
from nfkernels.models import Glow

from ..models import normflows_glow, plain_glow


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, *weights):
        ctx.channels, ctx.shapes = x.shape[1], [w.shape for w in weights]
        return params.detach()

    @staticmethod
    def backward(ctx, gradient):
        zeros = [gradient.new_zeros(()).expand(shape) for shape in ctx.shapes]
        return gradient.narrow(1, 0, ctx.channels), None, *zeros


class StandIn(nn.Module):
    """In the place of a network from ``[B, C, H, W]`` to ``[B, 2 C, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[tuple, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor, context: Tensor | None = None, weights: Sequence[Tensor] = ()) -> Tensor:
        self.calls += 1
        key = (*x.shape, x.dtype, x.device)
        if key not in self.made:
            generator = torch.Generator().manual_seed(0)
            shape = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
            self.made[key] = 0.1 * torch.randn(shape, generator=generator).to(x)
        return _Given.apply(x, self.made[key], *weights)


@contextlib.contextmanager
def without_networks(models: Sequence[nn.Module], *, weights: bool = False) -> Iterator[None]:
    """Inside, the models (of any of the three makers) have stand-ins, and for good: they are of no use afterwards.

    With ``weights`` the stand-ins of ours give the (few) weights of the couplings' networks gradients of zero, which
    reversible training waits for.

    ``RuntimeError`` at the end if no stand-in was asked: then networks are somewhere else by now, and what was timed
    includes them.
    """
    stand_ins = [StandIn() for _ in models]
    ours = [s for s, model in zip(stand_ins, models, strict=True) if isinstance(model, Glow)]
    for stand_in, model in zip(stand_ins, models, strict=True):
        if isinstance(model, plain_glow.PlainGlow):
            for step in (step for level in model.levels for step in level):
                step.coupling.net = stand_in
            model.priors = nn.ModuleList(stand_in for _ in model.priors)
        elif isinstance(model, normflows_glow.NormflowsGlow):
            for coupling, _, _ in (block for level in range(len(model.model.q0)) for block in model.blocks(level)):
                coupling.flows[1].param_map = stand_in
        else:
            for part in model.bijection[1].levels:
                if hasattr(part[2], "conditioner"):
                    part[2].conditioner = stand_in
    with _in_the_place_of_conv_net(weights) if ours else contextlib.nullcontext():
        yield
    if not all(s.calls for s in stand_ins if s not in ours):
        raise RuntimeError("no stand-in was asked: the networks are somewhere else")


@contextlib.contextmanager
def _in_the_place_of_conv_net(with_weights: bool) -> Iterator[None]:
    """``conv_net`` is a function that modules import by name: it is replaced wherever that name stands for it."""
    real, stand_in = nfkernels.nn.conv_net.conv_net, StandIn()

    def given(x: Tensor, weights: Sequence[Tensor], *rest, **more) -> Tensor:
        return stand_in(x, weights=weights if with_weights else ())

    homes = [m for name, m in list(sys.modules.items()) if name.startswith("nfkernels") and
             getattr(m, "conv_net", None) is real]  # fmt: skip
    for home in homes:
        home.conv_net = given
    try:
        yield
    finally:
        for home in homes:
            home.conv_net = real
    if not stand_in.calls:
        raise RuntimeError("conv_net was never called: the couplings' networks run somewhere else")
