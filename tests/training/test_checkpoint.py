"""A run is continued bit for bit, or refused in a sentence; what is on the disk survives whatever goes wrong."""

import errno
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import QUICK, glow, stripes, tabular

from nfkernels.models import Glow
from nfkernels.training import TrainingError, checkpoint, fit
from nfkernels.training.checkpoint import load_checkpoint, save_checkpoint

DATA, HELD_OUT = stripes(40), stripes(10, seed=1)


def train(run, flow=None, **options):
    flow = glow() if flow is None else flow
    return flow, fit(flow, DATA, validation=HELD_OUT, run=run, **QUICK | {"steps": 22} | options)


def assert_same_run(a, b, *, config=True):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, other = load_file(a / "checkpoint.safetensors"), load_file(b / "checkpoint.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    facts = [load_checkpoint(run / "checkpoint.safetensors")[1] for run in (a, b)]
    if not config:  # it may well say where the run lies, or when it began
        facts = [{name: fact for name, fact in part.items() if name != "config"} for part in facts]
    assert facts[0] == facts[1]
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stop", [5, 11, 13])  # at a validation; between; in a later epoch (5 batches each)
def test_stop_and_resume_is_the_run_without_the_stop(tmp_path, stop):
    straight, whole = train(tmp_path / "straight")
    train(tmp_path / "parts", callback=lambda now: now.step == stop)
    torch.manual_seed(123)  # whatever the new process has drawn
    resumed, result = train(tmp_path / "parts", glow(seed=9), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert result == whole


def test_resume_after_a_crash_logs_nothing_twice(tmp_path):
    train(tmp_path / "straight")

    def crash(now):
        if now.step == 13:  # logged up to 12, checkpoint of 10
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", callback=crash)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "bp')
    train(tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_the_comparison_would_notice(tmp_path):
    """Dropout, noise and data order all matter to the test above: each is drawn from."""
    train(tmp_path / "a")
    before = load_checkpoint(tmp_path / "a" / "checkpoint.safetensors")[0]["random"]
    train(tmp_path / "a", resume=True, steps=23)
    after = load_checkpoint(tmp_path / "a" / "checkpoint.safetensors")[0]["random"]
    assert {name for name in before if not torch.equal(before[name], after[name])} >= {"cpu", "noise"}


def test_steps_may_be_raised_and_a_finished_run_returns_at_once(tmp_path):
    _, first = train(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    _, again = train(tmp_path / "run", resume=True)
    assert again == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    _, more = train(tmp_path / "run", resume=True, steps=30)
    assert more.step == 30
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(lines)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["steps"] == 30
    with pytest.raises(TrainingError, match="already has 30 steps"):
        train(tmp_path / "run", resume=True, steps=25)


def test_early_stop_is_remembered_and_patience_may_be_raised(tmp_path):
    still = {"lr": 1e-30, "ema": 0.0, "steps": 50}
    _, first = train(tmp_path / "run", patience=1, **still)
    assert (first.stopped, first.step) == ("early", 10)
    _, second = train(tmp_path / "run", resume=True, patience=1, **still)
    assert (second.stopped, second.step) == ("early", 10)
    _, third = train(tmp_path / "run", resume=True, patience=3, **still)
    assert (third.stopped, third.step) == ("early", 20)


def test_another_run_is_refused(tmp_path):
    run = tmp_path / "run"
    train(run)
    with pytest.raises(TrainingError, match=r"already holds a run \(checkpoint.safetensors, .*resume it"):
        train(run)
    with pytest.raises(TrainingError, match=r"lr 0.1 differs from the run's 0.005.*only steps and patience"):
        train(run, resume=True, lr=0.1)
    with pytest.raises(TrainingError, match="the train data is not what"):
        fit(glow(), stripes(40, seed=5), validation=HELD_OUT, run=run, resume=True, steps=30)
    with pytest.raises(TrainingError, match="the validation data is not what"):
        fit(glow(), DATA, run=run, resume=True, steps=30)
    with pytest.raises(TrainingError, match="is of another flow"):
        train(run, Glow((1, 4, 4), levels=1, steps=2, hidden=12, grey_levels=5), resume=True, steps=30)
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(tmp_path / "nowhere", resume=True)


def facts(**changes):
    """A description that is whole."""
    best = {"loss": None, "step": 0, "stale": 0, "latest": None}
    order = {"epoch": 0, "position": 0, "images": 40}
    parts = {"step": 0, "recipe": {}, "best": best, "order": order, "data": {}, "metrics_size": 0, "config": {}}
    return parts | {"ranks": 1} | changes


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": None},
        {"step": -1},
        {"step": True},
        {"data": None},
        {"config": None},
        {"recipe": [1]},
        {"best": {"loss": "x"}},
        {"order": {"epoch": 0, "position": "x", "images": 40}},
        {"order": {"epoch": 0, "position": -7, "images": 40}},
        {"order": {"epoch": 0, "position": 41, "images": 40}},
        {"metrics_size": -3},
        {"ranks": 0},
    ],
    ids=str,
)
def test_a_description_with_wrong_values_is_refused(tmp_path, change):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"a": {"x": torch.zeros(1)}}, facts())
    load_checkpoint(path)
    save_checkpoint(path, {"a": {"x": torch.zeros(1)}}, facts(**change))
    with pytest.raises(TrainingError, match=f"is damaged: its description has no usable '{next(iter(change))}'"):
        load_checkpoint(path)


