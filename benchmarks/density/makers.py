"""The same small flows from every maker: what is timed is each library's own code, built as its documentation does.

``NSF`` of ours and of nflows have one form and so one set of weights: ours are written into theirs. The others have
their own (zuko's slopes, normflows' masks, FrEIA's clamp), with as many layers and hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nfkernels import models
from nfkernels import nn as ours

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Size:
    features: int
    layers: int = 5
    hidden: int = 64
    blocks: int = 2
    bins: int = 8
    bound: float = 3.0


class Model:
    """A flow: its module, ``log_prob(x)``, ``sample(n)``, and ``networks``: places ``(module, name)`` of its
    conditioners."""

    def __init__(
        self,
        module: nn.Module,
        log_prob: Callable[[nn.Module, Tensor], Tensor],
        sample: Callable[[nn.Module, int], Tensor],
        networks: Callable[[nn.Module], list[tuple[nn.Module, str]]] | None = None,
    ) -> None:
        self.module, self._log_prob, self._sample, self._networks = module, log_prob, sample, networks

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob(self.module, x)

    def sample(self, n: int) -> Tensor:
        return self._sample(self.module, n)

    def networks(self) -> list[tuple[nn.Module, str]] | None:
        return None if self._networks is None else self._networks(self.module)

    def with_module(self, module: nn.Module) -> Model:
        return Model(module, self._log_prob, self._sample, self._networks)


def _spread(module: nn.Module, size: float = 0.1) -> nn.Module:
    """Weights off their starts, where all layers are the identity: alike for who has as many of the same shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight += size * torch.randn(weight.shape, generator=generator) / max(1, weight.shape[-1]) ** 0.5
    return module


# --- nfkernels --------------------------------------------------------------------------------------------------------


def _ours(flow: ours.Flow) -> Model:
    def networks(module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(m, "conditioner") for m in module.modules() if hasattr(m, "conditioner")]

    return Model(_spread(flow), lambda m, x: m.log_prob(x), lambda m, n: m.sample(n), networks)


def our_nsf(s: Size) -> Model:
    torch.manual_seed(0)
    return _ours(models.NSF(s.features, layers=s.layers, hidden=s.hidden, depth=s.blocks, bins=s.bins, bound=s.bound))


def our_maf(s: Size) -> Model:
    torch.manual_seed(0)
    return _ours(models.MAF(s.features, layers=s.layers, hidden=s.hidden, depth=s.blocks))


def our_realnvp(s: Size) -> Model:
    torch.manual_seed(0)
    return _ours(models.RealNVP(s.features, layers=s.layers, hidden=s.hidden, depth=s.blocks))


# --- nflows -----------------------------------------------------------------------------------------------------------


def _of_nflows(transforms: list[nn.Module], features: int) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    flow = Flow(CompositeTransform(transforms), StandardNormal([features]))

    def networks(module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(m, "transform_net") for m in module.modules() if hasattr(m, "transform_net")]

    return Model(flow, lambda m, x: m.log_prob(x), lambda m, n: m.sample(n), networks)


def nflows_nsf(s: Size) -> Model:
    """With our weights: the same function to the last digits."""
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
    from nflows.transforms.permutations import Permutation

    transforms: list[nn.Module] = []
    for layer in our_nsf(s).module.bijection:
        if isinstance(layer, ours.LULinear):
            theirs = LULinear(s.features)
            with torch.no_grad():
                rows, columns = theirs.lower_indices
                theirs.lower_entries.copy_(layer.lower[rows, columns])
                rows, columns = theirs.upper_indices
                theirs.upper_entries.copy_(layer.upper[rows, columns])
                theirs.unconstrained_upper_diag.copy_((layer.log_s.exp() - theirs.eps).expm1().log())
                order = torch.arange(s.features) if layer.permutation is None else layer.permutation
                theirs.bias.copy_(torch.empty_like(layer.bias).index_copy_(0, order, layer.bias))
            transforms += [theirs, Permutation(order)]
        else:
            net = layer.conditioner
            theirs = PiecewiseRationalQuadraticCouplingTransform(
                (layer.channel_map >= 0).float(),
                lambda i, o: ResidualNet(i, o, hidden_features=s.hidden, num_blocks=s.blocks),
                num_bins=s.bins,
                tails="linear",
                tail_bound=s.bound,
            )
            copy = theirs.transform_net
            pairs = [(copy.initial_layer, net.first), (copy.final_layer, net.last)]
            for block, inner, outer in zip(copy.blocks, net.inner, net.outer, strict=True):
                pairs += [(block.linear_layers[0], inner), (block.linear_layers[1], outer)]
            for a, b in pairs:
                a.load_state_dict(b.state_dict())
            transforms.append(theirs)
    return _of_nflows(transforms, s.features)


