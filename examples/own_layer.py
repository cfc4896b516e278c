"""A layer and a conditioner of your own: written, checked against their Jacobian, trained, saved and loaded.

    python examples/own_layer.py

The data have heavy tails and waves. The layer, Johnson's inverse hyperbolic sine of every column, brings the tails in;
the conditioner, a network of sines, follows the waves. Prints the table of ``flow.check``, what it says of a layer with
a wrong log-determinant, and the held-out loss with and without the new layer. Writes ``flow.safetensors`` and
``samples.png``.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from nfkernels import plot
from nfkernels.nn import AffineCoupling, Bijection, Chain, Flow, StandardNormal, register


@register  # a file names classes and their arguments: the program that loads must know the class, too
class JohnsonSU(Bijection):
    """``z = exp(log_scale) * asinh(exp(log_slope) * x + shift)`` for every column of ``x [B, D]`` (Johnson 1949)."""

    uses_context = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.log_slope = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x, context=None, *, lengths=None):
        inner = self.log_slope.exp() * x + self.shift
        return self.log_scale.exp() * inner.asinh(), self._log_derivative(inner).sum(1)

    def inverse(self, z, context=None, *, lengths=None):
        inner = ((-self.log_scale).exp() * z).sinh()
        x = (-self.log_slope).exp() * (inner - self.shift)
        return x, -self._log_derivative(inner).sum(1)  # that of the direction computed

    def _log_derivative(self, inner: Tensor) -> Tensor:
        """``log dz/dx`` of every number."""
        return self.log_scale + self.log_slope - 0.5 * torch.log1p(inner**2)


class ForgetsTheScale(JohnsonSU):
    """The mistake that everybody makes once: a factor is missing from the log-determinant."""

    def _log_derivative(self, inner):
        return super()._log_derivative(inner) - self.log_scale


@register
class Waves(nn.Module):
    """A conditioner: any module that makes parameters ``[B, P]`` of the columns that pass through ``[B, C]``."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        nn.init.normal_(self.first.weight, std=2.0)  # frequencies
        nn.init.zeros_(self.last.weight)  # a coupling that starts as the identity trains well
        nn.init.zeros_(self.last.bias)

    def forward(self, kept: Tensor) -> Tensor:
        return self.last(torch.sin(self.first(kept)))


def build(own_layer: bool) -> Flow:
    layers: list[Bijection] = [JohnsonSU(2)] if own_layer else []
    for identity in ("first", "second", "first", "second"):  # the half that passes through
        # Two outputs: shift and scale of the one other column.
        layers.append(AffineCoupling(Waves(1, 2), identity=identity, scale_map="realnvp"))
    return Flow(Chain(layers), StandardNormal(2))


def draw(count: int) -> Tensor:
    heavy = torch.sinh(1.5 * torch.randn(count))
    return torch.stack([heavy, torch.sin(2 * heavy.asinh()) + 0.2 * torch.randn(count)], 1)


def train(flow: Flow, x: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = flow.nll(x[torch.randint(len(x), (512,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)  # heavy tails make heavy gradients
        optimizer.step()
        schedule.step()
    flow.eval()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("own_layer"), help="folder for what is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each flow")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.out.is_file():
        parser.error("expected --steps of at least 1, and a folder as --out")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    x, held_out = draw(20_000), draw(5_000)

    flow, without = build(own_layer=True), build(own_layer=False)
    for each in (flow, without):
        train(each, x, options.steps)
    numbers = {}
    with torch.no_grad():
        numbers["flow"], numbers["without"] = flow.nll(held_out).item(), without.nll(held_out).item()

    # Round trip, log-determinant against the Jacobian, conditioning: of every layer, on data that it really meets.
    report = flow.check(held_out[:256])
    print(report)
    wrong = ForgetsTheScale(2)
    layers = flow.bijection
    assert isinstance(layers, Chain)
    wrong.load_state_dict(layers[0].state_dict())
    numbers["sound"] = float(report.ok)
    blamed = Flow(Chain(wrong, *layers[1:]), StandardNormal(2)).check(held_out[:256])
    numbers["blamed"] = float(not blamed.ok)
    print(str(blamed).splitlines()[-1])

    # One file with weights and configuration; loading runs nothing from the file.
    path = options.out / "flow.safetensors"
    flow.save(path)
    loaded = Flow.load(path)
    numbers["difference"] = (loaded.log_prob(held_out) - flow.log_prob(held_out)).abs().max().item()
    print(f"saved and loaded, its log-densities differ by {numbers['difference']:g}")

    print(f"held-out loss, nats: {numbers['flow']:.3f}, without JohnsonSU {numbers['without']:.3f}")
    plot.save(plot.samples(held_out, flow.sample(5_000)), options.out / "samples.png")
    print(f"wrote {path}\nwrote {options.out / 'samples.png'}")
    return numbers


if __name__ == "__main__":
    main()
