"""What becomes of a density when its variable is put through a function: the lecture's four cases, or any layer."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Normal

from ..nn import Affine, Bijection, Exp, Flow, Log, StandardNormal
from . import style
from ._rows import interval, limits_of, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHIFT, SCALE = 1.0, 0.5
_DRAWN, _SEED, _POINTS = 200_000, 0, 801
_LEGEND = (0.54, 0.68)  # of a panel's width and height, from where on its legend stands: upper right


class Case(NamedTuple):
    """A function of a standard normal: samples, and its density three ways on a line of points, all float64.

    ``flow`` by our layers, ``analytic`` by torch.distributions (or None), ``moved`` the base's density at the points
    that the inverse gives, without the derivative that belongs to it: each the logarithm.
    """

    drawn: Tensor
    at: Tensor
    flow: Tensor
    analytic: Tensor | None
    moved: Tensor

    @property
    def error(self) -> float:
        """The largest difference between the two logarithms; NaN without an analytic one."""
        return float("nan") if self.analytic is None else (self.flow - self.analytic).abs().max().item()


class Refusal(NamedTuple):
    """Why there is no ``ln`` of a normal: how many samples are negative, and what the layer says to them."""

    drawn: Tensor
    share: float
    sentence: str


class Lecture(NamedTuple):
    """The cases that need samples: exp and an affine map of a normal, and the logarithm that there is not."""

    exp: Case
    affine: Case
    refused: Refusal


@style.drawing()
def change_of_variables(
    layer: Bijection | None = None,
    *,
    analytic: Distribution | None = None,
    limits: Any = None,
    title: str | None = None,
) -> Figure:
    """What becomes of the density of a standard normal x in ``y = layer(x)``.

    Drawn are samples of y; ``p(y) = p(x) / |dy/dx|`` by the layer's log-determinant; and, dotted, p(x) moved to y
    without that derivative.

    Without a layer the picture is the lecture's: a die under a square, whose probabilities only move; exp and an affine
    map of a normal; and the logarithm of a normal, which half of the samples do not have.

    Args:
        layer: a bijection of one column, such as ``nfkernels.nn.Exp()``; its forward is what y is computed by.
        analytic: the distribution that y should have, drawn over it.
        limits: ``(low, high)`` of y; by default what holds 99 % of the samples, and a margin.
        title: above the picture; of a layer in place of its own.

    Raises:
        ValueError: a layer of more columns, limits that are none, options without a layer.
        ImportError: no matplotlib.

    Costs 200,000 samples through the layer, in float64.
    """
    if layer is None:
        if analytic is not None or limits is not None:
            raise ValueError("analytic and limits are for a layer, and none was given")
        return lecture_figure(lecture(), title)
    case = normal_through(layer, analytic, None if limits is None else interval(limits))
    made = style.figure(6.4, 4)
    _draw_case(made.subplots(), case, f"y = {type(layer).__name__}(x) of a standard normal x", "analytic")
    if title:
        style.heading(made, title)
    return made


# --- the cases --------------------------------------------------------------------------------------------------------


def die() -> dict[int, Fraction]:
    """P(y) of ``y = x^2`` for a fair die x: a sum over the x that become y, and nothing else."""
    found: dict[int, Fraction] = {}
    for x in range(1, 7):
        found[x**2] = found.get(x**2, Fraction(0)) + Fraction(1, 6)
    return found


def lecture() -> Lecture:
    exp = normal_through(Exp(), LogNormal(*_exactly(0.0, 1.0)), (0.01, 5.0))
    affine = normal_through(Affine(SHIFT, SCALE), Normal(*_exactly(SHIFT, SCALE)), (-1.0, 3.0))
    return Lecture(exp, affine, refusal())


@torch.no_grad()
def normal_through(
    layer: Bijection, analytic: Distribution | None, limits: tuple[float, float] | None, count: int = _DRAWN
) -> Case:
    """``y = layer(x)`` of a standard normal x: as a flow's forward goes from data to latent, the layer's inverse."""
    flow = Flow(layer.inv, StandardNormal(1)).double()
    drawn = flow.sample(count, generator=torch.Generator().manual_seed(_SEED))
    if limits is None:
        limits = within(*limits_of(drawn.numpy())[0], drawn.numpy())
    at = torch.linspace(*limits, _POINTS, dtype=torch.float64)
    moved = flow.base.log_prob(flow.encode(at[:, None]))
    return Case(drawn[:, 0], at, flow.log_prob(at[:, None]), None if analytic is None else analytic.log_prob(at), moved)


def _exactly(loc: float, scale: float) -> tuple[Tensor, Tensor]:
    """A float that torch.distributions is given becomes float32, and so would the logarithm of the scale."""
    return torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)


def refusal(count: int = _DRAWN) -> Refusal:
    drawn = torch.randn(count, 1, generator=torch.Generator().manual_seed(_SEED))
    try:
        Log()(drawn)
        sentence = "nothing: no sample was negative"
    except ValueError as error:
        sentence = str(error)
    return Refusal(drawn[:, 0], (drawn < 0).double().mean().item(), sentence)


# --- the picture ------------------------------------------------------------------------------------------------------


@style.drawing()
def lecture_figure(cases: Lecture, title: str | None = None) -> Figure:
    made = style.figure(11, 8, title or "What becomes of a density when its variable goes through a function")
    (first, second), (third, fourth) = made.subplots(2, 2)
    _draw_die(first)
    _draw_case(second, cases.exp, "a normal, $y = e^x$: $p(y) = p(\\ln y)\\,/\\,y$", "log-normal, analytic")
    affine = f"a normal, $y = {SHIFT:g} + {SCALE:g}\\,x$: $p(y) = p(x)\\,/\\,{SCALE:g}$"
    _draw_case(third, cases.affine, affine, f"normal({SHIFT:g}, {SCALE:g}), analytic")
    _draw_refusal(fourth, cases.refused)
    return made


def _draw_die(axes: Axes) -> None:
    """The die above, its squares below, and a line from each number to what it becomes."""
    axes.set_title("a die, $y = x^2$: probabilities move, nothing is stretched")
    height, above = 1 / 6, 0.42
    for x in range(1, 7):
        axes.plot([x, x**2], [above, height], color="0.75", linewidth=1, zorder=0)
        axes.text(x, above + height + 0.01, str(x), ha="center", fontsize=9)
    axes.bar(range(1, 7), height, width=0.6, bottom=above, color=style.SKY)
    axes.bar(list(die()), [float(p) for p in die().values()], width=0.6, color=style.BLUE)
    axes.text(8, above + height / 2, "$P(x) = 1/6$ each", va="center")
    axes.text(26.3, height / 2, "$P(y) = 1/6$ each", va="center")
    axes.set_xticks(list(die()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 37.5)
    axes.set_ylim(0, above + height + 0.06)
    axes.set_xlabel("$y$")


def _draw_case(axes: Axes, case: Case, title: str, analytic: str) -> None:
    at = case.at.tolist()
    low, high = at[0], at[-1]
    bins = 80
    width = (high - low) / bins
    counts = torch.histc(case.drawn, bins, low, high) / (len(case.drawn) * width)
    left = [low + k * width for k in range(bins)]
    many = f"{len(case.drawn):,} samples"
    axes.bar(left, counts.tolist(), width=width, align="edge", color=style.PALE_BLUE, label=many)
    axes.plot(at, case.moved.exp().tolist(), color=style.GREY, linewidth=1.4, linestyle=":", label="without $|f'|$")
    axes.plot(at, case.flow.exp().tolist(), color=style.SKY, linewidth=3.6, label="our flow's log_prob")
    if case.analytic is not None:
        axes.plot(at, case.analytic.exp().tolist(), color=style.RED, linewidth=1.3, linestyle="--", label=analytic)
    axes.set_title(title)
    axes.set_xlim(min(low, 0.0) if 0 < low < 0.1 else low, high)
    under = [counts[int(_LEGEND[0] * bins) :]]
    lines = [log_p for log_p in (case.flow, case.moved, case.analytic) if log_p is not None]
    under += [log_p[int(_LEGEND[0] * len(at)) :].exp() for log_p in lines]
    tallest = max(values[values.isfinite()].max().item() for values in under if values.isfinite().any())
    axes.set_ylim(0, max(axes.get_ylim()[1], tallest / _LEGEND[1]))
    axes.set_xlabel("$y$")
    axes.set_ylabel("density")
    axes.legend(loc="upper right")


def _draw_refusal(axes: Axes, refused: Refusal) -> None:
    axes.set_title("a normal, $y = \\ln x$: a domain error")
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
    axes.vlines(0, 0, density.max().item(), color="0.5", linewidth=0.8)
    axes.set_ylim(0, 0.6)
    axes.set_xlabel("$x$")
    axes.set_ylabel("density")
    axes.legend(loc="upper right")
    words = refused.sentence.replace(", got", ",\ngot").replace(": ", ":\n")
    axes.text(0.02, 0.97, f"nn.Log says:\n{words}", transform=axes.transAxes, va="top", fontsize=8)
