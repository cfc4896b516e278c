"""The command as a stranger meets it: what it writes, what it says, what it refuses and how it stops."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.training import commands  # noqa: E402

QUICK = ["--depth", "1", "--width", "8", "--steps", "6", "--validate-every", "3", "--log-every", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder, and leaves torch's thread count as it was."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A small trained run, for commands that only read it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *QUICK, "--classes", "--out", str(run)]) == 0
    return run


def refused(capsys, *arguments, status=1):
    """The one sentence on stderr that a mistake gets."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error


# --- train ----------------------------------------------------------------------------------------------------------


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
        assert 'pip install "nfkernels[train]"' in refused(capsys, "train", *QUICK)
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
    assert "--size [8, 16] differs from the run's None" in sentence("--size", "8x16")
    assert "lr 0.5 differs from the run's" in sentence("--lr", 0.5)
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
        (["--data", "empty"], "empty holds no picture"),
        (["--data", "broken"], "a.png"),
        (["--size", "7"], "cannot be halved, as a level needs: try --size 8x8"),
        (["--size", "12", "--levels", "3"], "halved 3 times, as 3 levels need: try --levels 2 or --size 16x16"),
        (["--depth", "2,3,4"], "--depth has 3 numbers for 2 levels"),
        (["--data", "flat.npy", "--classes"], "flat has no labels"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
        (["--out", "file/run"], "cannot be made: Not a directory"),
        (["--out", "taken"], "taken already holds a run (metrics.jsonl)"),
    ],
)
def test_train_refuses_in_one_sentence(capsys, arguments, sentence):
    import numpy

    os.mkdir("empty")
    os.mkdir("broken")
    Path("broken/a.png").write_text("no picture")
    numpy.save("flat.npy", numpy.zeros((20, 8, 8), numpy.uint8))
    Path("file").touch()
    os.mkdir("taken")
    Path("taken/metrics.jsonl").touch()
    assert sentence in refused(capsys, "train", *QUICK, *arguments)
    assert not os.path.exists("runs")


def test_the_folder_for_runs_may_be_a_file(capsys):
    Path("runs").touch()
    assert "runs, which is a file" in refused(capsys, "train", *QUICK)


def test_depth_may_differ_by_level(capsys):
    assert cli.main(["train", *QUICK, "--depth", "2,1", "--quiet"]) == 0
    assert "2 levels of 2, 1 steps" in capsys.readouterr().out
    assert "--depth [1, 2] differs from the run's [2, 1]" in (
        refused(capsys, "train", "--resume", "runs/digits-1", "--depth", "1,2")
    )
    assert cli.main(["train", "--resume", "runs/digits-1", "--depth", "2,1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--steps", "0"], "--steps: '0': expected a whole number, at least 1"),
        (["train", "--steps", "many"], "--steps: 'many'"),
        (["train", "--depth", "2,x"], "--depth: 'x'"),
        (["train", "--lr", "0"], "--lr: '0': expected a number above 0"),
        (["train", "--lr", "nan"], "--lr: 'nan'"),
        (["train", "--dropout", "1"], "--dropout: '1': expected a number of at least 0 and below 1"),
        (["train", "--size", "8x"], "--size: '8x'"),
        (["train", "--device", "gpu"], "--device: 'gpu': expected auto, cpu, cuda"),
        (["train", "--seed", "-1"], "--seed: '-1'"),
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),
        (["sample", "run", "--count", "-3"], "--count: '-3'"),
        (["sample", "run", "--temperature", "-1"], "--temperature: '-1'"),
        (["sample"], "RUN"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_status_2(capsys, arguments, sentence):
    error = refused(capsys, *arguments, status=2)
    assert sentence in error
    assert error.rstrip().endswith("--help")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(capsys):
    os.mkdir("run")
    os.symlink("/dev/full", "run/timing.jsonl")
    error = refused(capsys, "train", *QUICK, "--quiet", "--out", "run")
    assert "timing.jsonl cannot be written (No space left on device); the run stopped at step 2" in error


def test_defects_of_the_program_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(commands, "fit", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *QUICK])


# --- sample and evaluate --------------------------------------------------------------------------------------------


def test_sample_draws_what_is_asked(capsys, digits_run):
    import numpy
    from PIL import Image

    assert cli.main(["sample", str(digits_run), "--count", "5", "--npz", "five.npz", "--out", "five.png"]) == 0
    assert "5 samples at temperature 1: five.png" in capsys.readouterr().out
    five = numpy.load("five.npz")["images"]
    assert (five.shape, five.dtype) == ((5, 8, 8, 1), numpy.uint8)
    assert five.max() <= 16
    assert Image.open("five.png").format == "PNG"
    # Classes in turn, as one by one; another seed gives others; no temperature gives no variety.
    samples = {}
    for name, more in {"again": [], "seed": ["--seed", "1"], "cold": ["--temperature", "0", "--class", "7"]}.items():
        arguments = ["sample", str(digits_run), "--count", "5", "--npz", "x.npz", "--out", "x.png", *more]
        assert cli.main(arguments) == 0
        samples[name] = numpy.load("x.npz")["images"]
    assert (samples["again"] == five).all()
    assert (samples["seed"] != five).any()
    assert (samples["cold"] == samples["cold"][:1]).all()
    # A file alone serves as well, and the picture then lies here.
    assert cli.main(["sample", str(digits_run / "model.safetensors"), "--count", "1"]) == 0
    assert os.path.exists("samples.png")


