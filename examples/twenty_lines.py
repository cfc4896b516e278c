"""A flow in twenty lines: learn the density of two moons, then ask for densities and draw samples.

    python examples/twenty_lines.py

Prints the mean log-likelihood of points that were not trained on, in nats, beside that of the true density (nothing can
be better) and that of one normal. Writes ``flow.safetensors`` and the pictures ``density.png`` (the learned density),
``warped_grid.png`` (the latent's straight grid as the flow bends it) and ``samples.png``.
"""

import argparse
from pathlib import Path

import torch

from nfkernels import plot
from nfkernels.models import NSF
from nfkernels.training.data.toy import TOYS


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("twenty_lines"), help="folder for what is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    moons = TOYS["moons"]  # points of the plane, whose exact density is known

    # --- the twenty lines ---
    x = moons.sample(20_000, seed=options.seed)  # any float tensor [N, D] will do
    held_out = moons.sample(5_000, seed=options.seed + 1)

    flow = NSF(2, layers=4, hidden=32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        batch = x[torch.randint(len(x), (512,))]
        loss = flow.nll(batch)  # the mean of -log p(x), in nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    flow.eval()

    z, logdet = flow(held_out)  # data -> latent, [5000, 2], and log|det J|, [5000]
    log_p = flow.base.log_prob(z) + logdet  # the change of variables; flow.log_prob(held_out) is the same
    samples = flow.sample(5_000)  # latent -> data, [5000, 2]
    flow.save(options.out / "flow.safetensors")  # Flow.load gives it back
    # --- that was it ---

    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    numbers = {
        "flow": log_p.mean().item(),
        "truth": moons.log_prob(held_out).mean().item(),
        "normal": normal.log_prob(held_out).mean().item(),
    }
    print("held-out log-likelihood, nats:", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    print(f"Kullback-Leibler divergence from the truth: {numbers['truth'] - numbers['flow']:.3f} nats")
    print(f"wrote {options.out / 'flow.safetensors'}")
    pictures = {
        "density": plot.density(flow, data=held_out[:1000]),
        "warped_grid": plot.warped_grid(flow),
        "samples": plot.samples(held_out, samples),
    }
    for name, figure in pictures.items():
        plot.save(figure, options.out / f"{name}.png")
        print(f"wrote {options.out / name}.png")
    return numbers


if __name__ == "__main__":
    main()
