"""Whether a conditional flow's uncertainty is right: rank histograms, and coverage of its regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from . import style
from ._rows import array, column_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND = 0.99  # of calibrated flows' bars and points lie inside
_ACROSS = 4
_MOST = 16  # panels of ranks, lines of coverage
_BAND_COLOUR = "0.87"


@style.drawing()
def calibration(
    ranks: Any, draws: int, *, names: Sequence[str] | None = None, bins: int | None = None, title: str | None = None
) -> Figure:
    """Simulation-based calibration (Talts et al. 2018): each parameter's histogram of ranks.

    A rank is the number of a posterior's ``draws`` that lie below the true value. Of a calibrated flow ranks are
    uniform, and a bar lies in the grey band 99 times of 100. Bars high at both ends mean posteriors that are too
    narrow, high in the middle ones that are too wide, and a slope ones that lie to one side of the truth.

    Heights are counts over what a calibrated flow would have.

    Args:
        ranks: whole numbers 0 .. draws, ``[N]`` or ``[N, D]`` for N simulations and D parameters, tensor or array; see
            ``nfkernels.diagnostics.ranks``.
        draws: of each posterior.
        names: of the parameters, D; by default x1, x2, ...
        bins: of each histogram; by default one for twenty simulations, 5 to 20.
        title: above the picture.

    More than 16 parameters are not drawn; the picture tells how many are left out.

    Raises:
        ValueError: another shape, ranks that are not 0 .. draws, fewer draws or bins than one, another number of names.
        ImportError: no matplotlib.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected at least 1")
    found = _ranks(ranks, draws)
    labels = column_names(names, found.shape[1])
    bins = min(int(numpy.clip(len(found) // 20, 5, 20)) if bins is None else bins, draws + 1)
    if bins < 1:
        raise ValueError(f"bins is {bins}: expected at least 1")
    shown = min(found.shape[1], _MOST)
    across = min(shown, _ACROSS)
    made = style.figure(max(5.6, 2.9 * across), 3.8 if shown == 1 else 2.4 * -(-shown // across) + 0.8, title)
    # Neighbouring ranks in bins whose sizes differ by one at most; heights are over what each should hold.
    sizes = numpy.array([len(part) for part in numpy.array_split(numpy.arange(draws + 1), bins)])
    edges = numpy.concatenate(([0], numpy.cumsum(sizes)))
    expected = len(found) * sizes / (draws + 1)
    band = [binomial_band(len(found), size / (draws + 1)) for size in sizes]
    low, high = (numpy.array(ends) / expected for ends in zip(*band, strict=True))
    for at, axes in enumerate(style.panels(made, shown, across)):
        heights = numpy.histogram(found[:, at], edges - 0.5)[0] / expected
        _ranks_panel(axes, edges, heights, (low, high), f"99 % of calibrated flows, {len(found):,} simulations")
        outside = int(((heights < low) | (heights > high)).sum())
        name = style.short(labels[at], 2.7, 10)
        told = f"{name}:{' ' if len(name) < 12 else chr(10)}{outside} of {bins} bars outside"
        axes.set_title(told, fontsize=10, parse_math=False)
        axes.set_xlabel(f"rank among {draws:,} draws")
    made.axes[0].set_ylabel("simulations over expected")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    style.note(made, f"{found.shape[1] - shown} more parameters are not drawn" if found.shape[1] > shown else "")
    return made


def _ranks(ranks: Any, draws: int) -> numpy.ndarray:
    found = array(ranks)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or not found.size:
        raise ValueError(f"ranks are {list(found.shape)}: expected [N] or [N, D], none of them 0")
    wrong = ~((found >= 0) & (found <= draws) & (found == numpy.round(found)))  # NaN, too
    if wrong.any():
        raise ValueError(
            f"ranks hold {found[wrong][0]:g}: expected whole numbers from 0 to {draws}, how many draws lie below"
        )
    return found


def _ranks_panel(axes: Axes, edges: numpy.ndarray, heights: numpy.ndarray, band: Any, told: str) -> None:
    low, high = band
    axes.stairs(high, edges, baseline=low, fill=True, color=_BAND_COLOUR, label=told)
    axes.stairs(heights, edges, color=style.BLUE, linewidth=1.6, label="this flow")
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(1.15 * heights.max(), 1.1 * high.max()))


@style.drawing()
def coverage(
    nominal: Any, empirical: Any, *, count: int, names: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """How often a flow's regions hold the truth, over how often they should.

    On the diagonal the flow is calibrated; below it regions are too narrow (the flow is too sure), above too wide. The
    grey band holds 99 of 100 points of calibrated flows, for so many tests.

    Args:
        nominal: the regions' probabilities, ``[L]`` between 0 and 1, rising or not.
        empirical: the share of tests in which the truth lay in the region, ``[L]``, or ``[L, D]`` for several
            regions or parameters; see ``nfkernels.diagnostics.coverage``.
        count: tests that the shares are of.
        names: of the D lines, for the legend.
        title: above the picture.

    More than 16 lines are not drawn; the picture tells how many are left out.

    Raises:
        ValueError: shapes that do not fit, shares that are not between 0 and 1, a count below 1, another number of
            names.
        ImportError: no matplotlib.
    """
    wanted, found = array(nominal), array(empirical)
    found = found[:, None] if found.ndim == 1 else found
    if wanted.ndim != 1 or found.ndim != 2 or len(wanted) != len(found) or not found.size:
        raise ValueError(
            f"nominal is {list(wanted.shape)} and empirical {list(array(empirical).shape)}: expected [L], and [L] or "
            "[L, D]"
        )
    for name, values in (("nominal", wanted), ("empirical", found)):
        wrong = ~((values >= 0) & (values <= 1))
        if wrong.any():
            raise ValueError(f"{name} holds {values[wrong][0]:g}: expected shares between 0 and 1")
    if count < 1:
        raise ValueError(f"count is {count}: expected the number of tests, at least 1")
    labels = column_names(names, found.shape[1])
    order = numpy.argsort(wanted)
    made = style.figure(5.2, 5.2, title)
    axes = made.subplots()
    at = numpy.linspace(0, 1, 201)
    low, high = zip(*(binomial_band(count, float(p)) for p in at), strict=True)
    told = f"99 % of calibrated flows, {count:,} tests"
    axes.fill_between(at, numpy.array(low) / count, numpy.array(high) / count, color=_BAND_COLOUR, label=told)
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    shown = min(found.shape[1], _MOST)
    for index in range(shown):
        colour, dashes, marker = style.SERIES[(index + (shown == 1)) % len(style.SERIES)]
        label = style.in_legend(labels[index], 4) if names is not None or shown > 1 else "this flow"
        axes.plot(
            wanted[order],
            found[order, index],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=5,
            label=label,
            clip_on=False,
        )
    axes.text(0.03, 0.97, "too wide", transform=axes.transAxes, va="top", color="0.45", fontsize=9)
    axes.text(0.97, 0.03, "too narrow", transform=axes.transAxes, ha="right", color="0.45", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("nominal coverage")
    axes.set_ylabel("empirical coverage")
    long = max(map(len, labels[:shown])) > 16
    style.verbatim(made.legend(loc="outside lower center", ncols=1 if long else 2))
    style.note(made, f"{found.shape[1] - shown} more lines are not drawn" if found.shape[1] > shown else "")
    return made


def binomial_band(count: int, probability: float) -> tuple[int, int]:
    """The central 99 % of the number of successes of so many trials: the lowest and the highest of them."""
    k = torch.arange(count + 1, dtype=torch.float64)
    p = torch.tensor(probability, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    )
    cumulative = (ways + torch.xlogy(k, p) + torch.xlogy(count - k, 1 - p)).exp().cumsum(0).numpy()
    tail = (1 - _BAND) / 2
    low, high = (int(numpy.searchsorted(cumulative, share)) for share in (tail, 1 - tail))
    return min(low, count), min(high, count)
