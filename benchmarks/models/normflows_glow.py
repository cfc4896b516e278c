"""The same Glow in ``normflows`` (https://github.com/VincentStimper/normalizing-flows), from its own classes, with our
weights.

Two differences, both to its advantage: it has no learned split priors (a level's latents have one mean and scale per
channel; ``copy_weights`` takes models whose split priors do not look at their input), and no log-scale on a network's
last convolution, which is folded into its weight here. It has no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .plain_glow import Pair, like, permutation_matrix


class NormflowsGlow(nn.Module):
    def __init__(self, shape, *, levels: int, steps: int, hidden: int, grey_levels: int, dropout: float = 0.0) -> None:
        import normflows as nf

        if dropout:
            raise ValueError("normflows' coupling networks have no dropout")
        super().__init__()
        channels, height, width = shape
        self.dims, self.grey_levels = math.prod(shape), grey_levels
        flows, bases = [], []
        for level in range(levels):
            channels, height, width = channels * 4, height // 2, width // 2
            blocks = [nf.flows.GlowBlock(channels, hidden) for _ in range(steps)]
            flows.append([*blocks, nf.flows.Squeeze()])
            channels -= channels // 2 if level < levels - 1 else 0
            bases.append(nf.distributions.GlowBase((channels, height, width)))
        merges = [nf.flows.Merge() for _ in range(levels - 1)]
        # Its levels begin with the coarsest, and its blocks with the one that the data meets last.
        self.model = nf.MultiscaleFlow(bases[::-1], flows[::-1], merges, class_cond=False)

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """``[B]`` for dequantised ``x`` in [0, 1)."""
        return self.model(x - 0.5) / (self.dims * math.log(2)) + math.log2(self.grey_levels)

    def latents(self, x: Tensor) -> list[Tensor]:
        return self.model.inverse_and_log_det(x - 0.5)[0]

    def rebuild(self, latents: list[Tensor]) -> Tensor:
        return self.model.forward_and_log_det(latents)[0] + 0.5

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Images, uint8."""
        x = self.model.sample(count)[0] + 0.5
        return (x * self.grey_levels).floor().clamp(0, self.grey_levels - 1).to(torch.uint8)

    def blocks(self, level: int) -> list:
        """A level's steps (finest level first) in the order of the data, as their coupling, mix and ActNorm."""
        of_level = self.model.flows[len(self.model.flows) - 1 - level]
        return [block.flows for block in list(of_level)[-2::-1]]

    def base(self, level: int):
        return self.model.q0[len(self.model.q0) - 1 - level]


def network(coupling) -> nn.Sequential:
    return coupling.flows[1].param_map.net


def pairs(theirs: NormflowsGlow, glow) -> Iterator[Pair]:
    """Of the parameters that mean the same in both; see ``plain_glow.pairs``."""
    for level, part in enumerate(glow.bijection[1].levels):
        flow, blocks = part[1], theirs.blocks(level)
        for k, (coupling, mix, _) in enumerate(blocks):
            for name, mine in (("lower", mix.L), ("upper", mix.U), ("log_s", mix.log_S)):
                yield f"{level}.{k}.{name}", mine, getattr(flow, name), like(mine, k)
            net = network(coupling)
            for name, mine in (
                ("weight1", net[0].weight), ("bias1", net[0].bias), ("weight2", net[2].weight), ("bias2", net[2].bias),
            ):  # fmt: skip
                yield f"{level}.{k}.{name}", mine, getattr(flow, name), like(mine, k, len(blocks))
    base, prior = theirs.base(level), part[2]
    for name in ("loc", "log_scale"):
        mine = getattr(base, name)
        yield f"{level}.prior.{name}", mine, getattr(prior, name), like(mine)


@torch.no_grad()
def copy_weights(theirs: NormflowsGlow, glow) -> None:
    """The parameters of an ``nfkernels.models.Glow`` of the same architecture, in normflows' coordinates."""
    for _, mine, ours, view in pairs(theirs, glow):
        mine.copy_(view(ours))
    for level, part in enumerate(glow.bijection[1].levels):
        flow, blocks = part[1], theirs.blocks(level)
        for k, (coupling, mix, actnorm) in enumerate(blocks):
            mix.sign_S.copy_(flow.sign_s[k])
            mix.P.copy_(permutation_matrix(flow.permutation[k]))
            # (x - t) e^-s is e^ls x + b
            scale, bias = flow.log_scale[k].view_as(actnorm.s), flow.bias[k].view_as(actnorm.t)
            actnorm.s.copy_(-scale)
            actnorm.t.copy_(-bias * torch.exp(-scale))
            actnorm.data_dep_init_done.fill_(1.0)
            factor = torch.exp(3 * flow.log_scale3.chunk(len(blocks))[k])
            weight = flow.weight3.chunk(len(blocks))[k] * factor[:, None, None, None]
            bias = flow.bias3.chunk(len(blocks))[k] * factor
            last = network(coupling)[-1]
            for mine, own in ((last.weight, weight), (last.bias, bias)):
                shift, scale = own.chunk(2)
                mine[0::2].copy_(-shift)  # it subtracts what we add
                mine[1::2].copy_(scale)
        if level < len(glow.bijection[1].levels) - 1:
            conditioner, base = part[2].conditioner, theirs.base(level)
            if conditioner.weight.any():
                raise ValueError("normflows has no split priors: give a model whose prior weights are zero")
            loc, log_scale = (conditioner.bias * torch.exp(3 * conditioner.log_scale)).chunk(2)
            base.loc.copy_(loc.view_as(base.loc))
            base.log_scale.copy_(log_scale.view_as(base.log_scale))
