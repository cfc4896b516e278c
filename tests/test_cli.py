"""The command as a stranger meets it: what it writes, what it says, what it refuses and how it stops."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.models import Glow  # noqa: E402
from nfkernels.nn import load  # noqa: E402
from nfkernels.training import commands  # noqa: E402
from nfkernels.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

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
        (["--data", "digit"], 'digit does not exist: did you mean "digits"?'),
        (["--data", "two.npy"], "two has 2 images: at least 3 are needed"),
        (["--data", "cut.npy"], "cut.npy"),
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
    numpy.save("two.npy", numpy.zeros((2, 8, 8), numpy.uint8))
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 8, 8), }"
    header = header.ljust(117) + "\n"
    Path("cut.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
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
    assert "--depth 1,2 differs from the run's 2,1" in (
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
        (["train", "--threads", "100000"], "--threads: '100000': expected a whole number, at least 1 and at most"),
        (["train", "--device", "cuda:99999999999999999999"], "--device: 'cuda:9999"),
        (["train", "--size", "99999999999999999999"], "--size: '9999"),
        (["train", "--channels", "2"], "--channels: invalid choice: 2"),
        *((["train", option, ""], f"{option}: '': expected a name") for option in ("--data", "--out", "--resume")),
        (["sample", ""], "RUN: ''"),
        (["sample", "run", "--npz", ""], "--npz: ''"),
        (["evaluate", "run", "--data", ""], "--data: ''"),
        (["evaluate", "run", "--steps", "3"], "nfkernels evaluate: unrecognized arguments: --steps 3"),
        (["sample", "run", "--temperature", "1e9"], "--temperature: '1e9'"),
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
    assert "no/x.png cannot be written: there is no folder no" in refused(
        capsys, "sample", digits_run, "--out", "no/x.png"
    )
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


def test_evaluate_refuses_other_classes(capsys, tmp_path):
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(0)
    for folder, classes in (("a", "cat dog"), ("b", "dog cow cat"), ("c", "cow dog"), ("d", "cat")):
        for index in range(6):
            for name in classes.split():
                os.makedirs(f"{folder}/{name}", exist_ok=True)
                image = generator.integers(0, 256, (8, 8), dtype=numpy.uint8)
                Image.fromarray(image).save(f"{folder}/{name}/{index}.png")
    assert cli.main(["train", *QUICK, "--data", "a", "--classes", "--out", "run"]) == 0
    for other in "bc":
        assert "are not those of the flow (cat, dog)" in refused(capsys, "evaluate", "run", "--data", other)
    assert cli.main(["evaluate", "run", "--data", "d"]) == 0
    os.rename("a", "moved")
    for command in (["evaluate", "run"], ["train", "--resume", "run"]):
        assert "if it moved, give --data PATH" in refused(capsys, *command)
    assert cli.main(["train", "--resume", "run", "--data", "moved"]) == 0


def copied(run, name="copy"):
    shutil.copytree(run, name)
    return Path(name)


def test_weights_that_are_not_finite_are_counted(capsys, digits_run):
    path = copied(digits_run) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    flow = load(path)
    name = next(name for name, weight in flow.named_parameters() if weight.numel() > 3)
    tensors[f"state.{name}"].view(-1)[:3] = math.nan
    save_file(tensors, path, metadata)
    total = sum(weight.numel() for weight in flow.parameters())
    for command in ("sample", "evaluate"):
        assert f"3 of {total} weights are not finite" in refused(capsys, command, "copy")


def test_what_the_flow_itself_refuses_is_one_sentence(capsys, digits_run, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("the matrix of step 3 is singular")

    monkeypatch.setattr(Glow, "sample", broken)
    monkeypatch.setattr(Glow, "bits_per_dim", broken)
    for command in ("sample", "evaluate"):
        assert "the matrix of step 3 is singular" in refused(capsys, command, digits_run)


@pytest.mark.parametrize(("command", "hint"), [("train", "--size"), ("sample", "--count"), ("evaluate", "--data")])
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, digits_run, command, hint):
    def allocate(*arguments, **options):
        torch.empty(2**55, dtype=torch.uint8)

    monkeypatch.setattr(commands, {"train": "fit", "sample": "draw", "evaluate": "measure"}[command], allocate)
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
        {"data": 3},
        {"data": {"source": "digits", "size": None, "channels": None, "split_seed": "q"}},
        {"data": {"source": "digits", "size": [16, 16], "channels": None, "split_seed": 0}},
        {"data": {"source": 3}},
        {"data": {"source": "digits", "size": "x"}},
        {"data": {"source": "digits", "classes": 3}},
        {"model": None},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_one_sentence(capsys, digits_run, change):
    path = copied(digits_run) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(capsys, "evaluate", "copy")


@pytest.mark.parametrize("content", [b"[3]", b"\xff\xfe", b"[" * 100_000, b"{"])
def test_a_configuration_that_is_none_is_one_sentence(capsys, digits_run, content):
    (copied(digits_run) / "config.json").write_bytes(content)
    assert "config.json" in refused(capsys, "evaluate", "copy")


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


def test_a_model_is_known_in_a_process_that_has_imported_nothing_else(digits_run):
    command = [sys.executable, "-W", "ignore", "-m", "nfkernels", "sample", str(digits_run), "--out", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_state_that_does_not_fit_is_told_in_short(capsys, digits_run):
    with safe_open(digits_run / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(digits_run / "model.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[::2]}, "half.safetensors", metadata)
    assert len(refused(capsys, "sample", "half.safetensors")) < 700


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


def run_python(code, **environment):
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_a_closed_pipe_costs_the_output_and_not_the_run():
    command = f"{sys.executable} -W ignore -m nfkernels train {' '.join(QUICK)} --out run 2>&1"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    assert done.stdout.startswith("data   digits")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert os.path.exists("run/loss.png")


def test_a_terminal_that_knows_only_ascii():
    code = "import sys; from nfkernels import cli; sys.exit(cli.main(['sample', 'f\\u00fcr']))"
    done = run_python(code, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 1
    assert done.stderr == "nfkernels sample: f\\xfcr does not exist\n"
    done = run_python(
        "print(1); import sys; from nfkernels import cli; cli.main(['f\\u00fcr'])", PYTHONIOENCODING="ascii"
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_is_being_imported():
    code = (
        "import sys\n"
        "from nfkernels import cli\n"
        "def interrupted(*arguments): raise KeyboardInterrupt\n"
        "cli.importlib.import_module = interrupted\n"
        "sys.exit(cli.main(['train']))\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


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
