"""The models: each library's own classes, put together as its documentation or its best-known users put them together,
and trained as they train them."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple  # of one batch: the data first, then the context


@dataclass(frozen=True)
class Case:
    """A model as its users have it.

    ``build(quick)`` makes it in float32 (the caller seeds), smaller where ``quick``; ``data(rows, generator)`` draws
    rows; ``loss(model, *batch)`` is what is trained, ``log_prob(model, *batch)`` and ``sample(model, n, *batch)`` what
    it is trained for. ``networks(model)``: where its conditioners are, ``(module, attribute)``. ``asked``: the factors
    that were set as goals. ``curve_rows``: the batch of the loss curves, where a whole one takes too long.
    """

    id: str
    text: str
    library: str
    build: Callable[[bool], nn.Module]
    data: Callable[[int, torch.Generator, bool], Inputs]
    loss: Callable[..., Tensor]
    batch: int
    log_prob: Callable[..., Tensor] | None = None
    sample: Callable[..., Any] | None = None
    networks: Callable[[nn.Module], list[tuple[nn.Module, str]]] | None = None
    example: Callable[[Inputs], Inputs] = lambda batch: batch
    call: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of accelerate
    asked: dict[str, float] = field(default_factory=dict)
    lr: float = 1e-3
    clip: float | None = None
    overwritten: bool = False  # whether the layer writes into what its network returned
    curve_rows: int | None = None
    whole: Callable[[bool, bool], None] | None = None  # (accelerated, quick): a training from end to end


def named(*names: str) -> Callable[[nn.Module], list[tuple[nn.Module, str]]]:
    def networks(model: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(m, n) for m in model.modules() for n in names if isinstance(m._modules.get(n), nn.Module)]

    return networks


def table(features: int, context: int = 0) -> Callable[[int, torch.Generator, bool], Inputs]:
    """Rows on a bent sheet with noise; the context is what a simulator would have made of them."""

    def draw(rows: int, generator: torch.Generator, quick: bool) -> Inputs:
        u = torch.randn(rows, features, generator=generator)
        x = u + 0.5 * torch.sin(2 * u.roll(1, 1)) + 0.3 * u.roll(2, 1).square()
        if not context:
            return (x,)
        mix = torch.randn(features, context, generator=torch.Generator().manual_seed(7))
        return x, torch.tanh(x @ mix) + 0.1 * torch.randn(rows, context, generator=generator)

    return draw


def mean_nll(model: nn.Module, *batch: Tensor) -> Tensor:
    return -model.log_prob(*batch).mean()


def _log_prob(model: nn.Module, *batch: Tensor) -> Tensor:
    return model.log_prob(*batch)


# --- nflows, and sbi which builds on it -------------------------------------------------------------------------------


def _nflows(transforms: list[nn.Module], features: int) -> nn.Module:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    return Flow(CompositeTransform(transforms), StandardNormal([features]))


def _nflows_splines(features: int, layers: int, hidden: int, bins: int, context: int | None = None) -> list[nn.Module]:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import LULinear, PiecewiseRationalQuadraticCouplingTransform
    from nflows.utils.torchutils import create_alternating_binary_mask

    def network(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=hidden, context_features=context, num_blocks=2)

    transforms: list[nn.Module] = []
    for i in range(layers):
        mask = create_alternating_binary_mask(features, even=i % 2 == 0)
        transforms += [
            PiecewiseRationalQuadraticCouplingTransform(mask, network, num_bins=bins, tails="linear", tail_bound=3.0),
            LULinear(features, identity_init=True),
        ]
    return transforms


def nflows_nsf(quick: bool) -> nn.Module:
    return _nflows(_nflows_splines(10, 2 if quick else 5, 8 if quick else 64, 8), 10)


def nflows_maf(quick: bool) -> nn.Module:
    from nflows.transforms import MaskedAffineAutoregressiveTransform, ReversePermutation

    transforms: list[nn.Module] = []
    for _ in range(2 if quick else 5):
        transforms += [
            ReversePermutation(10),
            MaskedAffineAutoregressiveTransform(10, 16 if quick else 64, num_blocks=2),
        ]
    return _nflows(transforms, 10)


def nflows_sample(model: nn.Module, rows: int, *batch: Tensor) -> Tensor:
    return model.sample(rows)


THETA, OBSERVED = 5, 10  # parameters, and what is observed of each simulation
DRAW = table(THETA, OBSERVED)


def _sbi(kind: str) -> Callable[[bool], nn.Module]:
    def build(quick: bool) -> nn.Module:
        from sbi.neural_nets import posterior_nn

        sizes = {"hidden_features": 8, "num_transforms": 2} if quick else {}
        return posterior_nn(kind, **sizes)(*DRAW(2000, torch.Generator().manual_seed(1), quick))

    return build


def sbi_nsf_from_nflows(quick: bool) -> nn.Module:
    """sbi's default NSF without sbi: its sizes, and its standardisation as the first layer and as the embedding."""
    from nflows.transforms import PointwiseAffineTransform

    theta, x = DRAW(2000, torch.Generator().manual_seed(1), quick)
    first = PointwiseAffineTransform(-theta.mean(0) / theta.std(0), 1 / theta.std(0))
    flow = _nflows([first, *_nflows_splines(THETA, 2 if quick else 5, 8 if quick else 50, 10, OBSERVED)], THETA)
    flow._embedding_net = Standardize(x.mean(0), x.std(0))
    return flow


