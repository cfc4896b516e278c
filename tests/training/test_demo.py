"""`nfkernels demo`: what it draws, what it says, and what it refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refused

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from nfkernels import cli  # noqa: E402
from nfkernels.nn import Chain, Flow, Standardize, StandardNormal  # noqa: E402
from nfkernels.plot.steps import flatten  # noqa: E402
from nfkernels.training.data.toy import TOYS  # noqa: E402
from nfkernels.training.demo import flow as demo_flow  # noqa: E402
from nfkernels.training.demo import options, run  # noqa: E402
from nfkernels.training.demo.folder import is_ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")
QUICK = ["--steps", "3", "--layers", "2", "--width", "8", "--batch-size", "16", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def _small(monkeypatch):
    """Few points."""
    for name, value in {"_TRAINING": 300, "_HELD_OUT": 100, "_DRAWN": 50}.items():
        monkeypatch.setattr(run, name, value)


def pixels(path):
    """How many colours a picture holds, having seen that it is one of ours and not nearly empty."""
    assert is_ours(Path(path))
    picture = Image.open(path).convert("RGB")
    assert min(picture.size) > 200
    return len(picture.getcolors(2**24))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["moon"], ["'moon': expected one of moons, rings, checkerboard, pinwheel, change-of-variables",
                    "did you mean moons?"]),
        (["Change-Of-Variable"], ["did you mean change-of-variables?"]),
        (["zebra"], ["'zebra': expected one of moons,"]),
        ([], ["required: NAME"]),
        (["moons", "--steps", "0"], ["--steps: '0': expected a whole number, at least 1"]),
        (["moons", "--steps", "1.5"], ["--steps: '1.5': expected a whole number"]),
        (["moons", "--batch-size", "many"], ["--batch-size: 'many': expected a whole number"]),
        (["moons", "--layers", "-2"], ["--layers: '-2'"]),
        (["moons", "--model", "glow"], ["--model: invalid choice: 'glow'"]),
        (["moons", "--out", ""], ["--out: '': expected a name"]),
        (["moons", "--device", "gpu"], ["--device: 'gpu': expected auto, cpu, cuda"]),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_status_2(capsys, arguments, sentences):
    error = refused(capsys, "demo", *arguments, status=2)
    assert all(sentence in error for sentence in sentences), error
    assert ("did you mean" in error) == any("did you mean" in sentence for sentence in sentences)
    assert error.rstrip().endswith("see nfkernels demo --help")


@pytest.mark.parametrize("name", options.NAMES)
def test_the_folder_may_be_no_file_and_foreign_pictures_stay(capsys, name):
    Path("file").write_text("mine")
    assert "file is a file: expected a folder for the pictures" in refused(capsys, "demo", name, "--out", "file")
    Path("folder").mkdir()
    Path(f"folder/{name}.png").write_bytes(b"\x89PNG somebody else's IDAT nfkernels demo")
    error = refused(capsys, "demo", name, "--out", "folder")
    assert f"folder/{name}.png is there already and was not drawn by nfkernels demo" in error
    assert Path(f"folder/{name}.png").read_bytes().startswith(b"\x89PNG somebody")
    assert Path("file").read_text() == "mine"
    assert os.listdir("folder") == [f"{name}.png"]


@pytest.mark.parametrize("name", options.NAMES)
def test_a_missing_matplotlib_is_told_first_of_all(capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Path("file").write_text("mine")
    error = refused(capsys, "demo", name, "--out", "file")
    assert 'drawing the pictures needs matplotlib, which is missing: pip install "nfkernels[train]"' in error


def test_the_lecture_has_nothing_to_train(capsys):
    error = refused(capsys, "demo", "change-of-variables", "--steps", "10", "--model", "nsf")
    assert "change-of-variables trains nothing: leave --model, --steps away" in error
    assert not os.listdir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here(capsys):
    assert "there is no device cuda here" in refused(capsys, "demo", "moons", "--device", "cuda")


def test_the_names_are_those_of_the_densities():
    assert list(TOYS) == list(options.DENSITIES)


# --- change of variables ----------------------------------------------------------------------------------------------


def test_the_lecture_is_drawn_and_told(capsys):
    assert cli.main(["demo", "change-of-variables"]) == 0
    said = capsys.readouterr().out
    assert pixels("demo-change-of-variables/change-of-variables.png") > 50
    assert "1, 4, 9, 16, 25, 36, and each keeps its 1/6" in said
    assert "Log needs positive data, got a minimum of -" in said
    assert len(re.findall(r"differ by \de-1[0-9] at most", said)) == 2
    assert max(map(len, said.splitlines())) <= 120
    assert cli.main(["demo", "change-of-variables"]) == 0  # what it drew itself it may draw anew


# --- the quick look ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", options.DENSITIES)
def test_a_quick_look_draws_two_pictures_and_says_how_good_it_is(capsys, name):
    assert cli.main(["demo", name, *QUICK]) == 0
    said = capsys.readouterr().out
    assert sorted(os.listdir(f"demo-{name}")) == [f"{name}-steps.png", f"{name}.png"]
    assert all(pixels(f"demo-{name}/{file}") > 50 for file in os.listdir(f"demo-{name}"))
    numbers = dict(re.findall(r"^  (\w[\w ]+?) +(-?\d+\.\d+) \+- \d\.\d+", said, re.MULTILINE))
    truth, own, gap = (float(numbers[row]) for row in ("the density itself", "this flow", "left to learn"))
    assert gap == pytest.approx(truth - own, abs=2e-3)
    assert gap > 0.3
    assert "3 steps in " in said
    assert f"in demo-{name}: {name}.png, {name}-steps.png" in said


@pytest.mark.usefixtures("_small")
def test_one_seed_gives_one_flow_and_own_pictures_are_drawn_anew(capsys):
    said = []
    for seed in ("0", "0", "1"):
        assert cli.main(["demo", "moons", *QUICK, "--seed", seed, "--out", "here"]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "+-" in line])
    assert len(said[0]) == 4
    assert said[0] == said[1]
    assert said[0] != said[2]


@pytest.mark.usefixtures("_small")
def test_for_programs(capsys):
    assert cli.main(["demo", "moons", *QUICK, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert said.err == ""
    assert (facts["name"], facts["model"], facts["stopped"], facts["steps"], facts["points"]) == (
        "moons", "nsf", "steps", 3, 100,
    )  # fmt: skip
    assert facts["gap"] == pytest.approx(facts["truth"] - facts["log_likelihood"], abs=1e-5)
    assert facts["written"] == ["demo-moons/moons.png", "demo-moons/moons-steps.png"]
    assert cli.main(["demo", "change-of-variables", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["share_without_logarithm"] == pytest.approx(0.5, abs=0.01)
    assert facts["exp_log_density_error"] < 1e-6
    assert [os.path.exists(file) for file in facts["written"]] == [True]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("model", options.MODELS)
def test_every_kind_of_flow(capsys, model):
    assert cli.main(["demo", "rings", *QUICK, "--model", model]) == 0
    assert f"four rings: {options.MODELS[model]}, 2 layers of width 8" in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_training_helps(capsys):
    gaps = []
    for steps in ("1", "60"):
        assert cli.main(["demo", "moons", *QUICK[2:], "--steps", steps]) == 0
        gaps.append(float(re.search(r"left to learn +(\d\.\d+)", capsys.readouterr().out)[1]))
    assert gaps[1] < 0.8 * gaps[0]


def test_ctrl_c_draws_what_there_is():
    command = [sys.executable, "-W", "ignore", "-m", "nfkernels", "demo", "moons", *QUICK, "--progress", "lines"]
    command[command.index("--steps") + 1] = "100000"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr.readline().startswith("step "), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in out
    assert "Traceback" not in err
    assert sorted(os.listdir("demo-moons")) == ["moons-steps.png", "moons.png"]


# --- its parts --------------------------------------------------------------------------------------------------------


def plain(*layers):
    return Flow(Chain(*layers), StandardNormal(2)).eval()


def test_likelihoods_know_the_truth():
    """A flow that is the normal it is compared with."""
    toy, data = TOYS["moons"], TOYS["moons"].sample(4000, seed=0)
    flow = plain(Standardize(data.mean(0), data.std(0)))
    found = demo_flow.likelihoods(flow, toy, toy.sample(1000, seed=1), data)
    assert found.points == 1000
    assert found.gap[0] == pytest.approx(found.truth[0] - found.flow[0], abs=1e-9)
    assert found.flow[0] < found.normal[0] + 0.01  # the latter knows the correlation
    assert found.truth[0] > found.normal[0] + 0.5
    assert found.truth[1] == pytest.approx(toy.log_prob(toy.sample(1000, seed=1)).std().item() / math.sqrt(1000))


def test_data_is_scaled_alike_along_both_axes():
    data = TOYS["moons"].sample(2000, seed=0)
    flow = demo_flow.build("NSF", data, layers=2, width=8)
    unit = flatten(flow.bijection)[0]
    z = unit(data)[0]
    assert z.mean(0).abs().max() < 1e-5
    assert z.var(0).mean().item() == pytest.approx(1, abs=1e-4)
    assert unit.scale.numel() == 1
