"""``python -m benchmarks demo``: two moons by our NSF and by the same in nflows, at equal steps.

Both start from the same weights and see the same batches, and the loop around them is one: what differs is the layers.
"""

from __future__ import annotations

import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nfkernels.nn import Flow, SplineCoupling, Standardize
from nfkernels.plot.steps import flatten
from nfkernels.training.data.toy import TOYS, Toy
from nfkernels.training.demo.flow import build, estimate, recipe
from nfkernels.training.demo.options import DEMO

from . import machine
from .complexity.measure import keep_memory
from .complexity.run import Saved
from .peers.layers import installed
from .record import Budget

SEEDS = 5
STEPS, BATCH, LAYERS, WIDTH = (DEMO[name].default for name in ("steps", "batch_size", "layers", "width"))
HELD_OUT = 20_000
_GATE = 1e-4  # nats between the two models' log-densities in float64, where both have the same weights


class Conditioner(nn.Module):
    """Our coupling's network as nflows calls one, which divides widths and heights by the root of a width."""

    def __init__(self, network: nn.Module, prescale: float) -> None:
        super().__init__()
        self.network, self.hidden_features = copy.deepcopy(network), prescale**-2

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(inputs)


def in_nflows(flow: Flow) -> nn.Module:
    """An nflows flow of the same layers with the same weights. ``ValueError`` for a layer without a counterpart."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as Theirs
    from nflows.transforms import (
        CompositeTransform,
        PiecewiseRationalQuadraticCouplingTransform,
        PointwiseAffineTransform,
    )

    made = []
    for layer in flatten(flow.bijection):
        if isinstance(layer, Standardize):
            made.append(PointwiseAffineTransform(-layer.shift / layer.scale, 1 / layer.scale))
        elif isinstance(layer, SplineCoupling):
            spline, moved = layer.transform.spline, layer.channel_map >= 0
            made.append(
                PiecewiseRationalQuadraticCouplingTransform(
                    moved.int(),
                    lambda inputs, outputs, of=layer: Conditioner(of.conditioner, of.transform.spline.prescale),
                    num_bins=spline.bins,
                    tails="linear",
                    tail_bound=spline.high,
                )
            )
        else:
            raise ValueError(f"there is no {type(layer).__name__} in the nflows model")
    return Theirs(CompositeTransform(made), StandardNormal([2]))


def train(model: nn.Module, data: Tensor, seed: int, steps: int, batch: int) -> float:
    """Adam with the demo's learning rates, on batches that the seed alone decides; the seconds it took."""
    how = recipe(steps, batch, seed)
    adam = torch.optim.Adam(model.parameters(), lr=how.lr, betas=how.betas, fused=True)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        x = data[torch.randint(len(data), (batch,), generator=generator)]
        for group in adam.param_groups:
            group["lr"] = how.lr_at(step)
        adam.zero_grad()
        (-model.log_prob(x).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        adam.step()
    return time.perf_counter() - began


@torch.no_grad()
def held_out_nats(model: nn.Module, points: Tensor) -> tuple[float, float]:
    model.eval()
    return estimate(torch.cat([model.log_prob(part) for part in points.split(5000)]).double())


def one_seed(seed: int, toy: Toy, *, steps: int, batch: int, points: int) -> dict[str, Any]:
    """Both contenders from one start. Who goes first takes turns, as a machine is not always equally busy."""
    data, held_out = toy.sample(100_000, seed=2 * seed), toy.sample(points, seed=2 * seed + 1)
    torch.manual_seed(seed)
    ours = build("NSF", data, layers=LAYERS, width=WIDTH)
    models: dict[str, nn.Module] = {"nfkernels": ours}
    entry: dict[str, Any] = {"seed": seed, "truth": estimate(toy.log_prob(held_out)), "contenders": {}}
    if installed("nflows"):
        models["nflows"] = in_nflows(ours)
        entry["start"] = start_error(ours, models["nflows"], held_out[:500])
        if not entry["start"] < _GATE:
            raise ValueError(f"the two models differ by {entry['start']:.2g} nats before any training")
    for name in sorted(models, reverse=bool(seed % 2)):
        seconds = train(models[name], data, seed, steps, batch)
        mean, error = held_out_nats(models[name], held_out)
        entry["contenders"][name] = {"nats": mean, "standard_error": error, "seconds": seconds}
    return entry


def start_error(ours: nn.Module, theirs: nn.Module, points: Tensor) -> float:
    """The largest difference of the two log-densities in float64, with weights that are no longer the identity's."""
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine.add_(0.3 * torch.randn(mine.shape, generator=generator)))
        return (ours.log_prob(points.double()) - theirs.log_prob(points.double())).abs().max().item()


