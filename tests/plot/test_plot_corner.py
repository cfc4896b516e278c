"""Corner plots: what is drawn of how many columns, whole numbers, truths, and what is refused."""

import math

import numpy
import pytest

pytest.importorskip("matplotlib")

from figures import drawn, rows, texts
from matplotlib.colors import to_rgb

from nfkernels import plot
from nfkernels.plot import style
from nfkernels.plot.corner import Column, _levels


def has_colour(figure, colour):
    wanted = [round(255 * part) for part in to_rgb(colour)]
    return bool((drawn(figure) == wanted).all(-1).any())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_any_number_of_columns(count):
    data, samples = rows(300, count), rows(200, count, seed=1)
    data[:, -1], samples[:, -1] = data[:, -1].round(), samples[:, -1].round()
    names = [f"c{at} $" for at in range(count)]
    figure = plot.corner(data, samples, names=names, title="a title $\\foo$")
    shown = min(count, 8)
    assert len(figure.axes) == shown * (shown + 1) // 2
    width, height = figure.get_size_inches()
    assert width == height
    told = texts(figure)
    assert "a title" in told
    assert ("not drawn: c8 $, c9 $, c10 $" in told) == (count == 11)
    assert all(name in told for name in names[:shown])
    if count in (1, 3):
        assert has_colour(figure, style.FILLS[1])
        assert has_colour(figure, style.RED)
        assert not has_colour(plot.corner(data), style.RED)


def test_a_marginal_is_the_share_of_all_rows():
    data = numpy.array([0.0, 0.0, 0.0, 1.0])
    figure = plot.corner(data, numpy.array([0.0, 1.0, 1.0, 1.0, 50.0]))
    heights = [sorted({round(y, 6) for y in patch.get_path().vertices[:, 1]}) for patch in figure.axes[0].patches]
    assert heights == [[0, 0.25, 0.75], [0, 0.2, 0.6]]  # bars of whole numbers; 50 is out of the picture, and counted


def test_there_is_room_above_the_highest_bar():
    for count in (1, 3):
        for at, panel in enumerate(plot.corner(rows(300, count), rows(200, count, seed=1)).axes):
            if panel.patches:
                highest = max(patch.get_path().vertices[:, 1].max() for patch in panel.patches)
                assert panel.get_ylim()[1] > 1.05 * highest, at


def test_tick_labels_of_a_row_stand_alike():
    def angles(data):
        figure = plot.corner(data)
        drawn(figure)
        panels = figure.axes[3:]
        return [{label.get_rotation() for label in panel.get_xticklabels()} for panel in panels]

    data = rows(300, 3)
    assert angles(data) == [{0.0}] * 3
    data[:, 1] = (data[:, 1] - 2) * 1e-4  # -0.0001
    assert angles(data) == [{45.0}] * 3


def test_samples_far_from_the_data_do_not_hide_it():
    data = numpy.random.default_rng(0).normal(size=300)
    low, high = Column("x", data, data * 1e6 + 1e7).range()
    assert -6 < low < -2
    assert 2 < high < 6
    both = numpy.stack([data, data], 1)
    drawn(plot.corner(both, both * 1e6 + 1e7))


def test_contours_hold_their_masses():
    density = numpy.arange(1.0, 101).reshape(10, 10) / 5050
    levels = _levels(density)
    assert [density[density >= level].sum() for level in levels] == pytest.approx([0.95, 0.68, 0.3], abs=0.02)
    assert _levels(numpy.zeros((3, 3))) == []


def test_the_truth_is_in_the_picture():
    figure = plot.corner(rows(300, 3), truth=[0.5, math.nan, 9.0], names=["a", "b", "c"])
    grid = dict(zip(((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)), figure.axes, strict=True))
    assert grid[2, 2].get_xlim()[1] > 9
    assert [len(grid[at, at].lines) for at in range(3)] == [1, 0, 1]
    assert list(grid[0, 0].lines[0].get_xdata()) == [0.5, 0.5]
    (point,) = [line for line in grid[2, 0].lines if line.get_marker() == "s"]
    assert [point.get_xdata()[0], point.get_ydata()[0]] == [0.5, 9.0]
    assert not [line for line in grid[1, 0].lines if line.get_marker() == "s"]
    assert "truth" in texts(figure)
    assert "truth" not in texts(plot.corner(rows(20, 3)))
    drawn(plot.corner(rows(20, 2), rows(20, 2), labels=("the $_$", "our $_$")))  # no formulas


def test_whole_numbers_are_seen_and_can_be_told():
    data = numpy.array([[0.0, 1.5], [1.0, 2.5], [7.0, 2.5]])
    steps = [len(panel.patches[0].get_path().vertices) for panel in plot.corner(data).axes[::2]]
    told = [len(panel.patches[0].get_path().vertices) for panel in plot.corner(data, steps=[0, 0.5]).axes[::2]]
    assert steps[0] < told[0]
    assert told[1] < steps[1]


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5e8, 1e-12])
def test_single_rows_and_constant_columns(value):
    for count in (1, 20):
        data = numpy.full((count, 2), value)
        figure = plot.corner(data, data)
        low, high = figure.axes[0].get_xlim()
        assert low < value < high
        drawn(figure)


def test_what_is_refused_or_left_out_is_named():
    data = rows(50, 2)
    with pytest.raises(ValueError, match="data has 2 columns and samples 3"):
        plot.corner(data, rows(50, 3))
    with pytest.raises(ValueError, match="names has 3 entries: expected 2"):
        plot.corner(data, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="names has 1 entries: expected 2"):
        plot.corner(data, names="ab")
    with pytest.raises(ValueError, match="truth has 1 values: expected 2"):
        plot.corner(data, truth=[1.0])
    with pytest.raises(ValueError, match="steps has 3 values: expected 2"):
        plot.corner(data, steps=[0, 0, 0])
    data[4, 1] = math.nan
    with pytest.warns(UserWarning, match="1 of 50 rows of samples are not finite"):
        figure = plot.corner(rows(50, 2), data)
    assert "1 of 50 rows of samples are not finite" in texts(figure)
