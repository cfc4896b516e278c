"""Reversible training of a flow around a network of your own: memory that does not grow with the depth.

    python examples/reversible_training.py

A ``ReversibleSequential`` keeps its last output and rebuilds every layer's input from it on the way back; your network
needs no change, dropout included. Prints, for flows of growing depth, the bytes that autograd keeps for the backward in
a ``Chain`` and in a ``ReversibleSequential``; how far their gradients and the rebuilt inputs are apart (rounding); and
the loss before and after training, beside that of one normal. Writes ``memory.png`` and ``training.png``.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from nfkernels import ScaleMap, plot
from nfkernels.nn import AffineCoupling, Chain, Flow, LULinear, ReversibleSequential, StandardNormal, drift

WIDTH = 16  # columns of a row


class YourNetwork(nn.Module):
    """Anything: ``[B, WIDTH / 2]`` in, shift and scale for the other half, ``[B, WIDTH]``, out."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH // 2, hidden), nn.Linear(hidden, WIDTH)
        self.middle = nn.Sequential(
            nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.Dropout(0.05), nn.GELU()
        )
        nn.init.zeros_(self.last.weight)  # a coupling that starts as the identity trains well
        nn.init.zeros_(self.last.bias)

    def forward(self, kept: Tensor) -> Tensor:
        h = self.first(kept)
        return self.last(h + self.middle(h))


def build(couplings: int, container: type[Chain]) -> Flow:
    # The inverse divides by the scale: a bound on it, exp(-2) here, bounds what rounding can do.
    scale_map = ScaleMap("tanh", clamp=2.0)
    layers = []
    for _ in range(couplings):
        layers += [AffineCoupling(YourNetwork(), scale_map=scale_map), LULinear(WIDTH)]
    return Flow(container(layers), StandardNormal(WIDTH))


def bytes_kept(flow: Flow, x: Tensor) -> int:
    """What autograd keeps for the backward of the loss, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}  # a storage that several tensors share counts once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.nll(x)
    del loss  # alive until here, so that no storage was used twice
    return sum(kept.values())


def draw(count: int) -> Tensor:
    """Windows of a noisy wave, ``[count, WIDTH]``, of random phase and frequency."""
    phase, frequency = 2 * math.pi * torch.rand(count, 1), 0.3 + 0.5 * torch.rand(count, 1)
    return torch.sin(phase + frequency * torch.arange(WIDTH)) + 0.2 * torch.randn(count, WIDTH)


def gradient(flow: Flow, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # the same dropout for both
    return torch.cat([g.flatten() for g in torch.autograd.grad(flow.nll(x), list(flow.parameters()))])


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reversible_training"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    x, held_out = draw(20_000), draw(5_000)
    batch = x[:512]

    depths = (4, 8, 16, 32)
    kept: dict[str, list[float]] = {"stored": [], "reversible": []}
    for couplings in depths:
        for name, container in {"stored": Chain, "reversible": ReversibleSequential}.items():
            kept[name].append(bytes_kept(build(couplings, container), batch) / 2**20)
        print(f"{couplings:2} couplings: {kept['stored'][-1]:6.2f} MiB stored, {kept['reversible'][-1]:.2f} reversible")

    flow, stored = build(8, ReversibleSequential), build(8, Chain)
    before = flow.nll(held_out).item()
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    history = []
    for step in range(1, options.steps + 1):
        loss = flow.nll(x[torch.randint(len(x), (256,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            history.append({"step": step, "nll": loss.item()})

    # Of the trained flow, in training mode: the same dropout is drawn again in the backward.
    stored.load_state_dict(flow.state_dict())
    exact, rebuilt = gradient(stored, batch), gradient(flow, batch)
    flow.eval()
    normal = MultivariateNormal(x.mean(0), x.T.cov())
    numbers = {
        "growth": kept["reversible"][-1] / kept["reversible"][0],
        "saved": kept["stored"][-1] / kept["reversible"][-1],
        "gradient_error": ((rebuilt - exact).norm() / exact.norm()).item(),
        "drift": max(max(errors) for errors in drift(flow, batch).values()),
        "before": before,
        "flow": -flow.log_prob(held_out).mean().item(),
        "normal": -normal.log_prob(held_out).mean().item(),
    }
    print(f"gradients differ by {numbers['gradient_error']:.1e}, rebuilt inputs by {numbers['drift']:.1e} at most")
    print(f"loss, nats: {before:.2f} before training, {numbers['flow']:.2f} after; one normal {numbers['normal']:.2f}")

    memory = Figure(figsize=(5, 3.5), layout="constrained")
    axes = memory.subplots()
    axes.plot(depths, kept["stored"], "k-o", label="Chain")
    axes.plot(depths, kept["reversible"], "--s", color="0.5", label="ReversibleSequential")
    axes.set(xlabel="couplings", ylabel="kept for the backward, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    pictures = {
        "memory": memory,
        "training": plot.training_curve(history, unit="nats", baselines={"one normal": numbers["normal"]}),
    }
    for name, figure in pictures.items():
        plot.save(figure, options.out / f"{name}.png")
        print(f"wrote {options.out / name}.png")
    return numbers


if __name__ == "__main__":
    main()