class Standardize(nn.Module):
    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def sbi_training(kind: str) -> Callable[[bool, bool], None]:
    """What a user of sbi runs: ``NPE(...).append_simulations(theta, x).train()``, with one line more."""

    def run(accelerated: bool, quick: bool) -> None:
        from sbi.inference import NPE
        from sbi.neural_nets import posterior_nn

        import nfkernels

        logging.getLogger("sbi").setLevel(logging.ERROR)
        make = posterior_nn(kind)

        def estimator(theta: Tensor, x: Tensor) -> nn.Module:
            made = make(theta, x)
            if accelerated:
                nfkernels.accelerate(made, (theta[:64], x[:64]), call="loss")
            return made

        torch.manual_seed(0)
        theta, x = DRAW(400 if quick else 4000, torch.Generator().manual_seed(1), quick)
        home = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:  # it writes its logs where it is
            os.chdir(folder)
            try:
                inference = NPE(density_estimator=estimator, show_progress_bars=False)
                inference.append_simulations(theta, x).train(max_num_epochs=1 if quick else 40)
            finally:
                os.chdir(home)

    return run


# --- normflows --------------------------------------------------------------------------------------------------------


def normflows_nsf(quick: bool) -> nn.Module:
    import normflows as nf

    flows: list[nn.Module] = []
    for i in range(2 if quick else 5):
        flows += [
            nf.flows.CoupledRationalQuadraticSpline(10, 2, 8 if quick else 64, reverse_mask=i % 2 == 1),
            nf.flows.LULinearPermute(10),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(10, trainable=False), flows)


