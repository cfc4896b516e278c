"""Rank histograms and coverage: right bands, and what a flow that is too sure looks like."""

import math

import numpy
import pytest

pytest.importorskip("matplotlib")

from figures import drawn, texts

from nfkernels import plot
from nfkernels.plot.calibration import binomial_band


def random():
    return numpy.random.default_rng(0)


@pytest.mark.parametrize(("count", "probability"), [(20, 0.5), (300, 0.05), (1000, 0.95), (50_000, 0.01)])
def test_the_band_is_the_binomials(count, probability):
    stats = pytest.importorskip("scipy.stats")
    exact = tuple(int(stats.binom.ppf(share, count, probability)) for share in (0.005, 0.995))
    assert binomial_band(count, probability) == exact


def test_the_band_at_the_ends():
    assert binomial_band(10, 0.0) == (0, 0)
    assert binomial_band(10, 1.0) == (10, 10)
    assert binomial_band(1, 0.5) == (0, 1)


def bars(axes):
    band, flow = axes.patches
    return band.get_data(), flow.get_data()


@pytest.mark.parametrize(("draws", "count", "bins"), [(100, 1000, 20), (7, 50, 5), (3, 1000, 4), (999, 40, 5)])
def test_bars_are_counts_over_what_each_bin_should_hold(draws, count, bins):
    ranks = random().integers(0, draws + 1, count)
    figure = plot.calibration(ranks, draws)
    band, flow = bars(figure.axes[0])
    assert len(flow.values) == bins
    assert flow.edges[0] == 0
    assert flow.edges[-1] == draws + 1
    for at, (first, after) in enumerate(zip(flow.edges, flow.edges[1:])):
        share = (after - first) / (draws + 1)
        inside = ((ranks >= first) & (ranks < after)).sum()
        assert flow.values[at] == pytest.approx(inside / (count * share))
        low, high = binomial_band(count, share)
        assert (band.baseline[at], band.values[at]) == pytest.approx((low / (count * share), high / (count * share)))
    assert f"{count:,} simulations" in texts(figure)


def test_a_flow_that_is_too_sure_is_seen():
    right = random().integers(0, 101, 2000)
    sure = numpy.clip(numpy.round(50 + 80 * random().normal(size=2000)), 0, 100)
    figure = plot.calibration(numpy.stack([right, sure], 1), 100, names=["right $", "sure"], bins=10)
    one, other = figure.axes[:2]
    assert "sure: 10 of 10 bars outside" in texts(figure)
    assert int(one.get_title(loc="left").split(": ")[1].split()[0]) <= 1
    values = bars(other)[1].values
    assert values[0] > 2 < values[-1]
    assert values[1:-1].max() < 1
    drawn(figure)


def test_many_parameters_and_one_simulation():
    figure = plot.calibration(random().integers(0, 11, (100, 19)), 10)
    assert sum(axes.get_visible() for axes in figure.axes) == 16
    assert "3 more parameters are not drawn" in texts(figure)
    drawn(plot.calibration([3], 10))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0, 11], 10), "ranks hold 11: expected whole numbers from 0 to 10"),
        (([0.5], 10), r"ranks hold 0\.5"),
        (([math.nan], 10), "ranks hold nan"),
        (([], 10), r"ranks are \[0, 1\]: expected \[N\] or \[N, D\]"),
        ((numpy.zeros((2, 2, 2)), 10), r"ranks are \[2, 2, 2\]"),
        (([1], 0), "draws is 0"),
    ],
)
def test_ranks_that_are_none_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        plot.calibration(*arguments)


def test_coverage_is_drawn_over_the_nominal_one():
    figure = plot.coverage([0.8, 0.5, 0.95], [0.75, 0.5, 0.9], count=400)
    axes = figure.axes[0]
    line = next(line for line in axes.lines if line.get_label() == "this flow")
    assert line.get_xydata().tolist() == [[0.5, 0.5], [0.8, 0.75], [0.95, 0.9]]
    assert line.get_marker() not in ("", "None", None)
    x, y = axes.collections[0].get_paths()[0].vertices.T
    low, high = binomial_band(400, 0.5)
    assert {round(400 * value) for value in y[numpy.isclose(x, 0.5)]} == {low, high}
    assert "400 tests" in texts(figure)
    drawn(figure)


def test_several_lines_differ_in_more_than_colour():
    figure = plot.coverage([0.5, 0.9], random().random((2, 5)), count=10, names=list("abcd$"))
    shown = [line for line in figure.axes[0].lines if line.get_label() in list("abcd$")]
    assert len({(line.get_linestyle(), line.get_marker()) for line in shown}) == 5
    drawn(figure)
    assert "4 more lines are not drawn" in texts(plot.coverage([0.5], random().random((1, 20)), count=10))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0.5, 0.8], [0.5]), r"nominal is \[2\] and empirical \[1\]: expected \[L\], and \[L\] or \[L, D\]"),
        (([50], [0.5]), "nominal holds 50: expected shares between 0 and 1"),
        (([0.5], [math.nan]), "empirical holds nan"),
        (([], []), "nominal is"),
    ],
)
def test_shares_that_are_none_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        plot.coverage(*arguments, count=10)
    with pytest.raises(ValueError, match="count is 0"):
        plot.coverage([0.5], [0.5], count=0)
