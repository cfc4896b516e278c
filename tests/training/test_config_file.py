"""--config: what a file may hold, who has the last word, and what is told of a mistake in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK, refused

from nfkernels import cli
from nfkernels.training import Recipe, TrainingError
from nfkernels.training.config_file import read_config
from nfkernels.training.options import TRAIN, as_text, merged
from nfkernels.training.presets import PRESETS
from nfkernels.training.recipe import GlowShape

pytestmark = pytest.mark.usefixtures("elsewhere")


def read(text, name="options.yaml"):
    if not name.endswith(".json"):
        pytest.importorskip("yaml")
    Path(name).write_text(text)
    return read_config(name, TRAIN)


def test_yaml_and_json_with_dashes_and_underscores():
    expected = {"batch_size": 16, "lr": 1e-3, "depth": (2, 3), "size": [28, 32], "flip": True, "levels": None}
    assert read("batch-size: 16\nlr: 1e-3\ndepth: [2, 3]\nsize: 28x32\nflip: true\nlevels: null\n") == expected
    text = '{"batch_size": 16, "lr": 0.001, "depth": "2,3", "size": [28, 32], "flip": true, "levels": null}'
    assert read(text, "options.json") == expected
    assert read("# nothing but a comment\n") == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 3", "there is no option 'stepz': did you mean steps"),
        ("xyzzy: 3", "there is no option 'xyzzy': see nfkernels train --help"),
        ("3: 3", "there is no option 3"),
        ("on: 3", "True is no option"),
        ("steps: many", "steps is 'many': expected a whole number, at least 1"),
        ("steps: 1.5", "steps is 1.5: expected a whole number"),
        ("steps: true", "steps is True: expected a whole number"),
        ("steps: null", "steps is null: expected a value; leave steps out for its default, 1500"),
        ("lr: '3'", "lr is '3': expected a number above 0, not text"),
        ("lr: .nan", "lr is nan: expected a number above 0"),
        ("lr: [1]", "lr is [1]: expected a number above 0"),
        ("flip: 1", "flip is 1: expected true or false"),
        ("data: 3", "data is 3: expected a name"),
        ("channels: true", "channels is True: expected one of 1, 3"),
        ("schedule: steep", "schedule is 'steep': expected one of cosine, linear"),
        ("betas: [0.9]", "betas is [0.9]: expected 2 values"),
        ("depth: []", "depth is []: expected at least one value"),
        ("size: [8, 8.5]", "expected a size such as 32"),
        ("size: true", "expected a size such as 32"),
        ("device: [cpu]", "expected auto, cpu, cuda"),
        ("batch-size: 3\nbatch_size: 4", "batch_size is there twice"),
        ("resume: runs/x", "resume can only be given on the command line"),
        ("- steps", "expected options such as steps: 1000, found a list"),
        ("a: [", "is no YAML: "),
        ("a: !!python/object/apply:os._exit [77]", "is no YAML: "),
        ("model:\n  depth: 3", "options are not nested: give those below model beside each other, at the top"),
        ("model: {}\nrecipe: {}", "describes a finished run: give --resume"),
    ],
)
def test_mistakes_are_one_sentence_with_file_and_key(capsys, text, sentence):
    pytest.importorskip("yaml")
    Path("options.yaml").write_text(text)
    error = refused(capsys, "train", "--config", "options.yaml")
    assert error.startswith("nfkernels train: --config options.yaml")
    assert sentence in error


@pytest.mark.parametrize(
    ("name", "text"), [("options.yaml", "steps: 4\nlr: 1\nsteps: 5\n"), ("options.json", '{"steps": 4, "steps": 5}')]
)
def test_an_option_that_is_there_twice_is_refused(name, text):
    with pytest.raises(TrainingError, match=rf"^--config {name}: steps is there twice$"):
        read(text, name)


def test_files_that_are_none(capsys):
    Path("bad.json").write_text("{")
    Path("deep.json").write_text("[" * 100_000)
    Path("binary.json").write_bytes(b"\xff\xfe")
    Path("large.json").write_bytes(b" " * (2**20 + 1))
    for name in ("nowhere.yaml", "bad.json", "deep.json", "binary.json", "large.json", "."):
        assert f"--config {name}" in refused(capsys, "train", "--config", name)


def test_without_pyyaml_json_still_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    Path("options.yaml").write_text("steps: 3")
    with pytest.raises(TrainingError, match=r"needs PyYAML, .*nfkernels\[train\]"):
        read_config("options.yaml", TRAIN)
    assert read('{"steps": 3}', "options.json") == {"steps": 3}


def test_who_has_the_last_word():
    file = {"preset": "glow-cifar10", "lr": 0.5, "steps": 7, "size": None}
    asked = merged({"steps": 9}, file)
    assert (asked["steps"], asked["lr"], asked["depth"]) == (9, 0.5, PRESETS["glow-cifar10"]["depth"])
    assert "size" not in asked  # null takes back what the preset says
    assert merged({"preset": "glow-celeba"}, file)["levels"] == 6
    assert merged({}, {}) == {}


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize(
    "given", [{}, {"preset": "glow-celeba"}, {"lr": 1e-5, "data": "a: 'b' #é\n", "depth": (1, 2), "flip": True}]
)
def test_what_is_printed_can_be_read_again(form, given):
    text = as_text(merged(given, {}), form)
    again = read(text, f"options.{form}")
    assert as_text(merged({}, again), form) == text
    assert merged({}, again) == {
        **{name: option.default for name, option in TRAIN.items() if option.default is not None},
        **merged(given, {}),
    }


def test_print_config_needs_neither_torch_nor_data():
    code = (
        "import sys, types, importlib.util\n"
        "spec = importlib.util.find_spec('nfkernels')\n"
        "package = types.ModuleType('nfkernels')\n"
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['nfkernels'] = package\n"
        "import nfkernels.cli\n"
        "assert nfkernels.cli.main(['train', '--preset', 'glow-cifar10', '--print-config', 'json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["width"] == 512


def test_a_run_follows_its_file(capsys):
    for package in ("sklearn", "matplotlib", "PIL"):
        pytest.importorskip(package)
    options = {"steps": 2, "optimizer": "adamax", "betas": [0.8, 0.9], "kernel": 1, "out": "run", "progress": "none"}
    Path("options.json").write_text(json.dumps(options))
    assert cli.main(["train", *QUICK, "--config", "options.json", "--steps", "3", "--batch-size", "8"]) == 0
    assert "3 steps, " in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    recipe = config["recipe"]
    assert (recipe["steps"], recipe["optimizer"], recipe["betas"]) == (3, "adamax", [0.8, 0.9])
    assert config["model"]["kernel"] == 1


def test_every_field_is_an_option_with_its_default():
    for name in Recipe.names():
        assert TRAIN[name].default == getattr(Recipe(), name)
    for name in GlowShape.__dataclass_fields__:
        assert TRAIN[name].default == getattr(GlowShape(), name)
