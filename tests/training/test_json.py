"""--json: one object on stdout that tells what the words tell, and nothing else anywhere."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import QUICK, TABLE

for package in ("sklearn", "matplotlib", "PIL"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.training import commands  # noqa: E402
from nfkernels.training.as_json import print_json  # noqa: E402
from nfkernels.training.progress import wish_of  # noqa: E402
from nfkernels.training.run_folder import RunFolder  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def told(capsys):
    def told(*arguments, status=0):
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json"]) == status
        said = capsys.readouterr()
        assert said.err == ""
        return json.loads(said.out)

    return told


def test_train_on_images(told):
    facts = told("train", *QUICK)
    assert (facts["run"], facts["stopped"], facts["signal"]) == ("runs/digits-1", "steps", None)
    assert (facts["steps"], facts["unit"], facts["test_images"]) == (6, "bits/dim", 297)
    assert facts["best_validation"] <= facts["validation"]
    assert facts["test_bpd"] > 0 < facts["test_standard_error"]
    assert facts["uniform_bpd"] == pytest.approx(math.log2(17), abs=1e-3)
    assert 0 < facts["seconds"] < 600
    assert all(os.path.exists(file) for file in facts["written"])
    last = json.loads(Path("runs/digits-1/metrics.jsonl").read_text().splitlines()[-1])
    assert "step" not in facts
    assert facts.items() >= {name: value for name, value in last.items() if name != "step"}.items()


def test_train_on_a_table(told, people):
    facts = told("train", "--data", people, *TABLE, "--out", "run")
    assert (facts["run"], facts["unit"], facts["test_rows"]) == ("run", "nats", 24)
    assert facts["test_nll"] != facts["gaussian_nll"]
    assert "run/corner.png" in facts["written"]


def test_a_run_that_was_stopped(told, monkeypatch):
    real = commands.fit
    stop = {"callback": lambda now: now.step == 4 and os.kill(os.getpid(), signal.SIGTERM)}
    monkeypatch.setattr(commands, "fit", lambda *arguments, **options: real(*arguments, **stop, **options))
    facts = told("train", *QUICK, "--out", "run", status=128 + signal.SIGTERM)
    assert (facts["run"], facts["stopped"], facts["signal"], facts["steps"]) == ("run", "signal", "SIGTERM", 4)


def test_a_bar_or_lines_only_where_somebody_looks(capsys, monkeypatch):
    """Progress is never on stdout, and beside --json only where it was asked for or a terminal shows it."""
    assert cli.main(["train", *QUICK, "--json", "--progress", "lines", "--out", "a"]) == 0
    said = capsys.readouterr()
    assert "step 3/6" in said.err
    assert json.loads(said.out)["run"] == "a"
    assert cli.main(["train", *QUICK, "--out", "b"]) == 0  # not a terminal: no bar, nothing that moves or has colour
    said = capsys.readouterr()
    assert said.err.splitlines()[0].startswith("step 2/6, bpd ")
    assert not {"\r", "\x1b", "|"} & set(said.out + said.err)
    wishes = {(option, json): wish_of(option, json=json) for option in (None, "auto", "bar", "none") for json in (0, 1)}
    assert wishes == {
        (None, 0): "auto", (None, 1): False, ("auto", 0): "auto", ("auto", 1): False,
        ("bar", 0): "bar", ("bar", 1): "bar", ("none", 0): False, ("none", 1): False,
    }  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert wish_of(None, json=True) == "auto"


def test_a_trained_flow_of_images(told, digits_run):
    facts = told("sample", digits_run, "--count", 3, "--class", 2, "--npz", "x.npz", "--out", "x.png")
    assert facts == {
        "images": 3, "temperatures": [1.0], "seed": 0, "class": "2", "written": ["x.png", "x.npz"],
    }  # fmt: skip
    facts = told("sample", digits_run, "--count", 2, "--temperatures", "0.5,1")
    assert (facts["images"], facts["temperatures"]) == (4, [0.5, 1.0])
    facts = told("interpolate", digits_run, "--pairs", 2, "--steps", 3, "--out", "y.png")
    assert (facts["rows"], facts["images_per_row"], facts["written"]) == (2, 3, ["y.png"])
    facts = told("evaluate", digits_run, "--draws", 1)
    assert (facts["images"], facts["draws"]) == (297, 1)


def test_a_trained_flow_of_a_table(told, table_run):
    facts = told("sample", table_run, "--context", "kind=9", "--count", 5, "--out", "x.csv")
    columns = ["height", "children", "wage", "year", "kind"]
    assert facts == {"rows": 5, "columns": columns, "temperature": 1.0, "seed": 0, "written": ["x.csv"]}
    facts = told("evaluate", table_run, "--out", "y.csv")
    assert (facts["written"], facts["notes"]) == (["y.csv"], [])


def test_what_json_has_no_word_for(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.0], "c": {"d": Path("x/y")}, "e": (True, None, "ü")})
    assert json.loads(capsys.readouterr().out) == {
        "a": None, "b": [None, 1.0], "c": {"d": "x/y"}, "e": [True, None, "ü"],
    }  # fmt: skip


def test_metrics_are_json_whatever_they_are(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 3, "test_bpd": math.nan, "test_standard_error": math.inf})
    assert folder.metrics.read_text() == '{"step": 3, "test_bpd": null, "test_standard_error": null}\n'
