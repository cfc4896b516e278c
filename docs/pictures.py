"""Makes the pictures of these pages, by default all of them: ``python docs/pictures.py [NAME ...] [--out DIR]``."""

from __future__ import annotations

import argparse
import functools
import io
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from nfkernels import Spline, diagnostics, plot
from nfkernels._atomic import atomic_write
from nfkernels.models import MAF, NSF
from nfkernels.nn import AffineCoupling, Chain, Flow, FullLinear, SplineCoupling, StandardNormal, TriangularLinear
from nfkernels.plot import grid, style
from nfkernels.training import fit, load_images
from nfkernels.training.data.toy import TOYS

MOONS = TOYS["moons"]


@functools.cache
def trained() -> tuple[Flow, list]:
    """A flow of two moons and the history of its training: some ten seconds."""
    torch.manual_seed(0)
    flow = NSF(2, layers=5, hidden=32, linear="none", network="mlp")
    held_out = MOONS.sample(2000, seed=1)
    options = {"steps": 600, "batch_size": 512, "optimizer": "adam", "lr": 1e-2, "warmup": 20, "weight_decay": 0.0}
    result = fit(flow, MOONS.sample(50_000, seed=0), validation=held_out, validate_every=50, log_every=10, **options)
    return flow.eval(), result.history


def change_of_variables() -> object:
    return plot.change_of_variables()


def loss() -> object:
    x = MOONS.sample(20_000, seed=2)
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    known = {"a single normal": normal, "the density itself": MOONS}
    baselines = {name: -model.log_prob(x).mean().item() for name, model in known.items()}
    return plot.training_curve(trained()[1], unit="nats", baselines=baselines, title="Two moons")


def composition() -> object:
    return plot.steps(trained()[0])


def directions() -> object:
    flow = trained()[0]
    z = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = flow.decode(z)
    with style.drawing():
        made = style.figure(9, 4.2)
        angle = torch.atan2(z[:, 1], z[:, 0]).tolist()
        looks = {"c": angle, "cmap": style.circle(), "vmin": -math.pi, "vmax": math.pi, "s": 5, "linewidths": 0}
        far = ((-3.4, 3.4), (-3.4, 3.4))
        sides = (("latent  $z$", z, far), ("data  $x$", x, ((-1.7, 2.7), (-2.1, 2.3))))
        for axes, (name, points, limits) in zip(made.subplots(1, 2, gridspec_kw={"wspace": 0.35}), sides, strict=True):
            axes.scatter(*points.T.tolist(), **looks)
            style.plane(axes, limits, name, ticks=False)
        for height, text, arrow in ((0.60, "inverse, sampling", "->"), (0.42, "forward, density", "<-")):
            ends = {"xy": (0.575, height), "xytext": (0.425, height), "xycoords": "figure fraction"}
            made.axes[0].annotate("", **ends, textcoords="figure fraction", arrowprops={"arrowstyle": arrow, "lw": 1.4})
            made.text(0.5, height + 0.02, text, ha="center")
    return made


class Given(nn.Module):
    """A conditioner that is a formula: the pictures need no training."""

    def __init__(self, formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.formula(x), 1)


def linear() -> object:
    triangular, full = TriangularLinear(2), FullLinear(2)
    with torch.no_grad():
        triangular.weight[1, 0] = -0.9
        triangular.log_scale.copy_(torch.tensor([0.8, 1.4]).log())
        full.weight.copy_(torch.tensor([[0.9, 0.7], [-0.5, 1.2]]))
    return bent({"triangular matrix": triangular, "full matrix": full})


def coupling() -> object:
    spline = Spline(bins=4, low=-3, high=3)
    affine = AffineCoupling(Given(lambda x: (1.2 * torch.sin(1.5 * x), 0.7 * torch.cos(x))), scale_map="exp")
    count = spline.params_per_element
    knots = SplineCoupling(
        Given(lambda x: [1.1 * torch.sin(x * (0.4 + 0.1 * k) + k * k) for k in range(count)]),
        torch.tensor([False, True]),
        spline=spline,
    )
    return bent({"affine coupling": affine, "spline coupling": knots})


