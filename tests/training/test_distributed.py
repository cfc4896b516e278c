"""Two processes train as one would: the same losses, the same weights on both, one voice, and no rank left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Process
from ranks import CASES, run
from test_checkpoint import assert_same_run
from tiny import stripes

from nfkernels.cli import main
from nfkernels.training import DataError, RunFolder, TrainingError, distributed
from nfkernels.training.batches import Batches
from nfkernels.training.checkpoint import read_facts
from nfkernels.training.distributed import Ranks, device_of, launched

HERE = Path(__file__).parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**said):
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | said


def start(*command, world=2, cwd=None, store=None, restarts=0):
    """One process per rank, in the environment that torchrun gives them; the store is kept here, as torchrun does."""
    store = store or torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parts = []
    for rank in range(world):
        said = dict(zip(VARIABLES, map(str, (rank, world, rank, "127.0.0.1", store.port)), strict=True))
        said |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        parts.append(Process([*command], env=environment(**said), cwd=cwd))
        parts[-1].store = store
    return parts


def ended(parts, timeout=240):
    """What the processes left: ``[(status, out, err)]``."""
    try:
        told = [part.communicate(timeout=timeout) for part in parts]
        return [(part.returncode, *text) for part, text in zip(parts, told, strict=True)]
    finally:
        for part in parts:
            part.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every case trained by two processes, in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    for status, _, err in ended(start(str(HERE / "ranks.py"), str(folder), *CASES, "resumed")):
        assert status == 0, err[-3000:]
    return folder


def results(folder, case):
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "dropout"])
def test_two_processes_train_like_one(two, case):
    """The same batches, noise and flips: only sums are rounded in another order."""
    alone, pair = run(case, None), results(two, case)
    assert len(alone["history"]) == len(pair[0]["history"])
    for one, other in zip(alone["history"], pair[0]["history"], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            close = 1e-6 if key.startswith("validation") else 1e-5
            assert other[key] == pytest.approx(one[key], rel=close, abs=close), (one, other)
    assert pair[0]["best"] == pytest.approx(alone["best"], rel=1e-6)
    for name, values in alone["weights"].items():
        assert pair[0]["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_all_ranks_end_with_the_same_bits_and_the_main_one_writes(two, case):
    first, second = results(two, case)
    assert first == second
    assert [json.loads(line) for line in (two / case / "metrics.jsonl").read_text().splitlines()] == first["history"]


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_resume_bit_for_bit(two):
    """One of the two had the wish to stop; each has its own dropout, and takes it up where it was."""
    assert_same_run(two / "dropout", two / "resumed")
    facts = json.loads((two / "resumed-0.json").read_text())
    assert facts["step"] == json.loads((two / "resumed-1.json").read_text())["step"] == 12


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(two):
    more = run("plain", two / "plain", resume=True, steps=15)
    assert more["step"] == 15
    losses = [entry["bpd"] for entry in more["history"] if "bpd" in entry]
    assert len(losses) == 5
    assert losses[-1] == pytest.approx(losses[-2], abs=0.5)


# --- the command line -----------------------------------------------------------------------------------------------

TINY = ("--depth", "1", "--width", "8", "--log-every", "5", "--validate-every", "10", "--batch-size", "32")


@pytest.mark.slow
def test_the_command_speaks_once_and_names_the_run_once(tmp_path):
    parts = start("-m", "nfkernels", "train", "--steps", "20", *TINY, cwd=tmp_path)
    (status, out, _), (other, silent, err) = ended(parts)
    assert (status, other) == (0, 0), err
    assert (silent, err) == ("", "")
    assert os.listdir(tmp_path / "runs") == ["digits-1"]
    assert "in 2 processes" in out
    assert "bits per dimension on" in out
    run = tmp_path / "runs" / "digits-1"
    assert sum("test_bpd" in line for line in (run / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--batch-size", "33"), "2 ranks"),
        pytest.param(("--steps", "x"), "--steps", marks=pytest.mark.exhaustive),
    ],
)
def test_a_mistake_is_told_once(tmp_path, options, sentence):
    told = ended(start("-m", "nfkernels", "train", "--steps", "20", *TINY, *options, cwd=tmp_path))
    assert all(status in (1, 2) for status, _, _ in told)
    lines = [line for _, _, err in told for line in err.splitlines() if line]
    assert len(lines) == 1, lines
    assert sentence in lines[0]


BROKEN = """
import os, signal, sys
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT")
from nfkernels.cli import main
from nfkernels.training.trainer import Trainer
step = Trainer.step
def steps(self):
    if self.at == 7 and self.ranks.rank == 1:
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if sys.argv[1] == "raise":
            raise OSError(28, "No space left on device", "somewhere")
    step(self)
Trainer.step = steps
if __name__ == "__main__":
    raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "raise", "interrupt"])
def test_what_happens_to_one_happens_to_all(tmp_path, way):
    (tmp_path / "broken.py").write_text(BROKEN)
    began = time.monotonic()
    told = ended(start("broken.py", way, "train", "--steps", "20", *TINY, "--out", "run", cwd=tmp_path))
    assert time.monotonic() - began < 200
    lines = [line for _, _, err in told for line in err.splitlines() if line and not line.startswith("step ")]
    if way == "interrupt":
        assert [status for status, _, _ in told] == [130, 130]
        assert lines == []
        facts = read_facts(tmp_path / "run" / "checkpoint.safetensors")
        assert facts["step"] == 8
        return
    assert told[0][0] == 1
    assert told[1][0] == (-signal.SIGKILL if way == "kill" else 1)
    assert len(lines) == 1, lines
    assert ("somewhere: No space left" if way == "raise" else "rank 0 of 2 lost the others") in lines[0]
    assert read_facts(tmp_path / "run" / "checkpoint.safetensors")["step"] == 0


