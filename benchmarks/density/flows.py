"""Small flows over tables beside other libraries': training step, the part outside networks, log_prob, sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..bars import OURS, Bar, Contender, over
from ..complexity.measure import close
from . import makers
from .makers import Model, Size

NSF = {
    OURS: makers.our_nsf,
    "nflows": makers.nflows_nsf,
    "normflows": makers.normflows_nsf,
    "zuko": makers.zuko_nsf,
}
MAF = {OURS: makers.our_maf, "nflows": makers.nflows_maf, "zuko": makers.zuko_maf}
REALNVP = {
    OURS: makers.our_realnvp,
    "nflows": makers.nflows_realnvp,
    "normflows": makers.normflows_realnvp,
    "zuko": makers.zuko_realnvp,
    "FrEIA": makers.freia_realnvp,
}
Makers = dict[str, Callable[[Size], Model]]


def _exact(model: Model) -> Model:
    return model.with_module(copy.deepcopy(model.module).double())


def _step(model: Model, x: Tensor) -> Contender:
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-6)

    def call() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            (-model.log_prob(x).mean()).backward()
            optimizer.step()

    def gradients(of: Model, data: Tensor) -> Tensor:
        with torch.enable_grad():
            of.module.zero_grad()
            (-of.log_prob(data).mean()).backward()
        found = [p.grad.flatten() for p in of.module.parameters() if p.grad is not None]
        return torch.cat(found).double()

    return Contender(call, lambda: close(gradients(model, x), gradients(_exact(model), x.double()), 1e-3))


def _log_prob(model: Model, x: Tensor) -> Contender:
    model.module.eval()
    return Contender(
        lambda: model.log_prob(x), lambda: close(model.log_prob(x).double(), _exact(model).log_prob(x.double()), 1e-3)
    )


def _sample(model: Model, x: Tensor) -> Contender:
    """Right where the density of samples is what it is in float64, and their spread that of samples there."""
    model.module.eval()
    count = len(x)

    def check() -> bool:
        torch.manual_seed(1)
        drawn = model.sample(count)
        density, exact = model.log_prob(drawn).double(), _exact(model).log_prob(drawn.double())
        return drawn.shape == x.shape and close(density, exact, 1e-3)

    return Contender(lambda: model.sample(count), check)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params):
        ctx.channels = x.shape[1]
        return params.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, : ctx.channels], None


class _StandIn(nn.Module):
    """In a network's place: the same params every time, and a gradient for its input, without work."""

    def __init__(self, params: Tensor, hidden: int) -> None:
        super().__init__()
        self.params, self.hidden_features, self.context_channels = params, hidden, 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return _Given.apply(x, self.params)


def _outside(model: Model, x: Tensor) -> Contender:
    networks = model.networks()
    if networks is None:
        raise NotImplementedError("its networks are not in one place")
    whole = _log_prob(model, x)
    right = whole.check()
    for owner, name in networks:
        net = getattr(owner, name)
        last = net.last if hasattr(net, "last") else net.final_layer
        hidden = last.in_features
        setattr(owner, name, _StandIn(0.3 * torch.randn(len(x), last.out_features), hidden))
    given = x.clone().requires_grad_()

    def call() -> None:
        with torch.enable_grad():
            model.module.zero_grad()
            (-model.log_prob(given).mean()).backward()

    return Contender(call, lambda: right)


def _layer(model: Model, x: Tensor) -> Contender:
    """The one coupling of a flow of one layer, forward and backward."""
    kinds = ("SplineCoupling", "PiecewiseRationalQuadraticCouplingTransform", "CoupledRationalQuadraticSpline")
    layer = next(m for m in model.module.modules() if type(m).__name__ in kinds)
    exact, wide = copy.deepcopy(layer).double(), x.double()
    # normflows' layers go from the latent to data: what others call forward is their inverse.
    run = "inverse" if type(layer).__module__.startswith("normflows") else "forward"

    def call(of: nn.Module = layer, data: Tensor = x) -> list[Tensor]:
        with torch.enable_grad():
            given = data.detach().requires_grad_()
            y, logdet = getattr(of, run)(given)
            seeds = (torch.ones_like(y), torch.ones_like(logdet))
            found = torch.autograd.grad((y, logdet), (given, *of.parameters()), seeds, allow_unused=True)
        return [y.detach(), logdet.detach(), *(g for g in found if g is not None)]

    return Contender(call, lambda: all(close(a.double(), b, 1e-3) for a, b in zip(call(), call(exact, wide))))


def _bar(
    contenders: Makers, size: Size, batch: int, what: Callable[[Model, Tensor], Contender]
) -> Callable[[bool], dict[str, Callable[[], Contender]]]:
    def build(quick: bool) -> dict[str, Callable[[], Contender]]:
        chosen = replace(size, layers=min(size.layers, 2), hidden=8, bins=4) if quick else size
        x = torch.randn(16 if quick else batch, size.features)

        def made(make: Callable[[Size], Model]) -> Contender:
            return what(make(chosen), x)

        return {name: (lambda m=make: made(m)) for name, make in contenders.items()}

    return build


def _alike(contenders: Makers) -> dict[str, Callable[[Size], Model]]:
    """Those whose networks can be replaced."""
    return {name: make for name, make in contenders.items() if name in (OURS, "nflows")}


def _one_spline(contenders: Makers) -> Makers:
    """Those whose spline coupling is one module."""
    return {name: make for name, make in contenders.items() if name in (OURS, "nflows", "normflows")}


TEN, TWENTY = Size(10), Size(20)
_OF_NSF, _OF_MAF, _OF_REALNVP = (over(*list(names)[1:]) for names in (NSF, MAF, REALNVP))
BARS = (
    Bar(
        "one spline coupling, 10 features, batch 4096, forward + backward",
        "none",
        _bar(_one_spline(NSF), replace(TEN, layers=1), 4096, _layer),
        over("nflows", "normflows"),
    ),
    Bar("NSF, 10 features, batch 512, training step", "2.5x nflows at least", _bar(NSF, TEN, 512, _step), _OF_NSF),
    Bar(
        "NSF, 10 features, batch 512, outside networks and optimiser",
        "8x nflows at least",
        _bar(_alike(NSF), TEN, 512, _outside),
        over("nflows"),
    ),
    Bar("NSF, 10 features, batch 512, log_prob", "5x nflows at least", _bar(NSF, TEN, 512, _log_prob), _OF_NSF),
    Bar("NSF, 10 features, 512 samples", "5x nflows at least", _bar(NSF, TEN, 512, _sample), _OF_NSF),
    Bar("MAF, 20 features, 512 samples", "5x nflows at least", _bar(MAF, TWENTY, 512, _sample), _OF_MAF),
    Bar("MAF, 20 features, batch 512, training step", "none", _bar(MAF, TWENTY, 512, _step), _OF_MAF),
    Bar("RealNVP, 10 features, batch 512, training step", "none", _bar(REALNVP, TEN, 512, _step), _OF_REALNVP),
    Bar("RealNVP, 10 features, 512 samples", "none", _bar(REALNVP, TEN, 512, _sample), _OF_REALNVP),
)
