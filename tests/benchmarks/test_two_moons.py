"""Two moons by two libraries: they start alike, the gate sees it when they do not, and the command runs."""

import json

import pytest
import torch

pytest.importorskip("nflows")

from benchmarks import demo
from benchmarks.__main__ import main
from nfkernels.nn import Chain, Flow, LULinear, StandardNormal
from nfkernels.training.data.toy import TOYS
from nfkernels.training.demo.flow import build

MOONS = TOYS["moons"]


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return build("NSF", MOONS.sample(1000, seed=0), layers=3, width=16)


def test_both_models_are_one_function(ours):
    theirs = demo.in_nflows(ours)
    points = MOONS.sample(300, seed=1)
    assert demo.start_error(ours, theirs, points) < 1e-4
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert all(a is not b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_gate_sees_another_model(ours):
    theirs = demo.in_nflows(ours)
    theirs._transform._transforms[2].tail_bound = 2.9
    assert demo.start_error(ours, theirs, MOONS.sample(300, seed=1)) > 1e-2


def test_a_layer_without_a_counterpart_is_named():
    with pytest.raises(ValueError, match="no LULinear in the nflows model"):
        demo.in_nflows(Flow(Chain(LULinear(2)), StandardNormal(2)))


def test_training_sees_the_same_batches(ours):
    """One step of both, from the same weights, leads to the same weights."""
    data, theirs = MOONS.sample(1000, seed=0), demo.in_nflows(ours)
    before = [p.detach().clone() for p in ours.parameters()]
    for model in (ours, theirs):
        demo.train(model, data, 5, 2, 64)
    changes = [(a - b).abs().max().item() for a, b in zip(ours.parameters(), before, strict=True)]
    assert max(changes) > 1e-5
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_command_from_end_to_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("*/demo-*-abc.json")
    data = json.loads(path.read_text())
    assert data["finished"]
    assert data["quick"]
    (entry,) = data["seeds"]
    assert set(entry["contenders"]) == {"nfkernels", "nflows"}
    assert entry["contenders"]["nfkernels"]["nats"] == pytest.approx(entry["contenders"]["nflows"]["nats"], abs=1e-2)
    said = capsys.readouterr().out
    assert "times as fast" in said
    assert "seed 0: nfkernels -" in said


def test_worse_is_told_by_the_exit_status():
    def entries(gap):
        return [{"contenders": {"nfkernels": {"nats": -1.0 - gap}, "nflows": {"nats": -1.0}}}]

    assert demo.worse(entries(0.03))
    assert not demo.worse(entries(0.01))
    assert not demo.worse([{"contenders": {"nfkernels": {"nats": -9.0}}}])
