"""Two processes train one flow, and end with what one process would have got.

    torchrun --standalone --nproc-per-node 2 examples/two_processes.py

``fit`` sees what torchrun says: every process goes through its share of each batch, gradients are averaged, and the
first one alone prints and writes. Prints whether both processes hold the same weights, and the losses beside those of a
single process with the same whole batches. Writes ``training.png``. On a machine with several GPUs say
``device="cuda"`` to ``fit`` and each process takes one. ``python examples/two_processes.py`` is one process.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from nfkernels import plot
from nfkernels.models import RealNVP
from nfkernels.training import FitResult, fit
from nfkernels.training.data.toy import TOYS


def train(seed: int, steps: int) -> tuple[RealNVP, FitResult]:
    """Nothing in here knows how many processes there are. All build the same flow and see the same data."""
    torch.manual_seed(seed)
    moons, flow = TOYS["moons"], RealNVP(2, layers=6, hidden=32, activation="silu")
    x, held_out = moons.sample(10_000, seed=seed), moons.sample(2_000, seed=seed + 1)
    # The batch is that of all processes together.
    result = fit(
        flow, x, validation=held_out, steps=steps, batch_size=512, lr=3e-3, weight_decay=0.0, seed=seed, log_every=10
    )
    return flow, result


def fingerprint(flow: RealNVP) -> str:
    """Equal for equal weights, bit for bit."""
    found = hashlib.sha256()
    for tensor in flow.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def alone(seed: int, steps: int) -> FitResult:
    """The same training by this process only: without torchrun's variables ``fit`` knows of no other."""
    said = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    _, result = train(seed, steps)
    os.environ.update(said)
    return result


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("two_processes"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")

    options.out.mkdir(parents=True, exist_ok=True)
    # fit() would bring the processes together by itself; here they also compare their weights afterwards.
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")
    world, rank = (dist.get_world_size(), dist.get_rank()) if launched else (1, 0)
    flow, result = train(options.seed, options.steps)
    weights = [fingerprint(flow)]
    if launched:
        weights = [""] * world
        dist.all_gather_object(weights, fingerprint(flow))
        dist.destroy_process_group()
    numbers = {"processes": world, "same_weights": float(len(set(weights)) == 1)}
    if rank != 0:  # one voice
        return numbers

    print(f"{world} process{'es' * (world > 1)}, weights after {result.step} steps: {', '.join(weights)}")
    single = alone(options.seed, options.steps)
    assert result.best is not None  # there was validation data
    assert single.best is not None
    pairs = list(zip(result.history, single.history, strict=True))
    numbers["loss"], numbers["loss_alone"] = result.best, single.best
    numbers["difference"] = max(abs(a[key] - b[key]) for a, b in pairs for key in a if key in ("nll", "validation_nll"))
    print(f"validation, nats: {result.best:.4f}; a single process with the same batches: {single.best:.4f}")
    print(f"largest difference of a loss in {len(pairs)} lines of the log: {numbers['difference']:.1e}")
    plot.save(plot.training_curve(result.history, unit="nats"), options.out / "training.png")
    print(f"wrote {options.out / 'training.png'}")
    return numbers


if __name__ == "__main__":
    main()
