"""fit: it learns, it repeats itself, it stops when it should, and a bad step changes nothing."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from tiny import QUICK, glow, stripes, tabular
from torch.utils._python_dispatch import TorchDispatchMode

from nfkernels.nn import load
from nfkernels.training import DataError, Recipe, TrainingError, evaluate, fit
from nfkernels.training.evaluation import mean_loss
from nfkernels.training.optim import Optimizer
from nfkernels.training.samples import as_samples
from nfkernels.training.trainer import _VALIDATION, Trainer


def weights(flow):
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_images_and_keeps_the_best_weights(tmp_path):
    flow, validation = glow(dropout=0.0), stripes(64, seed=1)
    seen = []
    result = fit(
        flow,
        stripes(256),
        validation=validation,
        run=tmp_path / "run",
        callback=lambda now: seen.append(dataclasses.replace(now)),
        **QUICK | {"steps": 300, "validate_every": 100, "batch_size": 32, "lr": 0.02, "weight_decay": 0.0},
    )
    assert (result.step, result.stopped, result.unit) == (300, "steps", "bits/dim")
    assert result.best < 1.81  # uniform: log2 5 = 2.32; independent pixels of these: 1.83
    assert not flow.training
    # Flow and file hold the averaged weights of the best validation, and the number is theirs.
    generator = torch.Generator().manual_seed(_VALIDATION)
    samples = as_samples(validation, flow)
    assert mean_loss(flow, samples, draws=QUICK["validation_draws"], generator=generator) == result.best
    assert same(weights(load(tmp_path / "run" / "model.safetensors")), weights(flow))
    assert [now.step for now in seen] == list(range(1, 301))
    assert seen[-1].loss is not None
    assert seen[-1].per_second > 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert entries == result.history
    assert sum("validation_bpd" in entry for entry in entries) == 3
    assert not any("second" in key for entry in entries for key in entry)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["steps"] == 300


def test_equal_arguments_give_equal_runs_and_leave_global_randomness_alone(tmp_path):
    ends = []
    for name, seed, disturbance in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        flow = glow()
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        fit(flow, stripes(40), validation=stripes(10, seed=1), run=tmp_path / name, seed=seed, steps=12, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append((weights(flow), (tmp_path / name / "metrics.jsonl").read_bytes()))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert ends[0][1] != ends[2][1]


def test_tabular_flows_train_in_nats_with_and_without_context():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2, generator=generator) * 4 + 2
    options = QUICK | {"steps": 200, "validate_every": 50, "batch_size": 64, "lr": 0.05, "weight_decay": 0.0}
    flow = tabular()
    result = fit(flow, x[:448], validation=x[448:], **options)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(4))  # what the best flow has, in expectation
    assert result.unit == "nats"
    assert abs(result.best - entropy) < 0.3
    assert result.best == pytest.approx(evaluate(flow, x[448:]).mean, abs=1e-5)
    assert "validation_nll" in result.history[-1]

    side = torch.randint(0, 2, (512, 1), generator=generator).float()
    flow = tabular(context=1)
    y = x + 20 * side
    assert fit(flow, (y, side), **options).best is None  # nothing to validate on
    assert evaluate(flow, (y, 1 - side)).mean > evaluate(flow, (y, side)).mean + 2


def test_classes_reach_the_flow():
    data = stripes(64, labels=True)
    flow = glow(classes=2)
    fit(flow, data, steps=30, **QUICK)
    right = evaluate(flow, data, draws=4).mean
    swapped = dataclasses.replace(data, labels=1 - data.labels)
    assert evaluate(flow, swapped, draws=4).mean > right + 0.01
    with pytest.raises(DataError, match="no labels"):
        fit(glow(classes=2), stripes(8), steps=1)


def test_stops_early_when_validation_stands_still():
    result = fit(glow(), stripes(16), validation=stripes(8), steps=50, ema=0.0, patience=2, **QUICK | {"lr": 1e-30})
    # Nothing changes: the first validation is the best, two later ones are not better.
    assert (result.stopped, result.step, result.best_step) == ("early", 15, 5)


def test_callback_and_signals_stop_after_the_step(tmp_path):
    stopped = fit(glow(), stripes(16), steps=50, callback=lambda now: now.step == 4, run=tmp_path / "a", **QUICK)
    assert (stopped.stopped, stopped.step, stopped.signal) == ("callback", 4, None)

    before = signal.getsignal(signal.SIGINT)

    def interrupt(now):
        if now.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = fit(glow(), stripes(16), steps=50, callback=interrupt, signals=True, run=tmp_path / "b", **QUICK)
    assert (stopped.stopped, stopped.step, stopped.signal) == ("signal", 3, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    for name in ("a", "b"):
        assert (tmp_path / name / "checkpoint.safetensors").exists()
        assert (tmp_path / name / "model.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):  # not asked to look after signals: Python's own behaviour
        fit(glow(), stripes(16), steps=50, callback=interrupt, **QUICK)


def test_a_signal_before_the_first_step_is_heeded(tmp_path, monkeypatch, capfd):
    begin = Trainer.begin

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        begin(self)

    monkeypatch.setattr(Trainer, "begin", interrupted)
    options = {"steps": 6, "run": tmp_path / "run", **QUICK}
    stopped = fit(glow(), stripes(16), signals=True, **options)
    assert (stopped.stopped, stopped.step) == ("signal", 0)
    assert "stopping after this step; again to quit at once\n" in capfd.readouterr().err
    assert fit(glow(), stripes(16), resume=True, **options).step == 6


class Breaking:
    """Makes the loss of chosen training steps not finite."""

    def __init__(self, flow, monkeypatch, steps):
        self.calls, self.steps, self.nll = 0, steps, flow.nll
        monkeypatch.setattr(flow, "nll", self, raising=False)

    def __call__(self, *args, **kwargs):
        loss = self.nll(*args, **kwargs)
        self.calls += 1  # the first call is the data-dependent start
        return loss * float("nan") if self.calls - 1 in self.steps else loss


def test_a_step_without_a_finite_loss_is_skipped(monkeypatch):
    flow, seen = glow(), []
    Breaking(flow, monkeypatch, {3})
    result = fit(flow, stripes(16), steps=6, callback=lambda now: seen.append(weights(flow)), **QUICK)
    assert same(seen[1], seen[2])  # steps 2 and 3
    assert not same(seen[2], seen[3])
    assert all(torch.isfinite(tensor).all() for tensor in flow.state_dict().values() if tensor.is_floating_point())
    first, second = result.history[0], result.history[1]
    assert (first["step"], first["skipped"]) == (3, 1)
    assert first["bpd"] == pytest.approx(second["bpd"], abs=1.0)  # the mean of the finite ones


def test_ten_bad_steps_in_a_row_end_the_run_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    flow = glow()
    Breaking(flow, monkeypatch, {2, *range(8, 18)})
    with pytest.raises(TrainingError, match=r"10 steps in a row before step 18.*checkpoint of step 15 is kept.*--lr"):
        fit(flow, stripes(16), validation=stripes(8), steps=50, run=tmp_path / "run", **QUICK)
    flow = glow()
    Breaking(flow, monkeypatch, {*range(2, 11), *range(12, 20)})  # nine, then eight: no ten in a row
    assert fit(flow, stripes(16), steps=24, **QUICK).history[-1]["skipped"] == 17


def test_a_step_never_waits_for_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                Reads.count += 1
            return func(*args, **(kwargs or {}))

    flow = tabular()
    optimizer = Optimizer(flow, Recipe(ema=0.9, clip=1.0))
    x = torch.randn(8, 2)
    for step in range(2):  # the first step makes Adam's state
        loss = flow.nll(x)
        loss.backward()
        with Reads():
            optimizer.step(loss, step)
    assert Reads.count == 0


def test_weights_of_networks_decay_and_nothing_else():
    flow = glow(classes=2)
    optimizer = Optimizer(flow, Recipe(weight_decay=0.5))
    names = {id(p): name for name, p in flow.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)].rpartition(".")[2] for p in group["params"]}
        for group in optimizer.adam.param_groups
    }
    assert groups[0.5] == {"weight1", "weight2", "weight3"}
    assert {"lower", "upper", "log_s", "log_scale", "bias", "table"} <= groups[0.0]
    matrices, vectors = Optimizer(tabular(), Recipe()).adam.param_groups
    assert all(p.dim() == 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match="no option step"):
        fit(glow(), stripes(4), step=3)
    with pytest.raises(ValueError, match=r"^steps is 0"):
        fit(glow(), stripes(4), steps=0)
    with pytest.raises(TypeError, match="needs the folder"):
        fit(glow(), stripes(4), resume=True)
    with pytest.raises(DataError, match="list"):
        fit(glow(), [1, 2])
    with pytest.raises(DataError, match="stripes has 256 grey levels, the flow was built for 5"):
        fit(glow(), dataclasses.replace(stripes(4), grey_levels=256))
    with pytest.raises(DataError, match="no samples"):
        fit(tabular(), torch.zeros(0, 2))
    bad = torch.zeros(4, 2)
    bad[1, 1] = torch.inf
    with pytest.raises(DataError, match="1 of 8 values are not finite"):
        fit(tabular(), bad)
    with pytest.raises(DataError, match="4 samples but 3 contexts"):
        fit(tabular(), (torch.zeros(4, 2), torch.zeros(3, 1)))
