"""nfkernels sample, interpolate and evaluate: what is drawn and told of a trained flow, and what is refused."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, copied, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import stripes

for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.models import Glow  # noqa: E402
from nfkernels.nn import load  # noqa: E402
from nfkernels.training import TrainingError, session  # noqa: E402
from nfkernels.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from nfkernels.training.finished import pairs  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    os.mkfifo("pipe")  # or /dev/null, which root could replace by the picture
    for option in ("--out", "--npz"):
        assert "pipe is a device or a pipe" in refused(capsys, "sample", digits_run, option, "pipe")
    assert "--out x.jpg: expected a name that ends in .png" in refused(capsys, "sample", digits_run, "--out", "x.jpg")
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


# --- several temperatures, and from one image to another -------------------------------------------------------------


def test_temperatures_are_rows_of_the_same_noise(capsys, digits_run):
    import numpy
    from PIL import Image

    arguments = ["sample", str(digits_run), "--temperatures", "0,0.7,1", "--count", "3", "--npz", "x.npz"]
    assert cli.main([*arguments, "--out", "x.png"]) == 0
    assert "3 samples at each temperature 0, 0.7, 1: x.png" in capsys.readouterr().out
    rows = numpy.load("x.npz")["images"].reshape(3, 3, 8, 8, 1)
    assert Image.open("x.png").size[0] == Image.open("x.png").size[1]  # three rows of three
    for temperature, row in zip(("0", "0.7", "1"), rows, strict=True):
        single = ["sample", str(digits_run), "--temperature", temperature, "--count", "3", "--npz", "y.npz"]
        assert cli.main([*single, "--out", "y.png"]) == 0
        assert (numpy.load("y.npz")["images"] == row).all()


def test_interpolation_begins_and_ends_with_the_images(capsys, digits_run):
    import numpy

    assert cli.main(["interpolate", str(digits_run), "--pairs", "3", "--steps", "5", "--npz", "x.npz"]) == 0
    assert f"3 rows of 5 images, digits, test part: {digits_run / 'interpolation.png'}" in capsys.readouterr().out
    rows = torch.from_numpy(numpy.load("x.npz")["images"]).reshape(3, 5, 8, 8)
    data = session.run_data(json.loads((digits_run / "config.json").read_text()))[2]
    first, last, labels = pairs(data, 3, 0, conditional=True)
    assert torch.equal(rows[:, 0], first[:, 0])
    assert torch.equal(rows[:, -1], last[:, 0])
    for image, label in zip(torch.cat([first, last]), torch.cat([labels, labels]), strict=True):
        at = (data.images == image).flatten(1).all(1)
        assert label in data.labels[at]
    # Half way: the image of the latents' mean.
    flow = load(digits_run / "model.safetensors").eval()
    with torch.no_grad():
        middle = (flow.encode(first, labels) + flow.encode(last, labels)) / 2
        assert torch.equal(flow.decode(middle, labels)[:, 0], rows[:, 2])
    assert "--pairs 500: digits has" in refused(capsys, "interpolate", digits_run, "--pairs", 500)


def test_pairs_share_no_image_and_follow_the_seed():
    data = stripes(9)
    first, last, labels = pairs(data, 4, 0, conditional=False)
    assert labels is None
    rest = [image.tolist() for image in data.images]
    for image in torch.cat([first, last]):
        rest.remove(image.tolist())  # a ValueError for one that is there twice
    assert not torch.equal(pairs(data, 4, 1, conditional=False)[0], first)
    with pytest.raises(TrainingError, match="--pairs 5: stripes has 4 pairs of images only"):
        pairs(data, 5, 0, conditional=False)


# --- what evaluate tells beside the bound ----------------------------------------------------------------------------


def test_evaluate_tells_the_tighter_bound_and_the_reconstruction(capsys, digits_run):
    arguments = ["evaluate", str(digits_run), "--draws", "1", "--importance-samples", "8"]
    assert cli.main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["importance_samples"] == 8
    assert facts["importance_weighted_bits_per_dim"] < facts["bits_per_dim"]
    assert (facts["precision"], facts["reconstructed_images"]) == ("float32", 64)
    assert (facts["reconstructed_wrong_values"], facts["reconstructed_largest_grey_levels"]) == (0, 0)
    assert 0 < facts["reconstructed_largest"] < 1e-4
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "(of 8 samples per image, a tighter bound)" in said
    assert "0 of 4096 pixel values of 64 images differ" in said


def test_the_precision_is_that_of_the_training(capsys, digits_run):
    path = copied(digits_run) / "config.json"
    config = json.loads(path.read_text())
    config["recipe"]["precision"] = "bfloat16"
    path.write_text(json.dumps(config))
    numbers = {}
    for more in ([], ["--precision", "bfloat16"], ["--precision", "float32"]):
        assert cli.main(["evaluate", "copy", "--draws", "1", "--json", *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["precision"] == (more[1] if more else "bfloat16")
        numbers[" ".join(more)] = facts["bits_per_dim"]
    assert numbers[""] == numbers["--precision bfloat16"] != numbers["--precision float32"]


def test_a_run_folder_from_before_the_newer_options(capsys, digits_run):
    """Its configuration knows neither of them; the command goes on with what they were then."""
    run = copied(digits_run)
    tensors, facts = load_checkpoint(run / "checkpoint.safetensors")
    config = facts["config"]
    for name in ("kernel", "last_kernel", "scale_map", "order", "class_width", "memory", "dequantization"):
        del config["model"][name]
    del config["data"]["bits"]
    for name in ("optimizer", "lr_end", "accumulate", "precision", "flip"):
        del config["recipe"][name]
        del facts["recipe"][name]
    save_checkpoint(run / "checkpoint.safetensors", tensors, facts)
    (run / "config.json").write_text(json.dumps(config))
    assert cli.main(["evaluate", "copy", "--draws", "1"]) == 0
    assert cli.main(["sample", "copy", "--count", "1"]) == 0
    assert cli.main(["interpolate", "copy", "--pairs", "1"]) == 0
    assert "--order scale_first differs from the run's shift_first" in (
        refused(capsys, "train", "--resume", "copy", "--order", "scale_first")
    )
    assert cli.main(["train", "--resume", "copy", "--steps", "8", "--order", "shift_first", "--quiet"]) == 0