def test_a_description_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"nfkernels_checkpoint": '{"version": 1, "a": ' + "[" * 100_000})
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(path)


def test_a_run_killed_before_its_first_validation_can_be_resumed(tmp_path):
    train(tmp_path / "straight")

    def killed(now):
        if now.step == 3:  # the first validation, and with it a checkpoint, is at 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", callback=killed)
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")[1]["step"] == 0
    train(tmp_path / "parts", glow(seed=9), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_a_flow_that_cannot_be_saved_leaves_no_run_behind(tmp_path):
    flow = glow()
    flow.save = lambda path: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", flow)
    train(tmp_path / "run")


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("a pickle was executed",))


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "pickle", "torch", "foreign", "version", "description"])
def test_damaged_and_foreign_checkpoints_are_one_sentence(tmp_path, kind):
    run = tmp_path / "run"
    train(run, steps=5)
    path = run / "checkpoint.safetensors"
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch":
        torch.save({"a": Bomb()}, path)
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    else:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["nfkernels_checkpoint"])
        text = json.dumps(facts | {"version": 99}) if kind == "version" else "{"
        save_file(load_file(path), path, {"nfkernels_checkpoint": text})
    what = r"of a newer nfkernels \(checkpoint version 99, .*update nfkernels" if kind == "version" else ""
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is " + what) as caught:
        train(run, resume=True, steps=10)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_older_version_is_continued(tmp_path):
    """``data/version_1`` was stopped at step 11 by the code that wrote checkpoints of version 1."""
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "data" / "version_1", run)
    tensors, facts = load_checkpoint(run / "checkpoint.safetensors")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    seen = []
    flow = glow(seed=9)

    def first(now):
        if now.step == 12:
            seen.extend(flow.state_dict().items())

    _, result = train(run, flow, resume=True, callback=first)
    assert (facts["step"], result.step, facts["ranks"]) == (11, 22, 1)
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(lines)] == lines
    steps = [entry["step"] for entry in result.history if "bpd" in entry]
    assert steps == [*range(3, 22, 3), 22]
    assert result.best < facts["best"]["loss"]
    for name, tensor in seen:  # one step away from the weights that were read
        assert tensor.float().sub(tensors["flow"][name].float()).abs().max() < 0.5, name
    assert load_checkpoint(run / "checkpoint.safetensors")[1]["step"] == 22


def test_missing_parts_of_a_checkpoint_are_one_sentence(tmp_path):
    run = tmp_path / "run"
    train(run, steps=5)
    path = run / "checkpoint.safetensors"
    tensors, facts = load_checkpoint(path)
    for group in ("optimizer", "random", "window", "flow"):
        save_checkpoint(path, {name: part for name, part in tensors.items() if name != group}, facts)
        with pytest.raises(TrainingError, match="is not a checkpoint of this run"):
            train(run, resume=True, steps=10)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real, saved = checkpoint.save_file, []

    def full(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 3:  # after those of step 0 and 5
            path.write_bytes(b"half a checkpoint")
            raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    sentence = (
        r"checkpoint\.safetensors cannot be written \(No space left on device\).*step 10; the checkpoint of step 5 is"
    )
    with pytest.raises(TrainingError, match=sentence):
        train(run)
    assert load_checkpoint(run / "checkpoint.safetensors")[1]["step"] == 5
    assert not list(run.glob(".*.tmp"))
    monkeypatch.setattr(checkpoint, "save_file", real)
    train(tmp_path / "straight")
    train(run, resume=True)
    assert_same_run(tmp_path / "straight", run)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_while_logging_is_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "timing.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"timing\.jsonl cannot be written \(No space left on device\)"):
        train(tmp_path / "run")


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    written = facts(step=1)
    save_checkpoint(tmp_path / "file", {"a": {"x": shared, "y": shared[:2]}, "b": {"x": shared}}, written)
    groups, read = load_checkpoint(tmp_path / "file")
    assert read == written
    assert torch.equal(groups["a"]["y"], shared[:2])
    assert torch.equal(groups["b"]["x"], shared)


def test_tabular_runs_resume_too(tmp_path):
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for name in ("straight", "parts"):
        stop = name == "parts"
        options = QUICK | {"steps": 12, "run": tmp_path / name}
        fit(tabular(), x, callback=lambda now, stop=stop: stop and now.step == 7, **options)
        if stop:
            fit(tabular(seed=1), x, resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
