"""`nfkernels demo change-of-variables`: what happens to a density when its variable is put through a function."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal

from ...nn import Affine, Bijection, Exp, Flow, Log, StandardNormal
from ..as_json import print_json
from ..progress import unread_is_fine
from . import style
from .folder import PictureFolder
from .options import VARIABLES

_DRAWN, _SEED = 200_000, 0
_SHIFT, _SCALE = 1.0, 0.5


class Case(NamedTuple):
    """A function of a standard normal: samples, and its density three ways on a line of points.

    ``flow`` by our layers, ``analytic`` by torch.distributions, ``moved`` the base's density at the points that the
    inverse gives, without the derivative that belongs to it.
    """

    drawn: Tensor
    at: Tensor
    flow: Tensor
    analytic: Tensor
    moved: Tensor

    @property
    def error(self) -> float:
        """The largest difference between the two logarithms."""
        return (self.flow - self.analytic).abs().max().item()


def change_of_variables(folder: PictureFolder, *, json: bool = False) -> int:
    """Draws the four cases into the folder's picture and explains them on the terminal, or in JSON. Returns 0."""
    exp = normal_through(Exp(), LogNormal(*_exactly(0.0, 1.0)), 0.01, 5.0)
    affine = normal_through(Affine(_SHIFT, _SCALE), Normal(*_exactly(_SHIFT, _SCALE)), -1.0, 3.0)
    refused = refusal()
    draw(folder.pictures[0], exp, affine, refused)
    if json:
        errors = {"exp_log_density_error": exp.error, "affine_log_density_error": affine.error}
        print_json({"name": VARIABLES, **errors, "share_without_logarithm": refused.share, "written": folder.pictures})
        return 0
    with unread_is_fine(sys.stdout):
        print(explanation(exp, affine, refused) + f"\n\n{folder.told()}", flush=True)
    return 0


def die() -> dict[int, Fraction]:
    """P(y) of ``y = x^2`` for a fair die x: a sum over the x that become y, and nothing else."""
    found: dict[int, Fraction] = {}
    for x in range(1, 7):
        found[x**2] = found.get(x**2, Fraction(0)) + Fraction(1, 6)
    return found


@torch.no_grad()
def normal_through(
    layer: Bijection, analytic: torch.distributions.Distribution, low: float, high: float, count: int = _DRAWN
) -> Case:
    """``y = layer(x)`` of a standard normal x: as a flow's forward goes from data to latent, the layer's inverse."""
    flow = Flow(layer.inv, StandardNormal(1)).double()
    drawn = flow.sample(count, generator=torch.Generator().manual_seed(_SEED))
    at = torch.linspace(low, high, 801, dtype=torch.float64)
    moved = flow.base.log_prob(flow.encode(at[:, None]))
    return Case(drawn[:, 0], at, flow.log_prob(at[:, None]), analytic.log_prob(at), moved)


def _exactly(loc: float, scale: float) -> tuple[Tensor, Tensor]:
    """A float that torch.distributions is given becomes float32, and so would the logarithm of the scale."""
    return torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)


class Refusal(NamedTuple):
    """Why there is no ``ln`` of a normal: how many samples are negative, and what the layer says to them."""

    drawn: Tensor
    share: float
    sentence: str


def refusal(count: int = _DRAWN) -> Refusal:
    drawn = torch.randn(count, 1, generator=torch.Generator().manual_seed(_SEED))
    try:
        Log()(drawn)
        sentence = "nothing: no sample was negative"
    except ValueError as error:
        sentence = str(error)
    return Refusal(drawn[:, 0], (drawn < 0).double().mean().item(), sentence)