KILLED_LATER = BROKEN.replace("self.at == 7", "RESTARTED == '0' and self.at == 17")
KILLED_OPTIONS = ["train", "--steps", "25", *TINY, "--dropout", "0"]


def check_what_was_started_again(out):
    """Nobody gave the run a name: those who came later knew it; and it ends as a run that nothing happened to."""
    assert os.listdir("runs") == ["digits-1"]
    assert out.count("run    runs/digits-1") == 2
    assert main([*KILLED_OPTIONS, "--out", "whole", "--quiet"]) == 0
    one, other = (RunFolder(path).history() for path in ("whole", "runs/digits-1"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other]
    for entry, again in zip(one, other, strict=True):
        assert again == pytest.approx(entry, rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_that_is_started_again_ends_as_it_would_have(tmp_path, monkeypatch):
    """By the environment that torchrun gives to what it starts, once and again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(KILLED_LATER)
    first = start("broken.py", "kill", *KILLED_OPTIONS)
    told = ended(first)
    assert [status for status, _, _ in told] == [1, -signal.SIGKILL], told
    again = ended(start("broken.py", "kill", *KILLED_OPTIONS, store=first[0].store, restarts=1))
    assert [status for status, _, _ in again] == [0, 0], again
    check_what_was_started_again("".join(out for _, out, _ in told + again))


@pytest.mark.exhaustive
def test_torchrun_starts_a_killed_worker_again_and_the_run_ends_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(KILLED_LATER)
    command = ["-m", "torch.distributed.run", "--max-restarts=2", "--nproc-per-node=2", f"--master-port={free_port()}"]
    told = subprocess.run(
        [sys.executable, *command, "broken.py", "kill", *KILLED_OPTIONS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    check_what_was_started_again(told.stdout)


# --- one process ----------------------------------------------------------------------------------------------------


def test_shares_are_the_rows_of_the_whole_batch():
    data = stripes(21, labels=True)
    whole = Batches(data, 6, seed=0)
    shares = [Batches(data, 6, seed=0, rank=rank, world=3) for rank in range(3)]
    for _ in range(9):  # three epochs, with three images left over in each
        images, labels = whole.next()
        parts = [share.next() for share in shares]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        assert all(len(part[0]) == 2 for part in parts)
    states = [share.state_dict() for share in (whole, *shares)]
    assert all(torch.equal(states[0]["generator"], state["generator"]) for state in states)
    assert len({(state["epoch"], state["position"]) for state in states}) == 1
    resumed = Batches(data, 6, seed=5, rank=1, world=2)
    resumed.load_state_dict(states[0])
    assert torch.equal(resumed.next()[0], whole.next()[0][3:])


def test_small_sets_and_odd_batches_among_ranks():
    shares = [Batches(stripes(7), 100, seed=0, rank=rank, world=2) for rank in (0, 1)]
    assert [len(share.next()[0]) for share in shares] == [3, 3]
    with pytest.raises(DataError, match=r"batch size 7: 2 processes cannot share it evenly, try 8"):
        Batches(stripes(9), 7, seed=0, world=2)
    with pytest.raises(DataError, match="2 images are too few for 3 processes"):
        Batches(stripes(2), 6, seed=0, world=3)


def test_shares_cover_whatever_there_is():
    for count in (0, 1, 5, 512):
        rows = [list(range(count))[Ranks(rank, 3).share(count)] for rank in range(3)]
        assert sum(rows, []) == list(range(count))  # noqa: RUF017


def test_a_single_process_asks_nobody(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_store", lambda ranks: 1 / 0)
    ranks = launched()
    assert ranks == Ranks()
    assert ranks.most([3, 0]) == [3, 0]
    assert ranks.from_main({"a": 1}) == {"a": 1}
    with distributed.started("cpu") as ranks:
        assert ranks == Ranks()
    assert distributed.remembered(ranks, "run") is None
    distributed.remember(ranks, "run", "x")
    with pytest.raises(ZeroDivisionError), ranks.together():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "2"}, "RANK is 2 and its WORLD_SIZE 2"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is ''"),
        ({"MASTER_PORT": None}, "no MASTER_PORT: start the processes with torchrun"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told(monkeypatch, said, sentence):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | said).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=sentence):
        launched()


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(Ranks(), "cuda:1") == torch.device("cuda:1")
    assert device_of(Ranks(1, 2, 1), "cpu") == torch.device("cpu")
    assert device_of(Ranks(3, 4, 1), "cuda") == device_of(Ranks(3, 4, 1), "cuda:0") == torch.device("cuda:1")
    with pytest.raises(TrainingError, match="cuda:3 with 4 processes: ask for cuda"):
        device_of(Ranks(0, 4, 0), "cuda:3")
    with pytest.raises(TrainingError, match=r"2 GPUs and at least 3 processes.*--nproc-per-node=2"):
        device_of(Ranks(2, 3, 2), "cuda")
