"""nfkernels train as a stranger meets it: what it writes, what it says, what it refuses, how it goes on."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, copied, refused

for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.nn import load  # noqa: E402
from nfkernels.training import commands, finished  # noqa: E402
from nfkernels.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_train_writes_a_run_and_says_what_came_out(capsys):
    assert cli.main(["train", *QUICK]) == 0
    said = capsys.readouterr()
    for part in (
        "1350 images to train on, 150 for validation, 297 for the test (8 x 8, grey, 17 levels)",
        "this flow",
        "independent pixels  2.436",
        "uniform             4.087",
        "nfkernels sample runs/digits-1",
    ):
        assert part in said.out
    assert "step 3/6, bpd " in said.err
    files = sorted(os.listdir("runs/digits-1"))
    assert files == [
        "checkpoint.safetensors",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "samples.png",
        "timing.jsonl",
    ]
    with open("runs/digits-1/metrics.jsonl") as file:
        entries = [json.loads(line) for line in file]
    assert [entry["step"] for entry in entries] == [2, 3, 4, 6, 6, 6]
    assert f"{entries[-1]['test_bpd']:.3f} +- {entries[-1]['test_standard_error']:.3f}" in said.out
    config = json.loads(Path("runs/digits-1/config.json").read_text())
    assert config["data"]["images"] == [1350, 150, 297]
    assert config["model"]["levels"] == 2

    # The same again: the next folder, and the same metrics to the last bit.
    assert cli.main(["train", *QUICK, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert Path("runs/digits-2/metrics.jsonl").read_bytes() == Path("runs/digits-1/metrics.jsonl").read_bytes()


def test_a_folder_of_pictures_and_missing_packages(capsys, monkeypatch):
    from PIL import Image

    os.mkdir("pictures")
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        values = torch.randint(0, 256, (6, 5, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(f"pictures/{index}.png")
    assert cli.main(["train", *QUICK, "--data", "pictures", "--size", "8x4", "--levels", "1", "--batch-size", "4"]) == 0
    assert "pictures: 10 images to train on, 1 for validation, 1 for the test (8 x 4, RGB, 256 levels)" in (
        capsys.readouterr().out
    )
    assert cli.main(["evaluate", "runs/pictures-1", "--draws", "1"]) == 0
    for module in ("matplotlib", "PIL", "tqdm", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
        assert 'pip install "nfkernels[train]"' in refused(capsys, "train", *QUICK, "--progress", "bar")
        monkeypatch.undo()


def test_resume_finishes_what_was_stopped(capsys, monkeypatch):
    assert cli.main(["train", *QUICK, "--out", "straight"]) == 0
    real = commands.fit

    def stopped(*arguments, **options):
        def interrupt(now):
            if now.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(*arguments, callback=interrupt, **options)

    monkeypatch.setattr(commands, "fit", stopped)
    capsys.readouterr()
    assert cli.main(["train", *QUICK, "--out", "parts"]) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after 4 steps; everything is saved" in said
    assert "nfkernels train --resume parts" in said
    monkeypatch.setattr(commands, "fit", real)
    assert not os.path.exists("parts/loss.png")
    for _ in range(2):  # a finished run may be resumed, too: it evaluates again
        assert cli.main(["train", "--resume", "parts"]) == 0
        assert Path("parts/metrics.jsonl").read_bytes() == Path("straight/metrics.jsonl").read_bytes()
    assert os.path.exists("parts/loss.png")


def test_resume_refuses_another_run(capsys, digits_run):
    def sentence(*more):
        return refused(capsys, "train", "--resume", digits_run, *more)

    assert "--width 9 differs from the run's 8" in sentence("--width", 9)
    assert "--size 8x16: the run has none" in sentence("--size", "8x16")
    assert "--scale-map exp differs from the run's glow" in sentence("--scale-map", "exp")
    assert "--n-bits 5: the run has none" in sentence("--n-bits", 5)
    assert "the run has --classes" in sentence("--no-classes")
    assert "--betas" in sentence("--betas", "0.5,0.9")
    assert "--batch-size 5 differs from the run's 64" in sentence("--batch-size", 5)
    assert "already has 6 steps" in sentence("--steps", 5)
    assert "leave --out away" in sentence("--out", "x")
    refused(capsys, "train", "--resume", "nowhere")
    assert cli.main(["train", "--resume", str(digits_run), "--depth", "1", "--seed", "0"]) == 0  # nothing new in that
    assert "does not exist" in refused(capsys, "train", "--resume", "nowhere")
    os.mkdir("empty")
    assert "nothing to resume" in refused(capsys, "train", "--resume", "empty")
    assert "give the folder" in refused(capsys, "train", "--resume", digits_run / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "digit"], "digit does not exist: did you mean digits?"),
        (["--data", "two.npy"], "two has 2 images: at least 3 are needed"),
        (["--data", "cut.npy"], "cut.npy"),
        (["--data", "empty"], "empty holds no picture"),
        (["--data", "broken"], "a.png"),
        (["--size", "7"], "cannot be halved, as a level needs: try --size 8x8"),
        (["--size", "12", "--levels", "3"], "halved 3 times, as 3 levels need: try --levels 2 or --size 16x16"),
        (["--depth", "2,3,4"], "--depth has 3 numbers for 2 levels"),
        (["--data", "flat.npy", "--classes"], "flat has no labels"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
        (["--out", "file"], "file is a file: expected a folder for the run"),
        (["--out", "file/run"], "cannot be made: Not a directory"),
        (["--accumulate", "3"], "accumulate is 3: a batch_size of 64 does not split"),
        (["--schedule", "constant", "--lr-end", "0.1"], "a constant learning rate has no end"),
        (["--kernel", "2"], "kernel must be odd"),
        (["--n-bits", "5"], "only sets of 256 can be cut to 5 bits"),
        (["--preset", "glow-cifar10"], "--preset glow-cifar10 needs images: get cifar-10-python.tar.gz from https://"),
        (["--out", "taken"], "taken already holds a run (metrics.jsonl)"),
    ],
)
def test_train_refuses_in_one_sentence(capsys, arguments, sentence):
    import numpy

    os.mkdir("empty")
    os.mkdir("broken")
    Path("broken/a.png").write_text("no picture")
    numpy.save("flat.npy", numpy.zeros((20, 8, 8), numpy.uint8))
    numpy.save("two.npy", numpy.zeros((2, 8, 8), numpy.uint8))
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 8, 8), }"
    header = header.ljust(117) + "\n"
    Path("cut.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    Path("file").touch()
    os.mkdir("taken")
    Path("taken/metrics.jsonl").touch()
    assert sentence in refused(capsys, "train", *QUICK, *arguments)
    assert not os.path.exists("runs")


def test_options_of_the_model_reach_it():
    options = ["--memory", "reversible", "--dequantization", "variational", "--order", "scale_first"]
    sizes = ["--kernel", "1", "--last-kernel", "3", "--class-width", "3", "--scale-map", "nflows", "--classes"]
    assert cli.main(["train", *QUICK, *options, *sizes, "--quiet", "--out", "run"]) == 0
    model = json.loads(Path("run/config.json").read_text())["model"]
    flow = load("run/model.safetensors")
    expected = {
        "memory": "reversible",
        "dequantization": "variational",
        "order": "scale_first",
        "kernel": 1,
        "last_kernel": 3,
        "class_width": 3,
        "scale_map": "nflows",
        "classes": 10,
    }
    assert {name: model[name] for name in expected} == expected
    assert (flow.classes, flow.embed.table.shape, flow.grey_levels) == (10, (10, 3), 17)
    assert flow.dequantizer is not None
    found = {
        name: getattr(part, name) for part in flow.modules() for name in ("order", "memory") if hasattr(part, name)
    }
    assert found == {"order": "scale_first", "memory": "reversible"}


@pytest.mark.parametrize(("arguments", "wish"), [([], True), (["--no-cuda-graph"], False), (["--cuda-graph"], True)])
def test_the_graph_is_an_option_of_fit(monkeypatch, arguments, wish):
    class Enough(Exception):
        pass

    def seen(*_, cuda_graph, **__):
        assert cuda_graph is wish
        raise Enough

    monkeypatch.setattr(commands, "fit", seen)
    with pytest.raises(Enough):
        cli.main(["train", *QUICK, *arguments])


def test_a_folder_is_streamed_to_the_same_end(capsys):
    from PIL import Image

    os.mkdir("pictures")
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        values = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(f"pictures/{index}.png")
    arguments = ["--data", "pictures", "--batch-size", "4", "--quiet", "--stream", "--workers", "0", "--n-bits", "5"]
    assert cli.main(["train", *QUICK, *arguments, "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert (
        "pictures: 32 images to train on as a stream, 4 for validation, 4 for the test (8 x 8, RGB, 32 levels)" in said
    )
    assert "independent pixels" not in said
    assert json.loads(Path("run/config.json").read_text())["data"]["stream"] is True
    assert cli.main(["train", "--resume", "run", "--steps", "8", "--workers", "0"]) == 0
    assert "the run has --stream" in refused(capsys, "train", "--resume", "run", "--no-stream")
    assert cli.main(["evaluate", "run", "--draws", "1"]) == 0
    shutil.copytree("pictures", "others")
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--data", "others", "--draws", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 40


def test_the_folder_for_runs_may_be_a_file(capsys):
    Path("runs").touch()
    assert "runs, which is a file" in refused(capsys, "train", *QUICK)


def test_depth_may_differ_by_level(capsys):
    assert cli.main(["train", *QUICK, "--depth", "2,1", "--quiet"]) == 0
    assert "2 levels of 2, 1 steps" in capsys.readouterr().out
    assert "--depth 1,2 differs from the run's 2,1" in (
        refused(capsys, "train", "--resume", "runs/digits-1", "--depth", "1,2")
    )
    assert cli.main(["train", "--resume", "runs/digits-1", "--depth", "2,1"]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(capsys):
    os.mkdir("run")
    os.symlink("/dev/full", "run/timing.jsonl")
    error = refused(capsys, "train", *QUICK, "--quiet", "--out", "run")
    assert "timing.jsonl cannot be written (No space left on device); the run stopped at step 2" in error


@pytest.mark.parametrize(
    ("command", "hint"),
    [("train", "--size"), ("sample", "--count"), ("interpolate", "--pairs"), ("evaluate", "--data")],
)
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, digits_run, command, hint):
    def allocate(*arguments, **options):
        torch.empty(2**55, dtype=torch.uint8)

    module, name = {
        "train": (commands, "fit"),
        "sample": (finished, "draw"),
        "interpolate": (finished, "between"),
        "evaluate": (finished, "measure"),
    }[command]
    monkeypatch.setattr(module, name, allocate)
    error = refused(capsys, command, *(QUICK if command == "train" else [digits_run]))
    assert "there is not enough memory" in error
    assert hint in error


@pytest.mark.parametrize("channels", [2, 4])
def test_two_and_four_channels_are_trained_and_drawn(channels):
    import numpy

    images = numpy.random.default_rng(0).integers(0, 256, (20, 8, 8, channels), dtype=numpy.uint8)
    numpy.savez("set.npz", images=images)
    assert cli.main(["train", *QUICK, "--data", "set.npz", "--out", "run"]) == 0
    assert cli.main(["sample", "run", "--count", "2", "--npz", "two.npz"]) == 0
    assert numpy.load("two.npz")["images"].shape == (2, 8, 8, channels)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"config": None},
        {"threads": -4},
        {"threads": "x"},
        {"threads": 100_000},
        {"model": {}},
        {"model": {"shape": [1, 8, 8]}},
        {"model": 3},
    ],
    ids=str,
)
def test_a_damaged_checkpoint_is_one_sentence(capsys, digits_run, change):
    path = copied(digits_run) / "checkpoint.safetensors"
    tensors, facts = load_checkpoint(path)
    if change.keys() & {"threads", "model"}:
        change = {"config": facts["config"] | change}
    save_checkpoint(path, tensors, facts | change)
    error = refused(capsys, "train", "--resume", "copy", "--steps", "8")
    path.unlink()
    path.mkdir()
    assert "is a folder" in refused(capsys, "train", "--resume", "copy"), error


def test_damaged_metrics_cost_their_lines_only(digits_run):
    path = copied(digits_run) / "metrics.jsonl"
    size = path.stat().st_size
    damage = b'\xff\xfe\n[1]\n3\n{"step": "x"}\n{"step": 2, "bpd": "x"}\n'
    path.write_bytes(damage + path.read_bytes()[len(damage) : size])
    assert cli.main(["train", "--resume", "copy", "--steps", "8", "--quiet"]) == 0