def test_sample_refuses_in_one_sentence(capsys, digits_run):
    assert "flow has 10 classes, numbered from 0: 0, 1, 2" in refused(capsys, "sample", digits_run, "--class", "10")
    assert "nowhere does not exist" in refused(capsys, "sample", "nowhere")
    near = refused(capsys, "sample", digits_run.parent / "rum")
    assert f"runs there: {digits_run}" in near
    os.mkdir("empty")
    assert "holds no model.safetensors" in refused(capsys, "sample", "empty")
    assert "no/x.png: No such file or directory" in refused(capsys, "sample", digits_run, "--out", "no/x.png")
    assert "is for --resume" in refused(capsys, "sample", digits_run / "checkpoint.safetensors")


class Bomb:
    def __reduce__(self):
        return (os._exit, (77,))


@pytest.mark.parametrize("kind", ["text", "cut", "pickle", "foreign"])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_foreign_and_damaged_models_are_one_sentence(capsys, digits_run, command, kind):
    if kind == "foreign":
        save_file({"a": torch.zeros(2)}, "model.safetensors")
    else:
        whole = (digits_run / "model.safetensors").read_bytes()
        data = {"text": b"no model", "cut": whole[: len(whole) // 2], "pickle": pickle.dumps(Bomb())}[kind]
        Path("model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused(capsys, command, "model.safetensors")


def test_evaluate_repeats_the_number_of_the_run(capsys, digits_run):
    last = json.loads((digits_run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert cli.main(["evaluate", str(digits_run), "--json", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits_per_dim"] == pytest.approx(last["test_bpd"], abs=1e-6)
    assert facts["standard_error"] == pytest.approx(last["test_standard_error"], abs=1e-6)
    assert (facts["images"], facts["draws"], facts["part"]) == (297, 20, "test part")
    assert 0 < facts["round_trip_error"] < 1e-4
    assert cli.main(["evaluate", str(digits_run), "--draws", "1"]) == 0
    said = capsys.readouterr().out
    assert "digits, test part, 297 images" in said
    assert "(mean of 1 dequantisation draw; standard error over images)" in said
    assert "round-trip error" in said


def test_evaluate_refuses_other_grey_levels(capsys, digits_run):
    import numpy

    numpy.save("set.npy", numpy.zeros((3, 8, 8), numpy.uint8))
    assert "256 grey levels and the flow 17" in refused(capsys, "evaluate", digits_run, "--data", "set.npy")
    assert "give --data" in refused(capsys, "evaluate", digits_run / "model.safetensors")


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_says_which_kernel_serves_what(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    served = {(row["op"], row["device"]): row for row in facts["ops"]}
    for op in ("affine_coupling_forward", "channel_mix_backward"):
        assert served[op, "cpu"]["kernel"] in ("native", "reference")
        assert served[op, "cpu"]["why"]
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "affine_coupling_forward" in said
    assert torch.__version__ in said
    assert ("not here" in said) == (not torch.cuda.is_available())


# --- signals, in a process of its own -------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "nfkernels", "train", "--progress", "lines", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr.readline().startswith("step "), process.communicate()
    return process


def test_ctrl_c_saves_and_leaves_and_the_run_goes_on(capsys):
    small = ["--depth", "1", "--width", "8", "--threads", "1", "--steps", "100000", "--out", "run"]
    process = start(*small)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by Ctrl-C after " in out
    assert "Traceback" not in err
    step = int(out.split("stopped by Ctrl-C after ")[1].split()[0])
    assert cli.main(["train", "--resume", "run", "--steps", str(step + 1), "--quiet"]) == 0
    assert f"{step + 1} steps, " in capsys.readouterr().out


def test_a_second_ctrl_c_ends_at_once():
    # The step that is under way takes a minute, so that only the second signal can end it.
    code = (
        "import sys, time\n"
        "from nfkernels import cli\n"
        "from nfkernels.training.trainer import Trainer\n"
        "def step(self):\n"
        "    print('step has begun', file=sys.stderr, flush=True)\n"
        "    for _ in range(6000): time.sleep(0.01)\n"
        "Trainer.step = step\n"
        "sys.exit(cli.main(['train', '--depth', '1', '--width', '8', '--quiet', '--out', 'run']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr.readline() == "step has begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_help_needs_no_torch():
    """The parser itself: `nfkernels --help` must not pay for importing torch."""
    code = (
        "import sys, types, importlib.util\n"
        "spec = importlib.util.find_spec('nfkernels')\n"
        "package = types.ModuleType('nfkernels')\n"  # without running nfkernels/__init__.py
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['nfkernels'] = package\n"
        "import nfkernels.cli\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "nfkernels.cli.main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--weight-decay" in done.stdout
