"""Posteriors from simulations, of a simulator whose posterior is known, so that every claim can be checked.

    python examples/simulation_based_inference.py

The simulator draws ten numbers from a normal whose mean mu and standard deviation sigma are to be found; prior:
sigma^2 inverse gamma, mu normal given sigma. A flow learns p(mu, log sigma | numbers) from simulations alone. Prints
the mean Kullback-Leibler divergence from the exact posterior and the empirical coverage of its highest-density regions:
a region of 80 % must hold the truth in 80 % of the cases. With seeds 0 to 4 the coverage was off by 2.0 % at most at
50 %, by 1.4 % at 80 % and by 1.1 % at 95 %, of which chance makes up to about 1.6, 1.3 and 0.7 %. Writes
``coverage.png``, ``calibration.png`` (ranks of the truth among samples: flat if all is well) and ``posterior.png`` (one
posterior, the flow's and the exact one).
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import InverseGamma, Normal

from nfkernels import diagnostics, plot
from nfkernels.models import MAF

NUMBERS = 10
SHAPE, RATE, COUNT = 5.0, 4.0, 1.0  # prior: sigma^2 ~ InverseGamma(SHAPE, RATE), mu ~ N(0, sigma^2 / COUNT)
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def simulate(n: int) -> tuple[Tensor, Tensor]:
    """Parameters ``[n, 2]`` (mu, log sigma) from the prior, and what would be observed, ``[n, NUMBERS]``."""
    sigma = InverseGamma(SHAPE, RATE).sample((n,)).sqrt()
    mu = Normal(0.0, sigma / math.sqrt(COUNT)).sample()
    observed = mu[:, None] + sigma[:, None] * torch.randn(n, NUMBERS)
    return torch.stack([mu, sigma.log()], 1), observed


def exact_posterior(observed: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The conjugate update: shape and rate of sigma^2's inverse gamma, mean of mu and its count."""
    mean, count = observed.mean(1), COUNT + NUMBERS
    squares = (observed - mean[:, None]).square().sum(1) + COUNT * NUMBERS * mean.square() / count
    return torch.full_like(mean, SHAPE + NUMBERS / 2), RATE + squares / 2, NUMBERS * mean / count, count


def exact_log_prob(theta: Tensor, observed: Tensor) -> Tensor:
    shape, rate, middle, count = exact_posterior(observed)
    mu, log_sigma = theta.unbind(1)
    sigma = log_sigma.exp()
    # d sigma^2 = 2 sigma^2 d log sigma: the change of variables from sigma^2 to log sigma.
    log_p = InverseGamma(shape, rate).log_prob(sigma**2) + math.log(2) + 2 * log_sigma
    return log_p + Normal(middle, sigma / math.sqrt(count)).log_prob(mu)


def exact_sample(n: int, observed: Tensor) -> Tensor:
    shape, rate, middle, count = exact_posterior(observed)
    sigma = InverseGamma(shape, rate).sample((n,)).sqrt()
    mu = Normal(middle, sigma / math.sqrt(count)).sample()
    return torch.stack([mu, sigma.log()], -1)


class Summary(nn.Module):
    """What the flow is told of an observation ``[B, NUMBERS]``: ``[B, width]``, whatever the order of the numbers.

    A network of every number, then the mean over them: the flow learns which features matter.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, width))
        self.all = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, width))

    def forward(self, observed: Tensor) -> Tensor:
        return self.all(self.each(observed[..., None]).mean(-2))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("simulation_based_inference"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    # p(theta | summary): autoregressive layers, whose shifts and scales the summary moves.
    flow = MAF(2, layers=3, hidden=32, context=8, embed=Summary(8), activation="silu")
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        loss = flow.nll(*simulate(256))  # -log p(theta | observed); new simulations at every step: nothing to overfit
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    flow.eval()

    # Checks on pairs that were not trained on. The first needs the exact posterior, the others never do.
    theta, observed = simulate(4000)
    difference = exact_log_prob(theta, observed) - flow.log_prob(theta, observed)
    numbers = {"divergence": difference.mean().item()}
    print(f"mean Kullback-Leibler divergence from the exact posterior: {numbers['divergence']:.3f} nats")
    found = diagnostics.coverage(flow, theta, observed, levels=LEVELS, draws=200)
    for level, share in zip(LEVELS, found.empirical, strict=True):
        numbers[f"coverage_{100 * level:.0f}"] = share
        if level in (0.5, 0.8, 0.95):
            print(f"{level:.0%} regions hold the truth in {share:.1%} of {found.count} cases")
    ranks = diagnostics.ranks(flow, theta, observed, draws=200)

    names = ["mu", "log sigma"]
    one = observed[:1]
    exact, learned = (sample(5000, one)[:, 0] for sample in (exact_sample, flow.sample))
    pictures = {
        "coverage": plot.coverage(LEVELS, found.empirical, count=found.count),
        "calibration": plot.calibration(ranks, 200, names=names),
        "posterior": plot.corner(exact, learned, names=names, truth=theta[0], labels=("exact", "flow")),
    }
    for name, figure in pictures.items():
        plot.save(figure, options.out / f"{name}.png")
        print(f"wrote {options.out / name}.png")
    return numbers


if __name__ == "__main__":
    main()
