"""Somebody else's flows, faster: a normflows and an nflows model with this package's kernels, and nothing else changed.

    python examples/accelerate_models.py

Needs both libraries: pip install "nfkernels[peers]". Prints for each model what became of its layers, by how much the
log-densities moved (rounding), and the time of a training step before and after; then trains the fused nflows model on
two moons. Writes ``density.png``, what that one has learned. The times are those of your machine, and of these sizes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nfkernels
from nfkernels import plot
from nfkernels.training.data.toy import TOYS

try:
    import normflows
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform
except ImportError as missing:
    sys.exit(f'{missing.name} is missing: pip install "nfkernels[peers]" brings the libraries of this example')


def normflows_model() -> nn.Module:
    """The neural spline flow of normflows' examples; ``forward_kld`` is its training loss."""
    layers = []
    for _ in range(4):
        layers += [normflows.flows.CoupledRationalQuadraticSpline(2, 2, 32), normflows.flows.LULinearPermute(2)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), layers)


def nflows_model() -> nn.Module:
    """A neural spline flow, which is also what sbi builds."""
    layers = [
        PiecewiseRationalQuadraticCouplingTransform(
            mask,
            lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=32),
            tails="linear",
            tail_bound=3.0,
        )
        for mask in ([0, 1], [1, 0], [0, 1], [1, 0])
    ]
    return Flow(CompositeTransform(layers), StandardNormal([2]))


def seconds_per_step(loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The median of twenty, each the loss and its backward."""
    times = []
    for _ in range(25):
        began = time.perf_counter()
        loss(x).backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[5:])  # the first ones are slower


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accelerate_models"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    moons = TOYS["moons"]
    x, held_out = moons.sample(20_000, seed=options.seed), moons.sample(5_000, seed=options.seed + 1)
    batch = x[:512]
    numbers: dict[str, float] = {}

    models: dict[str, Any] = {"normflows": normflows_model(), "nflows": nflows_model()}
    losses = {"normflows": models["normflows"].forward_kld, "nflows": lambda x: -models["nflows"].log_prob(x).mean()}
    for name, model in models.items():
        slow = seconds_per_step(losses[name], batch)
        with torch.no_grad():
            before = model.log_prob(batch)
        # Changes the class of each layer that it knows, once both are proved to compute the same on this batch.
        report = nfkernels.accelerate(model, batch)
        with torch.no_grad():
            moved = (model.log_prob(batch) - before).abs().max().item()
        fast = seconds_per_step(losses[name], batch)
        numbers[f"{name}_fused"], numbers[f"{name}_moved"] = len(report.fused), moved
        numbers[f"{name}_ratio"] = slow / fast
        print(f"{name}: {len(report.fused)} layers fused, {len(report.kept)} kept; log-densities moved by {moved:.1e}")
        print(f"  a step of 512 rows: {1e3 * slow:.1f} ms before, {1e3 * fast:.1f} ms after: {slow / fast:.1f} times")
    print(f"the report of the last one:\n{report}")

    # The optimiser, the checkpoints, the code around: as they were.
    model = models["nflows"]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        loss = -model.log_prob(x[torch.randint(len(x), (512,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        numbers["flow"] = model.log_prob(held_out).mean().item()
    numbers["truth"] = moons.log_prob(held_out).mean().item()
    print(f"after training, held-out log-likelihood: {numbers['flow']:.3f} nats (true density {numbers['truth']:.3f})")
    plot.save(plot.density(model.log_prob, data=held_out[:1000], limits=moons.view), options.out / "density.png")
    print(f"wrote {options.out / 'density.png'}")
    numbers["restored"] = nfkernels.restore(model)  # the original classes again
    return numbers


if __name__ == "__main__":
    main()
