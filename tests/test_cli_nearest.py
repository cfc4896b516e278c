"""The nearest of what there is, in every sentence about something that there is not."""

import json
from pathlib import Path

import pytest
from command_line import refused

from nfkernels._nearest import did_you_mean, did_you_mean_path, nearest
from nfkernels.training.data import DataError, load_images
from nfkernels.training.data.table import read_table
from nfkernels.training.session import class_index


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--batchsize", "8"], "(did you mean --batch-size?)"),
        (["train", "--batch", "8"], "(did you mean --batch-size?)"),
        (["train", "--step=3"], "(did you mean --steps?)"),
        (["train", "--weight_decay", "0"], "(did you mean --weight-decay?)"),
        (["train", "--no-cuda-grpah"], "(did you mean --no-cuda-graph"),
        (["train", "--learning-rate", "1e-3"], "(did you mean --lr?)"),
        (["train", "--epochs", "3"], "(did you mean --steps?)"),
        (["train", "steps", "3"], "(did you mean --steps?)"),
        (["sample", "run", "--number", "3"], "unrecognized arguments: --number 3; see"),
        (["evaluate", "run", "--temperature", "3"], "(--temperature is an option of sample)"),
        (["sample", "run", "--data", "x", "--jsn"], "(--data is an option of train, interpolate, evaluate)"),
        (["demo", "moons", "--json", "--modle", "maf"], "(did you mean --model?)"),
        (["--versoin"], "nfkernels: unrecognized arguments: --versoin (did you mean --version?)"),
        (["--jsonn", "info"], "unrecognized arguments: --jsonn (did you mean --json?)"),
        (["trian"], "(choose from train, sample, interpolate, evaluate, demo, info, completion); did you mean train?"),
        (["eval", "run"], "; did you mean evaluate?"),
        (["paint"], "demo, info, completion); see nfkernels --help"),
        (["train", "--preset", "glow-cifar"], "; did you mean glow-cifar10"),
        (["train", "--preset", "cifar10"], "; did you mean glow-cifar10?"),
        (["train", "--schedule", "cosin"], "; did you mean cosine?"),
        (["train", "--model", "NSF"], "; did you mean nsf?"),
        (["evaluate", "run", "--precision", "bf16"], "(choose from float32, bfloat16); did you mean bfloat16?"),
        (["demo", "checkers"], "; did you mean checkerboard?"),
        (["demo", "moon"], "; did you mean moons?"),
        (["completion", "bsh"], "; did you mean bash?"),
    ],
)
def test_on_the_command_line(capsys, arguments, hint):
    assert hint in refused(capsys, *arguments, status=2)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"batchsize": 8}, "there is no option 'batchsize': did you mean batch_size?"),
        ({"learning-rate": 0.1}, "there is no option 'learning-rate': did you mean lr?"),
        ({"schedule": "linaer"}, "expected one of cosine, linear, exponential, constant; did you mean linear?"),
        ({"xyzzy": 1}, "there is no option 'xyzzy': see nfkernels train --help"),
    ],
)
def test_in_a_file_of_options(capsys, options, hint):
    Path("options.json").write_text(json.dumps(options))
    assert hint in refused(capsys, "train", "--config", "options.json")


def test_a_file_of_options_that_is_not_there(capsys):
    Path("options.json").write_text("{}")
    error = refused(capsys, "train", "--config", "option.json")
    assert error == "nfkernels train: --config option.json: No such file or directory, did you mean options.json?\n"


def test_data_that_is_not_there():
    Path("photos").mkdir()
    Path("sub").mkdir()
    Path("sub/people.csv").write_text("a,b\n1,2\n")
    for source, meant in (
        ("digit", "digits"),
        ("Digits", "digits"),
        ("photo/", "photos"),
        ("sub/peple.npz", "sub/people.csv"),
    ):
        with pytest.raises(DataError, match=rf"does not exist: did you mean {meant}\?"):
            load_images(source)
    with pytest.raises(DataError, match=r"does not exist: did you mean sub/people\.csv\?"):
        read_table("sub/people.cvs")
    with pytest.raises(DataError, match="nowhere/at/all does not exist: expected "):
        load_images("nowhere/at/all")
    Path("sub/other.csv").write_text("age,b\n1,2\n")
    with pytest.raises(DataError, match=r"sub/zebra\.csv does not exist: expected a table"):
        read_table("sub/zebra.csv")
    with pytest.raises(DataError, match=r"has no column 'ages': its columns are age, b; did you mean age\?"):
        read_table("sub/other.csv", columns=["ages"])


def test_a_class_by_a_wrong_name():
    from nfkernels.training import TrainingError

    with pytest.raises(TrainingError, match=r"numbered from 0: cat, dog; did you mean dog\?"):
        class_index("dogs", ["cat", "dog"])
    with pytest.raises(TrainingError, match=r"numbered from 0: 0, 1$"):
        class_index("10", ["0", "1"])


def test_nearest():
    assert nearest("--stepz", ["--steps", "--seed"]) == ["--steps"]
    assert nearest("STEPS", ["--steps"]) == ["--steps"]
    assert nearest("batch_size", ["--batch-size"]) == ["--batch-size"]
    assert nearest("class", ["--class", "--class-width", "--classes"]) == ["--class"]
    assert nearest("gpu", ["--device"]) == ["--device"]
    assert nearest("gpu", ["--steps"]) == []  # another name for what this command has not
    assert nearest("x", ["xyz"]) == nearest("", ["a"]) == nearest("12", ["1", "2"]) == nearest("a", []) == []
    assert did_you_mean("stepz", ["steps"], "; ") == "; did you mean steps?"
    assert did_you_mean("zebra", ["steps"], "; ") == ""
    assert did_you_mean_path(Path("no/such/folder/a.csv")) == ""