def summary(entries: list[dict[str, Any]]) -> list[str]:
    lines = [f"two moons, mean over {len(entries)} seeds of the held-out log-likelihood in nats:"]
    lines.append(f"  {'the density itself':<20}{statistics.fmean(e['truth'][0] for e in entries):8.4f}")
    for name in entries[0]["contenders"]:
        of = [entry["contenders"][name] for entry in entries]
        nats, seconds = [c["nats"] for c in of], [c["seconds"] for c in of]
        spread = statistics.stdev(nats) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
        lines.append(
            f"  {name:<20}{statistics.fmean(nats):8.4f} (between seeds +- {spread:.4f}), "
            f"training {statistics.median(seconds):6.1f} s (median)"
        )
    if all("nflows" in entry["contenders"] for entry in entries):
        gaps = [e["contenders"]["nfkernels"]["nats"] - e["contenders"]["nflows"]["nats"] for e in entries]
        ratio = statistics.median(
            e["contenders"]["nflows"]["seconds"] / e["contenders"]["nfkernels"]["seconds"] for e in entries
        )
        lines.append(f"  ours is better by {statistics.fmean(gaps):+.4f} nats, and {ratio:.1f} times as fast")
    return lines


def run(
    out: Path,
    *,
    quick: bool,
    commit: str | None,
    seeds: int = SEEDS,
    steps: int = STEPS,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Writes ``out/<device>/demo-<date>-<commit>.json``; the exit status is 1 if ours is worse by 0.02 nats."""
    found = machine.facts("cpu", torch.device("cpu"), commit)
    found["memory_kept"] = keep_memory()
    say(machine.sentence(found))
    if quick:
        seeds, steps = 1, 5
    saved = Saved(out, "demo", "seeds", found, Budget(None), quick)
    saved.data["setup"] = {"density": "moons", "model": "NSF", "layers": LAYERS, "width": WIDTH, "batch": BATCH,
                           "steps": steps, "held_out": HELD_OUT}  # fmt: skip
    with saved.whole():
        for seed in range(seeds):
            entry = one_seed(seed, TOYS["moons"], steps=steps, batch=BATCH, points=1000 if quick else HELD_OUT)
            saved.add(entry)
            each = (f"{name} {c['nats']:.4f} in {c['seconds']:.1f} s" for name, c in entry["contenders"].items())
            say(f"seed {seed}: {', '.join(each)}")
        saved.data["command_seconds"] = None if quick else command_seconds()
    for line in [*summary(saved.data["seeds"]), *told(saved.data["command_seconds"]), str(saved.path)]:
        say(line)
    return int(worse(saved.data["seeds"]))


def command_seconds() -> float:
    """What a user waits for ``nfkernels demo moons``, from the prompt to the prompt."""
    threads = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", folder, "--progress", "none", "--device", "cpu", "--threads", threads]
        began = time.perf_counter()
        command = [sys.executable, "-m", "nfkernels", "demo", "moons", *out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


def told(seconds: float | None) -> list[str]:
    return [] if seconds is None else [f"`nfkernels demo moons`, from prompt to prompt: {seconds:.1f} s"]


def worse(entries: list[dict[str, Any]]) -> bool:
    pairs = [e["contenders"] for e in entries if "nflows" in e["contenders"]]
    return bool(pairs) and statistics.fmean(c["nfkernels"]["nats"] - c["nflows"]["nats"] for c in pairs) < -0.02
