"""`nfkernels evaluate`: levels, condition numbers, non-finite values, and what tells other data apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import QUICK, refused
from tiny import glow, stripes

from nfkernels import cli
from nfkernels.nn import Flow
from nfkernels.training import examination, load_images, split
from nfkernels.training.examination import examine

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Digits without classes."""
    threads = torch.get_num_threads()
    run = tmp_path_factory.mktemp("plain") / "run"
    assert cli.main(["train", *QUICK, "--steps", "30", "--out", str(run)]) == 0
    torch.set_num_threads(threads)
    return run


def told(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_levels_add_up_to_the_bits_per_dimension(capsys, digits_run):
    facts = json.loads(told(capsys, digits_run, "--draws", "3", "--json"))
    assert [(level["number"], level["latents"]) for level in facts["levels"]] == [(1, 32), (2, 32)]
    together = sum(level["bits_per_dim"] for level in facts["levels"])
    assert together == pytest.approx(facts["bits_per_dim"], abs=0.01)  # of one draw, and of three
    nats = sum(level["log_likelihood"] for level in facts["levels"])
    assert together == pytest.approx(math.log2(17) - nats / (64 * math.log(2)), abs=1e-6)
    said = told(capsys, digits_run, "--draws", "3")
    for level in facts["levels"]:
        assert f"of them level {level['number']}   {level['bits_per_dim']:.3f}   (32 latents)" in said


def test_the_worst_layers_are_named(capsys, digits_run, table_run):
    for run in (digits_run, table_run):
        facts = json.loads(told(capsys, run, "--draws", "1", "--json"))
        worst = facts["condition_numbers"]
        assert 1 <= len(worst) <= 3
        assert [row["value"] for row in worst] == sorted((row["value"] for row in worst), reverse=True)
        flow = Flow.load(run / "model.safetensors")
        assert all(type(flow.get_submodule(row["layer"])).__name__ == row["kind"] for row in worst)
        said = told(capsys, run, "--draws", "1")
        for row in worst:
            assert f"{row['value']:.1e}  {row['layer']} ({row['kind']})" in said


def test_the_share_of_non_finite_values(capsys, digits_run, table_run):
    for run in (digits_run, table_run):
        facts = json.loads(told(capsys, run, "--draws", "1", "--json"))
        assert facts["non_finite_share"] == 0
        assert set(facts["non_finite_share_of"]) == {"log-likelihoods", "latents", "reconstructions", "samples"}
        assert "non-finite values   0.00% of " in told(capsys, run, "--draws", "1")
    flow = glow().eval()
    flow.nll(stripes(64).images)

    def spoiled(z, context=None, **options):
        x = glow_inverse(z, context, **options)
        x[:, :, 0, 0] = math.nan
        return x

    glow_inverse, flow.decode_continuous = flow.decode_continuous, spoiled
    found = examine(flow, stripes(32).images, None)
    assert found.not_finite["reconstructions"] == (32, 512)
    assert found.not_finite["latents"] == (0, 512)
    assert found.lines()[-1].endswith("(32 reconstructions)")
    assert found.facts()["non_finite_share"] == pytest.approx(32 / found.values)


def test_other_images_are_told_apart(capsys, plain_run):
    out = told(capsys, plain_run, "--draws", "1", "--against", "digits", "--json")
    facts = json.loads(out)["against"]
    assert facts["data"].startswith("digits, test part, 297 images against 297")
    assert set(facts["auroc"]) == {"likelihood", "typicality", "complexity", "level 1", "level 2"}
    assert all(value == pytest.approx(0.5, abs=1e-9) for value in facts["auroc"].values())
    said = told(capsys, plain_run, "--draws", "1", "--against", "digits")
    assert "told apart by (area under the ROC curve; 1 always, 0.5 chance, below it the wrong way round)" in said
    assert "  likelihood          0.500   (-log p)" in said


def test_noise_is_told_from_digits(plain_run):
    flow = Flow.load(plain_run / "model.safetensors")
    _, held, test = split(load_images("digits"), seed=0)
    noise = torch.randint(0, 17, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = examination.told_apart(flow, (test.images, None), (noise, None), (held.images, None))
    assert found["likelihood"] > 0.9, "by a flow of thirty steps"


def test_another_table_is_told_apart(capsys, table_run):
    lines = ["height,children,wage,kind", *(f"{120 + i},{i % 5},{90000 + 100 * i},10" for i in range(40))]
    Path("other.csv").write_text("\n".join(lines))
    facts = json.loads(told(capsys, table_run, "--draws", "1", "--against", "other.csv", "--json"))["against"]
    assert facts["data"] == "other, all rows, 40 rows against 24"
    assert set(facts["auroc"]) == {"likelihood", "typicality"}
    assert facts["auroc"]["likelihood"] > 0.95
    assert "other, all rows, 40 rows against 24, told apart by" in told(capsys, table_run, "--against", "other.csv")


def test_a_flow_with_classes_needs_none_of_other_images(capsys, digits_run):
    import numpy

    numpy.savez("other.npz", images=numpy.zeros((4, 8, 8), numpy.uint8))
    assert "grey levels" in refused(capsys, "evaluate", digits_run, "--against", "other.npz")
    facts = json.loads(told(capsys, digits_run, "--draws", "1", "--against", "digits", "--json"))["against"]
    assert set(facts["auroc"]) == {"likelihood", "typicality", "complexity"}


def test_without_the_runs_own_data_there_is_no_typicality(capsys, plain_run):
    model = plain_run / "model.safetensors"
    out = told(capsys, model, "--data", "digits", "--against", "digits", "--draws", "1", "--json")
    assert set(json.loads(out)["against"]["auroc"]) == {"likelihood", "complexity", "level 1", "level 2"}


def test_mistakes_are_one_sentence(capsys, digits_run, table_run):
    assert "nowhere" in refused(capsys, "evaluate", digits_run, "--draws", "1", "--against", "nowhere")
    Path("less.csv").write_text("height,children,wage\n1,2,3\n")
    assert "has no column 'kind'" in refused(capsys, "evaluate", table_run, "--against", "less.csv")


def test_only_so_many_are_scored():
    x = torch.zeros(5000, 1, 4, 4)
    assert len(examination.scored((x, None))[0]) == 2000
    assert len(examination.scored((x, torch.zeros(5000)))[1]) == 2000
    assert len(examination.scored((torch.empty(500, 3, 512, 512, device="meta"), None))[0]) == 200
