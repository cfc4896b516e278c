"""Changes of variables: the lecture's cases, and any layer of one column."""

import re
from fractions import Fraction

import pytest
import torch
from torch.distributions import LogNormal, Normal

pytest.importorskip("matplotlib")

from figures import drawn, texts

from nfkernels import plot
from nfkernels.nn import Affine, Exp, LULinear
from nfkernels.plot import variables


def test_a_squared_die():
    assert variables.die() == {square: Fraction(1, 6) for square in (1, 4, 9, 16, 25, 36)}


def test_the_flows_density_is_the_analytic_one_and_a_wrong_one_is_seen():
    exp = variables.normal_through(Exp(), LogNormal(*variables._exactly(0.0, 1.0)), (0.01, 5.0), 5000)
    assert exp.error < 1e-12
    assert exp.drawn.log().mean().abs() < 0.06
    assert (exp.moved - exp.analytic - exp.at.log()).abs().max() < 1e-12  # what is left out is the derivative
    affine = variables.normal_through(Affine(1.0, 0.5), Normal(*variables._exactly(1.0, 0.5)), (-1.0, 3.0), 5000)
    assert affine.error < 1e-12
    wrong = variables.normal_through(Affine(1.0, 0.5), Normal(*variables._exactly(1.0, 0.6)), (-1.0, 3.0), 10)
    assert wrong.error > 0.1


def test_half_of_a_normal_has_no_logarithm():
    found = variables.refusal(20_000)
    assert abs(found.share - 0.5) < 0.02
    assert re.fullmatch(r"Log needs positive data, got a minimum of -\d\.\d+: shift it, .*", found.sentence)


def test_any_layer_of_one_column():
    layer = Affine(1.0, 0.5)
    figure = plot.change_of_variables(layer, analytic=Normal(1.0, 0.5), title="t $")
    (axes,) = figure.axes
    found = {line.get_label(): torch.from_numpy(line.get_xydata()) for line in axes.lines}
    ours, analytic = found["our flow's log_prob"], found["analytic"]
    assert torch.allclose(ours, analytic, atol=1e-6)
    assert (found["without $|f'|$"][:, 1] * 2 - ours[:, 1]).abs().max() < 1e-9
    heights = torch.tensor([bar.get_height() for bar in axes.patches])
    assert (heights * axes.patches[0].get_width()).sum().item() == pytest.approx(0.995, abs=0.01)
    assert axes.get_xlim() == pytest.approx((-0.7, 2.7), abs=0.3)
    assert plot.change_of_variables(Exp(), limits=(1, 2)).axes[0].get_xlim() == (1, 2)
    assert layer(torch.zeros(1, 1))[0].dtype == torch.float32  # the layer itself is left as it was


@pytest.mark.parametrize("layer", [None, Affine(1.0, 0.5), Exp()])
def test_nothing_runs_into_the_legend(layer):
    figure = plot.change_of_variables(layer, **({} if layer is None else {"title": "t"}))
    drawn(figure)
    for axes in figure.axes:
        if axes.get_legend() is None:
            continue
        box = axes.get_legend().get_window_extent()
        for line in [*axes.lines, *axes.collections]:
            paths = [line.get_xydata()] if line in axes.lines else [path.vertices for path in line.get_paths()]
            points = axes.transData.transform([point for path in paths for point in path])
            assert not any(box.x0 < x < box.x1 and y > box.y0 for x, y in points)
        for bar in axes.patches:
            right, top = axes.transData.transform((bar.get_x() + bar.get_width(), bar.get_height()))
            assert right < box.x0 or top < box.y0


def test_the_lecture_has_four_panels():
    figure = plot.change_of_variables()
    assert len(figure.axes) == 4
    told = texts(figure)
    assert "Log needs positive data" in told
    assert "log-normal, analytic" in told
    drawn(figure)


def test_what_is_refused():
    with pytest.raises(ValueError, match="analytic and limits are for a layer"):
        plot.change_of_variables(limits=(0, 1))
    with pytest.raises(ValueError, match="LULinear was built for 2 channels"):
        plot.change_of_variables(LULinear(2))
    with pytest.raises(ValueError, match="low < high"):
        plot.change_of_variables(Exp(), limits=(2, 1))