def normflows_glow(quick: bool) -> nn.Module:
    """As its own example builds Glow, without classes."""
    import normflows as nf

    levels, steps, hidden, side = (2, 1, 8, 8) if quick else (3, 8, 128, 32)
    bases, flows, merges = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(channels, hidden, split_mode="channel", scale=True) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        last = side // 2 ** (levels - i)
        if i:
            merges.append(nf.flows.Merge())
        bases.append(nf.distributions.DiagGaussian((channels // 2 if i else channels, last, last)))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def normflows_sample(model: nn.Module, rows: int, *batch: Tensor) -> Tensor:
    return model.sample(rows)[0]


def pictures(side: int, channels: int = 3) -> Callable[[int, torch.Generator, bool], Inputs]:
    """Smooth random pictures in [-0.5, 0.5], with the noise of dequantisation."""

    def draw(rows: int, generator: torch.Generator, quick: bool) -> Inputs:
        size = 8 if quick else side
        coarse = torch.rand(rows, channels, 4, 4, generator=generator)
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
        return (smooth + torch.rand(rows, channels, size, size, generator=generator) / 32 - 0.5,)

    return draw


# --- FrEIA ------------------------------------------------------------------------------------------------------------


def fastflow(channels: int, side: int) -> Callable[[bool], nn.Module]:
    """anomalib's FastFlow over one feature map: eight blocks with convolutions of 3 x 3 and 1 x 1 in turns."""

    def build(quick: bool) -> nn.Module:
        import FrEIA.framework as framework
        import FrEIA.modules as modules
        import numpy

        numpy.random.seed(torch.randint(2**31, ()).item())  # its permutations are numpy's
        width, size = (8, 4) if quick else (channels, side)
        inn = framework.SequenceINN(width, size, size)
        for i in range(2 if quick else 8):
            kernel = 3 if i % 2 == 0 else 1

            def network(inputs: int, outputs: int, kernel: int = kernel) -> nn.Module:
                return nn.Sequential(
                    nn.Conv2d(inputs, inputs, kernel, padding="same"),
                    nn.ReLU(),
                    nn.Conv2d(inputs, outputs, kernel, padding="same"),
                )

            inn.append(modules.AllInOneBlock, subnet_constructor=network, affine_clamping=2.0, permute_soft=False)
        return inn

    return build


def features(channels: int, side: int) -> Callable[[int, torch.Generator, bool], Inputs]:
    """Feature maps, normalised over each map as FastFlow's are."""

    def draw(rows: int, generator: torch.Generator, quick: bool) -> Inputs:
        width, size = (8, 4) if quick else (channels, side)
        return (torch.randn(rows, width, size, size, generator=generator).relu() - 0.4,)

    return draw


def freia_log_prob(model: nn.Module, x: Tensor) -> Tensor:
    z, logdet = model(x)
    return logdet - 0.5 * z.square().flatten(1).sum(1)


def freia_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -freia_log_prob(model, x).mean() / x[0].numel()


def freia_sample(model: nn.Module, rows: int, x: Tensor) -> Tensor:
    return model(torch.randn_like(x[:1]).expand(rows, *x.shape[1:]) + torch.randn_like(x[:rows]), rev=True)[0]


# --- zuko -------------------------------------------------------------------------------------------------------------


def zuko_nsf(quick: bool) -> nn.Module:
    import zuko

    hidden = (8,) if quick else (64, 64)
    return zuko.flows.NSF(10, transforms=2 if quick else 5, bins=8, hidden_features=hidden)


def zuko_log_prob(model: nn.Module, *batch: Tensor) -> Tensor:
    return model(*batch[1:]).log_prob(batch[0])


def zuko_loss(model: nn.Module, *batch: Tensor) -> Tensor:
    return -zuko_log_prob(model, *batch).mean()


def zuko_sample(model: nn.Module, rows: int, *batch: Tensor) -> Tensor:
    return model().sample((rows,))


# --- a port of Glow ---------------------------------------------------------------------------------------------------


def port(quick: bool) -> nn.Module:
    from ..models.ported_glow import PortedGlow

    levels, steps, hidden = (2, 1, 8) if quick else (3, 8, 128)
    return PortedGlow(3, steps, levels, hidden)


def port_log_prob(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0]


def port_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -model(x)[0].mean() / (x[0].numel() * math.log(2))


def port_sample(model: nn.Module, rows: int, x: Tensor) -> Tensor:
    return model.reverse([0.7 * torch.randn_like(z)[:rows] for z in model(x)[1]])


def glow_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_kld(x) / (x[0].numel() * math.log(2))


def sbi_loss(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    return model.loss(theta, x).mean()


def sbi_log_prob(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    return model.log_prob(theta[None], x)


def sbi_sample(model: nn.Module, rows: int, theta: Tensor, x: Tensor) -> Tensor:
    return model.sample((rows,), x[:1])


def _normflows_glow(id: str, text: str, asked: dict[str, float], **options: Any) -> Case:
    return Case(
        id, f"normflows, Glow: 32 x 32 x 3, K = 8, L = 3, width 128{text}", "normflows", normflows_glow, pictures(32),
        glow_loss, 16, lambda m, x: m.log_prob(x, None), normflows_sample, named("param_map"),
        example=lambda batch: (batch[0], None), options=options, asked=asked, curve_rows=4,
    )  # fmt: skip


CASES = (
    Case(
        "nflows-nsf", "nflows, NSF: 10 features, 5 x (spline coupling, K = 8, LULinear), ResidualNet 64 x 2", "nflows",
        nflows_nsf, table(10), mean_nll, 512, _log_prob, nflows_sample, named("transform_net"),
        asked={"step": 2.3, "outside": 8.0, "log_prob": 5.0},
    ),
    Case(
        "nflows-maf", "nflows, MAF: 10 features, 5 x (reversal, affine autoregressive), MADE 64 x 2", "nflows",
        nflows_maf, table(10), mean_nll, 512, _log_prob, nflows_sample, named("autoregressive_net"),
    ),
    Case(
        "sbi-nsf", "sbi's default NSF posterior: 5 parameters given 10 numbers, 5 x (spline, K = 10, LULinear)", "sbi",
        _sbi("nsf"), DRAW, sbi_loss, 200, sbi_log_prob, sbi_sample, named("transform_net"), call="loss",
        lr=5e-4, clip=5.0, whole=sbi_training("nsf"), asked={"whole": 2.0},
    ),
    Case(
        "sbi-maf", "sbi's default MAF posterior: 5 parameters given 10 numbers, 5 x affine autoregressive", "sbi",
        _sbi("maf"), DRAW, sbi_loss, 200, sbi_log_prob, sbi_sample, named("autoregressive_net"), call="loss",
        lr=5e-4, clip=5.0, whole=sbi_training("maf"),
    ),
    Case(
        "sbi-nsf-from-nflows", "sbi's default NSF, built from nflows", "nflows",
        sbi_nsf_from_nflows, DRAW, mean_nll, 200, _log_prob, None, named("transform_net"), lr=5e-4, clip=5.0,
        asked={"step": 2.0},
    ),
    Case(
        "normflows-nsf", "normflows, NSF: 10 features, 5 x (spline coupling, K = 8, LULinearPermute), 64 x 2",
        "normflows", normflows_nsf, table(10), mean_nll, 512, _log_prob, normflows_sample, named("transform_net"),
    ),
    _normflows_glow("normflows-glow", "", {"step": 1.12, "sample": 2.0}),
    _normflows_glow("normflows-glow-channels-last", ", channels_last=True", {"step": 1.3}, channels_last=True),
    _normflows_glow(
        "normflows-glow-steps", ', fuse="steps", channels_last=True', {}, fuse="steps", channels_last=True
    ),
    # Every network runs once more: time for memory.
    _normflows_glow("normflows-glow-reversible", ', memory="reversible"', {"step": 0.75}, memory="reversible"),
    Case(
        "freia-fastflow-64", "FrEIA, FastFlow: 8 x AllInOneBlock, 64 channels of 32 x 32", "FrEIA",
        fastflow(64, 32), features(64, 32), freia_loss, 8, freia_log_prob, freia_sample, named("subnet"),
        asked={"step": 1.5}, overwritten=True, curve_rows=2,
    ),
    Case(
        "freia-fastflow-256", "FrEIA, FastFlow: 8 x AllInOneBlock, 256 channels of 16 x 16", "FrEIA",
        fastflow(256, 16), features(256, 16), freia_loss, 4, freia_log_prob, freia_sample, named("subnet"),
        asked={"step": 1.5}, overwritten=True, curve_rows=1,
    ),
    Case(
        "zuko-nsf", "zuko, NSF: 10 features, 5 x autoregressive spline, K = 8, MLP 64 x 2", "zuko",
        zuko_nsf, table(10), zuko_loss, 512, zuko_log_prob, zuko_sample, named("hyper"), asked={"step": 3.0},
    ),
    Case(
        "glow-port", "a port of Glow, known by its structure alone: 32 x 32 x 3, K = 8, L = 3, width 128", "torch",
        port, pictures(32), port_loss, 16, port_log_prob, port_sample, named("net"), curve_rows=4,
    ),
)  # fmt: skip


def batches(case: Case, rows: int, seed: int, quick: bool, device: torch.device) -> Iterator[Inputs]:
    """Batches without end, the same for everybody who asks with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield tuple(t.to(device) for t in case.data(rows, generator, quick))
