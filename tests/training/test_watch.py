"""A training that goes wrong says what and where, and one that goes well says nothing."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tiny import QUICK, glow, stripes, tabular

from nfkernels import ScaleMap
from nfkernels import nn as N
from nfkernels.training import TrainingError, fit

ROWS = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))


def test_runs_that_go_well_say_nothing(digits_run, table_run):
    for run in (digits_run, table_run):
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert entries
        assert not [entry for entry in entries if "warning" in entry]


def test_a_flow_that_learns_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(glow(), stripes(64), validation=stripes(32, seed=1), **QUICK, steps=60)
        assert result.warnings == []
        assert fit(tabular(), ROWS, validation=ROWS[:20], **QUICK, steps=60).warnings == []


def saturated():
    torch.manual_seed(0)
    sides = ("first", "second")
    layers = [N.AffineCoupling(N.MLP(1, 8, 2), scale_map=ScaleMap("tanh", clamp=1.0), identity=s) for s in sides]
    with torch.no_grad():
        layers[1].conditioner.last.bias[1].fill_(50.0)
    return N.Flow(N.Chain(N.ActNorm(2), *layers), N.StandardNormal(2))


def test_a_saturated_map_is_told_once_with_its_layer(tmp_path):
    options = {**QUICK, "steps": 10, "run": tmp_path / "run"}
    with pytest.warns(UserWarning, match=r"saturated") as told:
        result = fit(saturated(), ROWS, validation=ROWS[:20], **options)
    assert len(told) == 1, "at the first validation and not again at the second"
    sentence = str(told[0].message)
    assert "100% of the scales of bijection.layers.2 (AffineCoupling) are saturated" in sentence
    assert "its tanh map" in sentence
    assert result.warnings == [sentence]
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [entry for entry in entries if "warning" in entry]
    assert found == [{"step": 5, "fault": "saturated", "layer": "bijection.layers.2", "warning": sentence}]
    with warnings.catch_warnings():  # nor when it is taken up again
        warnings.simplefilter("error")
        again = fit(saturated(), ROWS, validation=ROWS[:20], run=tmp_path / "run", resume=True, steps=15)
    assert again.warnings == [sentence]


def test_layers_with_one_fault_are_told_in_one_line():
    torch.manual_seed(0)
    layers = [N.AffineCoupling(N.MLP(1, 8, 2), scale_map=ScaleMap("tanh", clamp=1.0)) for _ in range(6)]
    with torch.no_grad():
        for layer in layers:
            layer.conditioner.last.bias[1].fill_(50.0)
    flow = N.Flow(N.Chain(*layers), N.StandardNormal(2))
    with pytest.warns(UserWarning, match="saturated") as told:
        result = fit(flow, ROWS, validation=ROWS[:20], **QUICK, steps=5)
    (sentence,) = [str(warning.message) for warning in told if not str(warning.message).startswith("the loss rose")]
    names = [f"bijection.layers.{at}" for at in range(6)]
    assert f"of {names[0]} (AffineCoupling) are saturated" in sentence
    assert f", and so it is in 5 more ({', '.join(names[1:4])} and 2 more); try a lower" in sentence
    found = [entry for entry in result.history if entry.get("fault") == "saturated"]
    assert [entry["layer"] for entry in found] == names, "each is remembered by itself"
    assert all(f"{entry['layer']} (AffineCoupling) are saturated" in entry["warning"] for entry in found)


def test_a_dead_level_is_told_and_named():
    flow = glow()
    flow.bijection[1].levels[0].layers.append(N.Inverse(Tiny()))
    with pytest.warns(UserWarning, match=r"level 1 is dead: the latents of bijection.layers.1.levels.0 do not change"):
        fit(flow, stripes(64), **QUICK, steps=5)


class Tiny(N.Bijection):
    def forward(self, x, context=None, *, lengths=None):
        return x * 1e5, x.new_zeros(len(x))

    def inverse(self, z, context=None, *, lengths=None):
        return z / 1e5, z.new_zeros(len(z))


class Turns(N.ActNorm):
    """From its given step on, its output is multiplied by a factor."""

    def __init__(self, features: int, at: int, factor: float) -> None:
        super().__init__(features)
        self.at, self.factor, self.count = at, factor, 0

    def forward(self, x, context=None, *, lengths=None):
        z, logdet = super().forward(x, context, lengths=lengths)
        self.count += self.training
        return (z * self.factor if self.count > self.at else z), logdet


def turning(at, factor):
    torch.manual_seed(0)
    layers = [N.AffineCoupling(N.MLP(1, 8, 2), identity=side) for side in ("first", "second")]
    return N.Flow(N.Chain(layers[0], Turns(2, at, factor), layers[1]), N.StandardNormal(2))


def test_a_loss_that_explodes_names_the_layer():
    with pytest.warns(UserWarning, match="the loss rose from") as told:
        fit(turning(7, 1e3), ROWS, **{**QUICK, "validate_every": 100}, steps=12)
    sentence = str(told[0].message)
    assert "most happens in bijection.layers.1 (Turns)" in sentence
    assert "--lr" in sentence


def test_losses_that_are_not_finite_name_the_layer():
    with pytest.raises(TrainingError) as error, pytest.warns(UserWarning, match=r"\(Turns\) is not finite"):
        fit(turning(7, float("nan")), ROWS, **QUICK, steps=40)
    assert "not finite in 10 steps in a row" in str(error.value)
    assert "(the output of bijection.layers.1 (Turns) is not finite" in str(error.value)


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * torch.nan


class BadBackward(N.ActNorm):
    def forward(self, x, context=None, *, lengths=None):
        z, logdet = super().forward(x, context, lengths=lengths)
        return BadGradient.apply(z), logdet


def test_gradients_that_are_not_finite_name_their_parameter():
    flow = N.Flow(N.Chain(N.ActNorm(2), BadBackward(2), N.ActNorm(2)), N.StandardNormal(2))
    with pytest.raises(TrainingError, match=r"\(the gradient of bijection.layers.1.(bias|log_scale) is not finite\)"):
        fit(flow, ROWS, **QUICK, steps=40)


class Singular(N.ActNorm):
    def forward(self, x, context=None, *, lengths=None):
        if bool(self.log_scale.detach().abs().max() > 1e9):
            raise ValueError("the matrix is singular")
        return super().forward(x, context, lengths=lengths)


def test_a_layer_that_breaks_is_named():
    flow = N.Flow(N.Chain(N.ActNorm(2), Singular(2)), N.StandardNormal(2))

    def breaks(progress):
        with torch.no_grad():
            flow.bijection[1].log_scale.fill_(1e10)

    with pytest.raises(TrainingError, match=r"broke at step 2 in bijection.layers.1: the matrix is singular"):
        fit(flow, ROWS, **QUICK, steps=5, callback=breaks)


def test_the_run_is_the_same_with_the_looks(monkeypatch):
    from nfkernels.training import trainer

    def run():
        flow = glow(dropout=0.3)
        history = fit(flow, stripes(64), validation=stripes(32, seed=1), **QUICK, steps=11).history
        return history, flow.state_dict()

    history, state = run()
    monkeypatch.setattr(trainer.Trainer, "look", lambda self: None)
    other, same = run()
    assert history == other
    assert all(torch.equal(value, same[name]) for name, value in state.items())


def test_no_look_is_worth_a_run(monkeypatch):
    from nfkernels.training import watch

    def fails(*_):
        raise RuntimeError("a defect of the diagnosis")

    monkeypatch.setattr(watch, "diagnose", fails)
    assert fit(tabular(), ROWS, validation=ROWS[:20], **QUICK, steps=10).step == 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("arguments", [[], ["--data", "{people}", "--context", "kind"]], ids=["digits", "table"])
def test_whole_default_runs_say_nothing(arguments, people, elsewhere, capsys):
    from nfkernels import cli

    assert cli.main(["train", *(a.format(people=people) for a in arguments), "--out", "run"]) == 0
    assert "warning" not in capsys.readouterr().err
    with open("run/metrics.jsonl") as file:
        assert "warning" not in file.read()
