"""kill -9, whenever it comes, costs the steps since the last checkpoint, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import assert_same_run
from tiny import QUICK, glow, stripes

from nfkernels._atomic import atomic_write, remove_unfinished
from nfkernels.training import RunFolder, fit, run_folder

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["places", pytest.param("moments", marks=pytest.mark.exhaustive)])
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path, way):
    straight = {**QUICK, "steps": 40, "patience": 100, "run": tmp_path / "straight"}
    fit(glow(), stripes(40), validation=stripes(10, seed=1), **straight)
    command = [sys.executable, str(HERE / "killed.py"), str(tmp_path / "killed"), way]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    facts = json.loads(told.stdout)
    assert facts["kills"] == 14 if way == "places" else facts["kills"] >= 6
    assert facts["found"] == sorted(facts["found"])  # nothing that was saved is ever lost
    assert facts["found"][-1] == 40
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "straight"))


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(tmp_path, monkeypatch):
    order = []
    flush, replace = run_folder.flush, os.replace
    monkeypatch.setattr(run_folder, "flush", lambda path: (order.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", Path(b).name)), replace(a, b)))
    fit(glow(), stripes(16), run=tmp_path / "run", steps=3, **QUICK)
    last = len(order) - 1 - order[::-1].index(("replace", "checkpoint.safetensors"))
    assert order[last - 1] == ("flush", "metrics.jsonl")


def test_unfinished_files_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        left = temporary.with_name(temporary.name[:-12] + "0123abcd.tmp")
    left.write_text("half")
    others = [tmp_path / ".checkpoint.safetensors.mine.tmp", tmp_path / ".model.safetensors.0123abcd.tmp"]
    for other in others:
        other.write_text("kept")
    remove_unfinished(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_new_folder_is_on_the_disk_before_the_run_begins(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(run_folder, "flush_folder", flushed.append)
    RunFolder(tmp_path / "a" / "b").begin()
    assert set(flushed) == {tmp_path, tmp_path / "a"}