def nflows_maf(s: Size) -> Model:
    from nflows.transforms import MaskedAffineAutoregressiveTransform, ReversePermutation

    torch.manual_seed(0)
    transforms: list[nn.Module] = []
    for _ in range(s.layers):
        transforms += [
            ReversePermutation(s.features),
            MaskedAffineAutoregressiveTransform(
                s.features, s.hidden, num_blocks=s.blocks, use_residual_blocks=False
            ),
        ]  # fmt: skip
    return _of_nflows([_spread(t, 0.02) for t in transforms], s.features)


def nflows_realnvp(s: Size) -> Model:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform
    from nflows.utils.torchutils import create_alternating_binary_mask

    torch.manual_seed(0)
    transforms = [
        AffineCouplingTransform(
            create_alternating_binary_mask(s.features, even=i % 2 == 0),
            lambda i, o: ResidualNet(i, o, hidden_features=s.hidden, num_blocks=s.blocks),
        )
        for i in range(s.layers)
    ]
    return _of_nflows([_spread(t) for t in transforms], s.features)


# --- normflows --------------------------------------------------------------------------------------------------------


def _of_normflows(flows: list[nn.Module], features: int) -> Model:
    import normflows

    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features, trainable=False), flows)
    return Model(_spread(model), lambda m, x: m.log_prob(x), lambda m, n: m.sample(n)[0])


def normflows_nsf(s: Size) -> Model:
    from normflows.flows import CoupledRationalQuadraticSpline, LULinearPermute

    torch.manual_seed(0)
    flows: list[nn.Module] = []
    for i in range(s.layers):
        flows += [
            CoupledRationalQuadraticSpline(
                s.features, s.blocks, s.hidden, num_bins=s.bins, tail_bound=s.bound, reverse_mask=i % 2 == 1
            ),
            LULinearPermute(s.features),
        ]
    return _of_normflows(flows, s.features)


def normflows_realnvp(s: Size) -> Model:
    from normflows.flows import MaskedAffineFlow
    from normflows.nets import MLP

    torch.manual_seed(0)
    mask = torch.arange(s.features) % 2
    widths = [s.features, *[s.hidden] * (1 + s.blocks), s.features]
    flows = [
        MaskedAffineFlow((mask + i) % 2, MLP(widths, init_zeros=True), MLP(widths, init_zeros=True))
        for i in range(s.layers)
    ]
    return _of_normflows(flows, s.features)


# --- zuko, FrEIA ------------------------------------------------------------------------------------------------------


def _of_zuko(flow: nn.Module) -> Model:
    return Model(_spread(flow), lambda m, x: m().log_prob(x), lambda m, n: m().sample((n,)))


def zuko_nsf(s: Size) -> Model:
    import zuko

    torch.manual_seed(0)
    hidden = [s.hidden] * (1 + s.blocks)
    return _of_zuko(zuko.flows.NSF(s.features, transforms=s.layers, bins=s.bins, passes=2, hidden_features=hidden))


def zuko_maf(s: Size) -> Model:
    import zuko

    torch.manual_seed(0)
    return _of_zuko(zuko.flows.MAF(s.features, transforms=s.layers, hidden_features=[s.hidden] * s.blocks))


def zuko_realnvp(s: Size) -> Model:
    import zuko

    torch.manual_seed(0)
    hidden = [s.hidden] * (1 + s.blocks)
    return _of_zuko(zuko.flows.RealNVP(s.features, transforms=s.layers, hidden_features=hidden))


def freia_realnvp(s: Size) -> Model:
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    def network(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(inputs, s.hidden), nn.ReLU()]
        for _ in range(s.blocks):
            layers += [nn.Linear(s.hidden, s.hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(s.hidden, outputs))

    torch.manual_seed(0)
    inn = framework.SequenceINN(s.features)
    for _ in range(s.layers):
        inn.append(modules.AllInOneBlock, subnet_constructor=network)

    def log_prob(m: nn.Module, x: Tensor) -> Tensor:
        z, logdet = m(x)
        return logdet - 0.5 * z.square().sum(1) - HALF_LOG_2PI * s.features

    def sample(m: nn.Module, n: int) -> Tensor:
        return m(torch.randn(n, s.features), rev=True)[0]

    return Model(_spread(inn), log_prob, sample)
