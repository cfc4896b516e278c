"""Training curves: which losses, on which scale."""

import math

import numpy
import pytest
import torch

pytest.importorskip("matplotlib")

from figures import drawn, texts

from nfkernels import plot

HISTORY = [{"step": 10 * k, "bpd": 4.0 / k + 2} for k in range(1, 40)]


def lines(figure):
    return {line.get_label().partition(":")[0]: line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_the_losses_are_the_entries():
    more = [{"step": 200, "validation_bpd": 2.5}, {"step": 300, "validation_bpd": 2.3}, {"seconds": 3}]
    figure = plot.training_curve(
        HISTORY + more, baselines={"uniform": 8.0, "pixels $": 4.1}, best=(300, 2.3), title="t $"
    )
    found = lines(figure)
    assert found["training"] == [[entry["step"], entry["bpd"]] for entry in HISTORY]
    assert found["validation"] == [[200, 2.5], [300, 2.3]]
    assert found["kept"] == [[300, 2.3]]
    assert found["uniform"] == [[0, 8], [1, 8]]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 2.1
    assert 4.1 < top < 8  # the first steps and the farther baseline are off the scale
    assert "uniform: 8.000 (above)" in texts(figure)
    assert "bits per dimension" in texts(figure)
    drawn(figure)


def test_units_and_the_key_that_goes_with_them():
    figure = plot.training_curve([{"step": 1, "nll": 3.0}, {"step": 2, "nll": 2.0}], unit="nats")
    assert lines(figure)["training"] == [[1, 3], [2, 2]]
    assert "nats" in texts(figure)
    drawn(plot.training_curve(HISTORY, baselines={"in $_$": 2.5, "of $_$": 3.0}))  # no formulas
    assert "_hidden: 2.500" in texts(plot.training_curve(HISTORY, baselines={"_hidden": 2.5}))
    drawn(plot.training_curve([{"step": 1, "nll": 3.0}], unit="nats $_$"))
    with pytest.raises(ValueError, match="history holds losses as nll, and unit='bits/dim' is for bpd"):
        plot.training_curve([{"step": 1, "validation_nll": 3.0}])
    drawn(plot.training_curve([]))


def test_losses_of_any_kind_of_number():
    kinds = (float, numpy.float32, numpy.float64, torch.tensor, lambda loss: torch.tensor([loss], requires_grad=True))
    history = [{"step": step, "bpd": kind(2.5)} for step, kind in enumerate(kinds)]
    history += [{"step": numpy.int64(7), "bpd": 2.5}, {"step": torch.tensor(8), "bpd": 2.5}]
    assert lines(plot.training_curve(history))["training"] == [[step, 2.5] for step in (0, 1, 2, 3, 4, 7, 8)]


@pytest.mark.parametrize(
    ("history", "baselines"),
    [([], {"one": 2.345}), ([{"step": 1, "bpd": 2.345}] * 2, {}), ([{"step": 1, "bpd": 1e-7}], {"b": 0.0})],
)
def test_tick_labels_are_the_losses_themselves(history, baselines):
    figure = plot.training_curve(history, baselines=baselines)
    drawn(figure)
    axis = figure.axes[0].yaxis
    assert axis.get_offset_text().get_text() == ""
    told = [label.get_text() for label in axis.get_ticklabels()]
    assert len(set(told)) == len(told) > 2


def test_without_losses_all_baselines_are_seen():
    figure = plot.training_curve([], baselines={"near": 2.0, "far": 9.0})
    assert "(above)" not in texts(figure)


def test_losses_that_are_not_finite_are_marked_where_they_were():
    history = [
        *HISTORY,
        {"step": 400, "bpd": None},
        {"step": 410, "bpd": math.inf},
        {"step": 400, "validation_bpd": None},
    ]
    figure = plot.training_curve(history)
    found = lines(figure)
    assert sorted(step for step, _ in found["not finite"]) == [400, 400, 410]
    assert "not finite: 3" in texts(figure)
    assert all(map(math.isfinite, figure.axes[0].get_ylim()))
    drawn(figure)
    drawn(plot.training_curve([{"step": 1, "bpd": math.nan}]))


def test_entries_that_somebody_has_edited_are_left_out():
    figure = plot.training_curve([*HISTORY, {"step": 400, "bpd": "three"}, {"bpd": 2.0}, {"step": "x", "bpd": 1.0}])
    assert len(lines(figure)["training"]) == len(HISTORY)
