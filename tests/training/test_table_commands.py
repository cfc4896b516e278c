"""nfkernels train | sample | evaluate on a table, as a stranger meets them."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import numpy
import pytest
import torch
from command_line import QUICK, TABLE, copied, refused

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.nn import Flow, TableFlow  # noqa: E402
from nfkernels.training import commands  # noqa: E402
from nfkernels.training.data.table import read_table  # noqa: E402
from nfkernels.training.options import TRAIN  # noqa: E402
from nfkernels.training.tables.columns import load_table  # noqa: E402
from nfkernels.training.tables.kind import MODELS  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


def entries(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_train_writes_a_run_and_says_what_came_out(capsys, people):
    assert cli.main(["train", "--data", str(people), *TABLE]) == 0
    said = capsys.readouterr()
    for part in (
        "people: 192 rows to train on, 24 for validation, 24 for the test (4 columns: height, children, wage, kind)",
        "note   constant, so not modelled but put back into samples: year = 2020",
        "note   whole numbers, trained on with uniform noise and rounded in samples: children",
        "model  NSF: 2 layers, networks of 1 x 8, 4 bins; ",
        "negative log-likelihood of 24 test rows, lower is better, mean of 20 draws of the noise",
        "in data units                of standardised columns",
        "than the Gaussian\n",
        "nfkernels sample runs/people-1 --count 1000 --out samples.csv\n",
    ):  # fmt: skip
        assert part in said.out
    assert "step 3/6, nats " in said.err
    assert "rows/s" in said.err
    assert sorted(os.listdir("runs/people-1")) == [
        "checkpoint.safetensors",
        "config.json",
        "corner.png",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "timing.jsonl",
    ]
    last = entries("runs/people-1")[-1]
    assert f"{last['test_nll']:.3f} +- {last['test_standard_error']:.3f}" in said.out
    columns = json.loads(Path("runs/people-1/config.json").read_text())["model"]["columns"]
    scales = numpy.array([column["scale"] for column in columns if column["kind"] != "constant"])
    assert last["test_nll"] - last["test_nll_standardized"] == pytest.approx(numpy.log(scales).sum())
    assert last["test_bits_per_dim"] == pytest.approx(last["test_nll"] / 4 / numpy.log(2))
    assert last["mixture_components"] in (1, 2, 4, 8, 16, 32)

    # The same again: the next folder, and the same metrics to the last bit.
    assert cli.main(["train", "--data", str(people), *TABLE, "--quiet"]) == 0
    assert Path("runs/people-2/metrics.jsonl").read_bytes() == Path("runs/people-1/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_conditionally(capsys, people, model):
    options = ["--model", model, "--columns", "height,children", "--context", "wage,kind", "--dropout", "0"]
    small = [*QUICK, "--layers", "2", "--batch-size", "32", *(["--bins", "4"] if "nsf" in model else [])]
    assert cli.main(["train", "--data", str(people), *small, *options, "--quiet", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "(2 columns: height, children, given wage, kind)" in said
    assert "than the conditional Gaussian" in said
    assert "--out samples.csv --context wage=" in said
    flow = Flow.load("run/model.safetensors")
    assert (flow.names, flow.context_names) == (["height", "children"], ["wage", "kind"])
    assert cli.main(["sample", "run", "--count", "3", "--context", "wage=3000,kind=9"]) == 0
    assert cli.main(["evaluate", "run", "--draws", "1"]) == 0


@pytest.mark.parametrize("columns", ["height", "children"])
def test_a_single_column(capsys, people, columns):
    assert cli.main(["train", "--data", str(people), *TABLE, "--columns", columns, "--quiet", "--out", "run"]) == 0
    assert f"(1 column: {columns})" in capsys.readouterr().out
    assert cli.main(["sample", "run"]) == 0
    assert len(read_table("run/samples.csv")) == 1000
    error = refused(capsys, "train", "--data", people, "--columns", columns, "--model", "realnvp")
    assert "needs two columns or more" in error


def test_angles_come_back_within_their_period(capsys):
    random = numpy.random.default_rng(0)
    phi, hour = random.vonmises(3.0, 2.0, 200), random.integers(20, 27, 200) % 24
    rows = zip(phi, hour, random.normal(size=200), strict=True)
    Path("t.csv").write_text("\n".join(["phi,hour,x", *(f"{a:.6g},{b},{c:.6g}" for a, b, c in rows)]))
    angles = ["--data", "t.csv", "--circular", "phi,hour=24"]
    assert cli.main(["train", *angles, *TABLE, "--quiet", "--out", "run"]) == 0
    assert (
        "note   angles, of which the two ends are one: phi (period 6.28319), hour (period 24)"
        in capsys.readouterr().out
    )
    assert cli.main(["sample", "run", "--count", "500", "--temperature", "2"]) == 0
    drawn = read_table("run/samples.csv").values
    assert -numpy.pi <= drawn[:, 0].min() < drawn[:, 0].max() <= numpy.pi
    assert set(drawn[:, 1]) <= set(range(24))
    flow = Flow.load("run/model.safetensors")
    x = torch.tensor([[1.0, 3.0, 0.0]])
    turned = flow.log_prob(x + torch.tensor([[2 * numpy.pi, -24.0, 0.0]]).float())
    torch.testing.assert_close(turned, flow.log_prob(x), rtol=0, atol=1e-4)
    assert cli.main(["train", "--resume", "run", "--circular", "phi,hour=24", "--quiet"]) == 0
    assert "--circular phi differs from the run's phi,hour=24" in refused(
        capsys, "train", "--resume", "run", "--circular", "phi"
    )
    assert "--circular needs --model nsf" in refused(capsys, "train", *angles, "--model", "maf")
    assert "has no column 'q' to model" in refused(capsys, "train", "--data", "t.csv", "--circular", "q")
    assert "expected a positive period" in refused(capsys, "train", "--data", "t.csv", "--circular", "phi=x")
    sentence = refused(capsys, "train", "--data", "t.csv", "--circular", "phi", "--context", "phi")
    assert "phi is a condition" in sentence


def test_resume_finishes_what_was_stopped(capsys, monkeypatch, people):
    assert cli.main(["train", "--data", str(people), *TABLE, "--out", "straight"]) == 0
    real = commands.fit

    def stopped(*arguments, **options):
        def interrupt(now):
            if now.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(*arguments, callback=interrupt, **options)

    monkeypatch.setattr(commands, "fit", stopped)
    assert cli.main(["train", "--data", str(people), *TABLE, "--out", "parts"]) == 128 + signal.SIGTERM
    assert "nfkernels train --resume parts" in capsys.readouterr().out
    assert not os.path.exists("parts/corner.png")
    monkeypatch.setattr(commands, "fit", real)
    for _ in range(2):  # a finished run may be resumed, too: it evaluates again
        assert cli.main(["train", "--resume", "parts"]) == 0
        assert Path("parts/metrics.jsonl").read_bytes() == Path("straight/metrics.jsonl").read_bytes()
    ours, theirs = (Flow.load(f"{run}/model.safetensors").state_dict() for run in ("parts", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert os.path.exists("parts/corner.png")


def test_resume_refuses_another_run(capsys, people, table_run):
    def sentence(*more):
        return refused(capsys, "train", "--resume", table_run, *more)

    assert "--width 9 differs from the run's 8" in sentence("--width", 9)
    assert "--model maf differs from the run's nsf" in sentence("--model", "maf")
    assert "--context wage differs from the run's kind" in sentence("--context", "wage")
    assert "--columns wage: the run has none" in sentence("--columns", "wage")
    assert "--levels is for images" in sentence("--levels", 2)
    assert "--lr 0.5 differs from the run's 0.001" in sentence("--lr", "0.5")
    Path("other.csv").write_text(people.read_text().replace("2020", "2021").replace("\n1", "\n2"))
    assert "the train data is not what" in sentence("--data", "other.csv")
    assert cli.main(["train", "--resume", str(table_run), "--data", str(people), "--context", "kind"]) == 0


# --- sample -----------------------------------------------------------------------------------------------------------


def test_samples_are_rows_of_the_table_in_every_format(capsys, table_run):
    pytest.importorskip("pyarrow")
    for name in ("a.csv", "a.npy", "a.parquet"):
        arguments = ["sample", str(table_run), "--count", "50", "--context", "kind=11.5", "--out", name, "--seed", "3"]
        assert cli.main(arguments) == 0
    assert "(columns height, children, wage, year, kind)" in capsys.readouterr().out
    tables = [read_table(name) for name in ("a.csv", "a.npy", "a.parquet")]
    assert tables[0].names == tables[2].names == ("height", "children", "wage", "year", "kind")
    for table in tables:
        assert table.values.shape == (50, 5)
        numpy.testing.assert_allclose(table.values, tables[2].values, rtol=1e-6)
        assert (table.values[:, 1] == numpy.round(table.values[:, 1])).all()
        assert (table.values[:, 3:] == [2020, 11.5]).all()
    with open("a.csv") as file:
        first = list(csv.reader(file))[1]
    assert "." not in first[1] + first[3]
    from pyarrow import parquet

    kinds = {field.name: str(field.type) for field in parquet.read_schema("a.parquet")}
    assert kinds == {"height": "double", "children": "int64", "wage": "double", "year": "int64", "kind": "double"}
    flow = Flow.load(table_run / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    own = flow.sample(1, torch.full((50, 1), 11.5), generator=generator)[0]
    numpy.testing.assert_allclose(tables[2].values[:, 0], own[:, 0].numpy(), rtol=1e-5)
    numpy.testing.assert_allclose(tables[2].values[:, 1], own[:, 1].round().numpy())


def test_a_file_of_conditions(table_run):
    Path("given.csv").write_text("other,kind\n1,5\n1,15\n")
    assert cli.main(["sample", str(table_run), "--context", "given.csv", "--out", "a.csv"]) == 0
    assert read_table("a.csv", columns=["kind"]).values.tolist() == [[5], [15]]
    assert cli.main(["sample", str(table_run), "--context", "given.csv", "--count", "2", "--out", "a.csv"]) == 0
    assert read_table("a.csv", columns=["kind"]).values[:, 0].tolist() == [5, 5, 15, 15]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "is conditioned on kind: give --context kind=..., or a file with this column"),
        (["--context", "wage=3"], "--context wage: the flow of"),
        (["--context", "kind=3,kind=4"], "kind is there twice"),
        (["--context", "kind=x"], "--context kind=x: expected a number"),
        (["--context", "nowhere.csv"], "expected kind=..., or a file (which is not there)"),
        (["--context", "kind=1", "--out", "x.txt"], "--out x.txt: expected a name that ends in .csv, .npy or .parquet"),
        (["--context", "kind=1", "--out", "no/x.csv"], "there is no folder no"),
        (["--class", "3"], "--class is for images"),
        (["--temperatures", "1,2"], "--temperatures is for images"),
        (["--npz", "x.npz"], "--npz is for images"),
    ],
)
def test_sample_mistakes_are_one_sentence(capsys, table_run, arguments, sentence):
    assert sentence in refused(capsys, "sample", table_run, *arguments)


def test_what_is_for_the_other_kind_of_data_is_refused(capsys, people, table_run, digits_run):
    assert "is a flow over a table" in refused(capsys, "interpolate", table_run)
    assert "--importance-samples is for images" in refused(capsys, "evaluate", table_run, "--importance-samples", 2)
    assert "--columns is for tables" in refused(capsys, "train", "--resume", digits_run, "--columns", "a")
    assert "--model maf differs from the run's glow" in refused(
        capsys, "train", "--resume", digits_run, "--model", "maf"
    )
    assert "--context is for tables" in refused(capsys, "sample", digits_run, "--context", "a=1")
    assert "--out is for tables" in refused(capsys, "evaluate", digits_run, "--out", "x.csv")
    assert "--kernel is for images" in refused(capsys, "train", "--data", people, "--kernel", 5)
    assert "give --context with the column" in refused(capsys, "train", "--data", people, "--classes")
    assert "--bins is for tables, and digits is" in refused(capsys, "train", *QUICK, "--bins", 5)
    assert "--model nsf is for tables: give --data" in refused(capsys, "train", "--model", "nsf")
    assert "for a table give one number" in refused(capsys, "train", "--data", people, "--depth", "1,2")
    assert "gone.csv does not exist" in refused(capsys, "train", "--data", "gone.csv")
    assert not os.path.exists("runs")


def test_a_model_file_alone_is_enough(capsys, table_run, people):
    model = table_run / "model.safetensors"
    assert cli.main(["sample", str(model), "--context", "kind=9"]) == 0
    assert len(read_table("samples.csv")) == 1000
    assert "give --data" in refused(capsys, "evaluate", model)
    assert cli.main(["evaluate", str(model), "--data", str(people)]) == 0


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_measures_in_data_units(capsys, people, table_run):
    flow = Flow.load(table_run / "model.safetensors")
    assert isinstance(flow, TableFlow)
    assert cli.main(["evaluate", str(table_run), "--json", "--out", "test.csv"]) == 0
    facts = json.loads(capsys.readouterr().out)
    last = entries(table_run)[-1]
    assert (facts["part"], facts["rows"], facts["draws"]) == ("test part", 24, 20)
    assert facts["nll"] == pytest.approx(last["test_nll"], rel=1e-5)
    assert facts["nll_standardized"] == pytest.approx(last["test_nll_standardized"], rel=1e-5)
    assert 0 <= facts["round_trip_error"] < 1e-3
    written = read_table("test.csv").values
    assert -written[:, 1].mean() == pytest.approx(facts["nll"], rel=1e-5)
    table = load_table(people, context=["kind"])
    assert written[:, 0].tolist() == sorted((table.test.index + 1).tolist())
    # All rows of another table: of columns by name, in whatever order.
    numbers = read_table(people, columns=["kind", "wage", "children", "height"]).values[:7]
    lines = ["kind,wage,children,height", *(",".join(f"{v:.7g}" for v in row) for row in numbers)]
    Path("other.csv").write_text("\n".join(lines))
    assert cli.main(["evaluate", str(table_run), "--data", "other.csv", "--out", "o.npy", "--draws", "400"]) == 0
    assert "other, all rows, 7 rows, networks in float32" in capsys.readouterr().out
    x, context = torch.tensor(numbers[:, [3, 2, 1]]).float(), torch.tensor(numbers[:, :1]).float()
    noisy = [flow.log_prob(x + flow.noise(x), context) for _ in range(400)]
    expected = torch.stack(noisy).mean(0)
    numpy.testing.assert_allclose(numpy.load("o.npy")[:, 1], expected.detach(), atol=0.05)


def test_evaluate_mistakes_are_one_sentence(capsys, table_run):
    Path("less.csv").write_text("height,children,wage\n1,2,3\n")
    assert "has no column 'kind'" in refused(capsys, "evaluate", table_run, "--data", "less.csv")
    Path("gaps.csv").write_text("height,children,wage,kind\n170,2,3000,\n170,2,3000,9\n")
    told = refused(capsys, "evaluate", table_run, "--data", "gaps.csv")
    assert "1 of 2 rows lack a value (kind: 1): give --missing drop to leave these rows out" in told
    assert "--columns" not in told, "which is an option of train"
    told = refused(capsys, "sample", table_run, "--context", "gaps.csv")
    assert "1 of 2 rows lack a value (kind: 1): take these rows out" in told
    assert "--" not in told.partition("lack a value")[2]
    Path("far.csv").write_text("height,children,wage,kind\n170,2,inf,1\n170,2,3000,9\n")
    told = refused(capsys, "evaluate", table_run, "--data", "far.csv")
    assert "column 'wage' has 1 infinite value, the first in row 1: take these rows out" in told
    assert "--columns" not in told
    assert cli.main(["evaluate", str(table_run), "--data", "gaps.csv", "--missing", "drop", "--out", "l.csv"]) == 0
    assert "note: 1 of 2 rows lack a value and were left out" in capsys.readouterr().out
    assert read_table("l.csv").values[:, 0].tolist() == [2]
    assert "expected a name that ends in" in refused(capsys, "evaluate", table_run, "--out", "x")


# --- what all runs have -----------------------------------------------------------------------------------------------


def test_files_of_options_and_the_defaults_for_tables(capsys, people):
    Path("o.json").write_text(json.dumps({"data": str(people), "context": ["kind"], "steps": 7}))
    assert cli.main(["train", "--config", "o.json", "--print-config", "json", "--columns", "height,wage"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["columns"], printed["context"], printed["steps"]) == (["height", "wage"], ["kind"], 7)
    for name in ("lr", "batch_size", "dropout", "weight_decay", "depth", "patience"):
        assert printed[name] == TRAIN[name].table
    Path("all.json").write_text(json.dumps(printed | {"width": 8, "layers": 1, "out": "run"}))
    assert cli.main(["train", "--config", "all.json", "--quiet", "--threads", "1"]) == 0
    assert json.loads(Path("run/config.json").read_text())["recipe"]["batch_size"] == TRAIN["batch_size"].table
    assert cli.main(["train", "--print-config", "json"]) == 0  # images are as they were
    assert json.loads(capsys.readouterr().out.rpartition("nfkernels evaluate run\n")[2])["lr"] == 8e-3


def test_damaged_configurations_are_told(capsys, table_run):
    config = json.loads((table_run / "config.json").read_text())
    run = copied(table_run)
    for data, sentence in (
        ({"kind": "table", "source": "gone.csv"}, "gone.csv, is not there any more: if it moved, give --data PATH"),
        ({"kind": "table", "source": str(run / "config.json")}, "does not say what data it used ('columns')"),
        ({"kind": "table", "source": 3}, "has no usable 'source'"),
    ):
        (run / "config.json").write_text(json.dumps(config | {"data": data}))
        assert sentence in refused(capsys, "evaluate", run)


def test_the_board_shows_every_column(people):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--data", str(people), *TABLE, "--context", "kind", "--quiet"]
    assert cli.main(["train", *options, "--out", "with", "--tensorboard"]) == 0
    assert cli.main(["train", *options, "--out", "without"]) == 0
    assert Path("with/metrics.jsonl").read_bytes() == Path("without/metrics.jsonl").read_bytes()
    read = EventAccumulator("with/tensorboard")
    read.Reload()
    assert [event.step for event in read.Scalars("loss/validation")] == [3, 6]
    assert set(read.Tags()["histograms"]) == {"samples/height", "samples/children", "samples/wage"}


def test_missing_packages_are_told_before_the_training(capsys, monkeypatch, people):
    for module in ("matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
        assert 'pip install "nfkernels[train]"' in refused(capsys, "train", "--data", people, *TABLE)
        monkeypatch.undo()


def test_far_numbers_come_back_with_their_digits(people):
    x = 1.7e9 + 3 * numpy.random.default_rng(0).normal(size=(100, 2))
    numpy.save("far.npy", x)
    assert cli.main(["train", "--data", "far.npy", *TABLE, "--quiet", "--out", "run"]) == 0
    last = entries("run")[-1]
    assert 2 < last["test_nll"] < 20
    assert cli.main(["sample", "run", "--out", "s.csv"]) == 0
    drawn = read_table("s.csv").values
    assert 1 < drawn[:, 0].std() < 10
    assert len(numpy.unique(drawn[:, 0])) > 900


def test_angles_of_another_table_are_brought_to_the_same_turn(capsys):
    random = numpy.random.default_rng(0)
    phi, x = random.uniform(0, 2 * numpy.pi, 100), random.normal(size=100)
    for path, angles in (("a.npy", phi), ("b.npy", phi), ("turned.npy", numpy.where(phi > 3, phi - 2 * numpy.pi, phi))):
        numpy.save(path, numpy.stack([angles, x], 1))
    assert cli.main(["train", "--data", "a.npy", "--circular", "x1", *TABLE, "--quiet", "--out", "run"]) == 0
    found = []
    for path in ("b.npy", "turned.npy"):
        capsys.readouterr()
        assert cli.main(["evaluate", "run", "--data", path, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["nll"] == pytest.approx(found[0]["nll"], abs=1e-5)
    assert found[1]["round_trip_error"] < 1e-3


def test_many_conditions_fit_on_one_line(capsys):
    names = [f"condition{at}" for at in range(20)] + ["a=1"]
    values = numpy.random.default_rng(0).normal(size=(60, 22))
    numpy.savetxt("wide.csv", values, delimiter=",", header=",".join([*names, "y"]), comments="")
    assert cli.main(["train", "--data", "wide.csv", "--context", ",".join(names), *TABLE, "--quiet", "--out", "r"]) == 0
    given = ",".join(f"{name}=0.123456789" for name in names)
    assert cli.main(["sample", "r", "--context", given, "--count", "3", "--out", "s.csv"]) == 0
    numpy.testing.assert_allclose(read_table("s.csv", columns=names).values, 0.123456789)
    assert "--circular y: the run has none" in refused(capsys, "train", "--resume", "r", "--circular", "y")


def test_what_is_no_table_is_not_called_a_set_of_images(capsys):
    sentence = refused(capsys, "train", "--data", "x.csv.gz", "--bins", 5)
    assert "--bins is for tables, and x.csv.gz is not taken for a table: expected .csv" in sentence
    sentence = refused(capsys, "train", "--data", "x.csv", "--model", "glow", "--bins", 5)
    assert "--bins is for tables, and --model glow is for images" in sentence


def test_the_suggested_condition_is_one_of_the_middle(capsys):
    random = numpy.random.default_rng(0)
    numpy.save("days.npy", numpy.stack([2460000.53 + 0.1 * random.normal(size=60), random.normal(size=60)], 1))
    assert cli.main(["train", "--data", "days.npy", "--context", "x1", *TABLE, "--quiet", "--out", "r"]) == 0
    suggested = capsys.readouterr().out.partition("--context x1=")[2].split()[0]
    assert abs(float(suggested) - 2460000.53) < 0.1


def test_an_option_that_the_model_has_no_use_for_is_refused(capsys, people):
    maf = ["train", "--data", people, "--model", "maf", "--layers", 1, "--width", 4, "--steps", 1, "--progress", "none"]
    assert "--bins 9 is for --model nsf, nsf-ar: maf has no use for it" in refused(capsys, *maf, "--bins", 9)
    assert "--bound 5.0 is for --model nsf, nsf-ar" in refused(capsys, *maf, "--bound", 5)
    assert cli.main([*map(str, maf), "--bins", str(TRAIN["bins"].default), "--out", "run", "--quiet"]) == 0
    assert "--bins 9 is for" in refused(capsys, "train", "--resume", "run", "--bins", 9)