def bent(layers: dict[str, nn.Module]) -> object:
    limits = ((-3.6, 3.6), (-3.6, 3.6))
    with style.drawing():
        made = style.figure(9, 4.9)
        for axes, (name, layer) in zip(made.subplots(1, len(layers)), layers.items(), strict=True):
            grid.draw_grid(axes, Flow(Chain(layer), StandardNormal(2)), limits, None)
            axes.set_title(name)
    return made


def dequantisation() -> object:
    levels = 17
    images = load_images("digits").images
    counts = torch.bincount(images.flatten().long(), minlength=levels) / images.numel()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    x = ((images + noise) / levels).flatten()
    per_level = 4
    density = torch.histc(x, levels * per_level, 0, 1) / len(x) * levels * per_level
    with style.drawing():
        made = style.figure(9, 3.4)
        left, right = made.subplots(1, 2)
        left.vlines(range(levels), 0, counts.tolist(), color=style.BLUE, linewidth=3)
        left.set(title="grey levels: probabilities", xlabel="level", ylim=(0, None))
        right.stairs(density.tolist(), torch.linspace(0, 1, len(density) + 1).tolist(), fill=True, color=style.SKY)
        right.set(title="with noise: a density", xlabel="$x$ = (level + u) / 17", ylim=(0, None))
    return made


def corner() -> object:
    torch.manual_seed(0)
    bent = torch.randn(20_000)
    x = torch.stack((bent, bent**2 + 0.5 * torch.randn(20_000), (0.4 * torch.randn(20_000) + 0.3 * bent).exp()), 1)
    mean, deviation = x.mean(0), x.std(0)
    flow = NSF(3, layers=3, hidden=32)
    fit(flow, (x - mean) / deviation, steps=400, batch_size=512, lr=5e-3, weight_decay=0.0)
    drawn = flow.eval().sample(5000) * deviation + mean
    return plot.corner(x[:5000], drawn, names=["a", "b", "c"])


def coverage() -> object:
    torch.manual_seed(0)

    def simulate(count: int) -> tuple[Tensor, Tensor]:
        theta = torch.randn(count, 2)
        return theta, theta[:, :1] * torch.linspace(-1, 1, 50) + theta[:, 1:] + 0.5 * torch.randn(count, 50)

    summary = nn.Sequential(nn.Linear(50, 64), nn.SiLU(), nn.Linear(64, 8))
    posterior = MAF(2, layers=3, hidden=32, context=8, embed=summary, activation="silu")
    fit(posterior, simulate(50_000), steps=600, batch_size=256, lr=2e-3, weight_decay=0.0)
    levels = [k / 20 for k in range(1, 20)]
    found = diagnostics.coverage(posterior.eval(), *simulate(1000), levels=levels, draws=400)
    return plot.coverage(found.nominal, found.empirical, count=found.count)


PICTURES = {
    "change-of-variables": change_of_variables,
    "loss": loss,
    "composition": composition,
    "linear": linear,
    "coupling": coupling,
    "dequantisation": dequantisation,
    "directions": directions,
    "corner": corner,
    "coverage": coverage,
}


def save(made: object, path: Path) -> None:
    """A PNG of a hundred colours, a third of the size that matplotlib's has."""
    from PIL import Image

    whole = io.BytesIO()
    made.savefig(whole, format="png", dpi=110)
    few = Image.open(whole).convert("RGB").quantize(100, dither=Image.Dither.NONE)
    with atomic_write(path) as temporary:
        few.save(temporary, format="png", optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pictures"), metavar="DIR")
    options = parser.parse_args(arguments)
    strange = [name for name in options.names if name not in PICTURES]
    if strange:
        parser.error(f"no picture is called {strange[0]}: expected {', '.join(PICTURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.names or PICTURES:
        path = options.out / f"{name}.png"
        save(PICTURES[name](), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