def explanation(exp: Case, affine: Case, refused: Refusal) -> str:
    squares, each = ", ".join(map(str, die())), die()[36]
    mean, spread = exp.drawn.mean().item(), affine.drawn.std().item()
    return f"""\
What becomes of the density of x in y = f(x)?

1. A die, y = x^2: the values move to {squares}, and each keeps its {each}. Probabilities have no
   width that f could stretch, so its derivative does not matter.
2. A normal, y = exp(x): a density is probability per length, and f changes lengths, so p(y) = p(x) / |f'(x)|. Here
   that is p(ln y) / y, the log-normal. Mean of {len(exp.drawn):,} samples {mean:.3f}, expected {math.exp(0.5):.3f};
   log p(y) by nfkernels.nn.Exp and by the formula differ by {exp.error:.0e} at most.
3. A normal, y = {_SHIFT:g} + {_SCALE:g} x: all lengths become {_SCALE:g} of what they were, so the density grows by \
{1 / _SCALE:g} to a normal again.
   Standard deviation of the samples {spread:.3f}, expected {_SCALE:.3f};
   log p(y) by nfkernels.nn.Affine and by the formula differ by {affine.error:.0e} at most.
4. A normal, y = ln(x): no. {100 * refused.share:.1f} % of the samples are negative and have no logarithm; f has to be \
defined wherever
   x has density. nfkernels.nn.Log says:
   {refused.sentence}"""


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(path: Any, exp: Case, affine: Case, refused: Refusal) -> None:
    made = style.figure((11, 8), "What becomes of a density when its variable goes through a function")
    (first, second), (third, fourth) = made.subplots(2, 2)
    _draw_die(first)
    _draw_case(second, exp, "a normal, $y = e^x$: $p(y) = p(\\ln y)\\,/\\,y$", "log-normal, analytic")
    title = f"a normal, $y = {_SHIFT:g} + {_SCALE:g}\\,x$: $p(y) = p(x)\\,/\\,{_SCALE:g}$"
    _draw_case(third, affine, title, f"normal({_SHIFT:g}, {_SCALE:g}), analytic")
    _draw_refusal(fourth, refused)
    style.save(made, path)


def _draw_die(axes: Any) -> None:
    """The die above, its squares below, and a line from each number to what it becomes."""
    style.tidy(axes, "a die, $y = x^2$: probabilities move, nothing is stretched")
    height, above = 1 / 6, 0.42
    for x in range(1, 7):
        axes.plot([x, x**2], [above, height], color="0.75", linewidth=1, zorder=0)
        axes.text(x, above + height + 0.01, str(x), ha="center", fontsize=9, color=style.INK)
    axes.bar(range(1, 7), height, width=0.6, bottom=above, color=style.SKY)
    axes.bar(list(die()), [float(p) for p in die().values()], width=0.6, color=style.BLUE)
    axes.text(8, above + height / 2, "$P(x) = 1/6$ each", va="center", fontsize=10, color=style.INK)
    axes.text(26.3, height / 2, "$P(y) = 1/6$ each", va="center", fontsize=10, color=style.INK)
    axes.set_xticks(list(die()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 37.5)
    axes.set_ylim(0, above + height + 0.06)
    axes.set_xlabel("$y$", fontsize=10)


def _draw_case(axes: Any, case: Case, title: str, analytic: str) -> None:
    style.tidy(axes, title)
    at = case.at.tolist()
    low, high = at[0], at[-1]
    bins = 80
    width = (high - low) / bins
    counts = torch.histc(case.drawn, bins, low, high) / (len(case.drawn) * width)
    left = [low + k * width for k in range(bins)]
    axes.bar(
        left, counts.tolist(), width=width, align="edge", color=style.PALE_BLUE, label=f"{len(case.drawn):,} samples"
    )
    axes.plot(at, case.moved.exp().tolist(), color=style.GREY, linewidth=1.4, linestyle=":", label="without $|f'|$")
    axes.plot(at, case.flow.exp().tolist(), color=style.BLUE, linewidth=3.2, alpha=0.75, label="our flow's log_prob")
    axes.plot(at, case.analytic.exp().tolist(), color=style.RED, linewidth=1.3, linestyle="--", label=analytic)
    axes.set_xlim(min(low, 0.0) if low < 0.1 else low, high)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("$y$", fontsize=10)
    axes.set_ylabel("density", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_refusal(axes: Any, refused: Refusal) -> None:
    style.tidy(axes, "a normal, $y = \\ln x$: a domain error")
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(x).exp()
    axes.plot(x.tolist(), density.tolist(), color=style.INK, linewidth=1.4)
    negative, positive = x <= 0, x >= 0
    axes.fill_between(
        x[negative].tolist(), density[negative].tolist(), facecolor=style.PALE_RED, edgecolor=style.RED, hatch="///",
        linewidth=0, label=f"{100 * refused.share:.1f} % of the samples: no logarithm",
    )  # fmt: skip
    axes.fill_between(
        x[positive].tolist(), density[positive].tolist(), facecolor=style.PALE_BLUE, label="where $\\ln x$ is defined"
    )
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_ylim(0, 0.6)
    axes.set_xlabel("$x$", fontsize=10)
    axes.set_ylabel("density", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    words = refused.sentence.replace(", got", ",\ngot").replace(": ", ":\n")
    axes.text(0.02, 0.97, f"nn.Log says:\n{words}", transform=axes.transAxes, va="top", fontsize=8, color=style.INK)
