"""Other libraries' models before and after accelerate: cases run, the gate shuts, the page tells what got slower."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.peers import curves, page
from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.measure import QUICK, in_turns, measure
from benchmarks.peers.stand_in import without_networks

CPU = torch.device("cpu")
HERE = [c.id for c in CASES if importlib.util.find_spec(c.library) is not None and c.library != "sbi"]


OFTEN = ("nflows-nsf", "zuko-nsf")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.exhaustive]) for name in HERE]
)
def test_a_case_runs(name, tmp_path):
    """Slower is nothing that a quick run can tell."""
    code = main(["peers", "--quick", "--case", name, "--out", str(tmp_path), "--commit", "abc", "--steps", "3"])
    (path,) = tmp_path.glob("*/peers-2*-abc.json")
    entries = {e["id"]: e for e in json.loads(path.read_text())["cases"]}
    entry = entries[name]
    assert code == 0, entry
    assert (entry["status"], entry["gate"], entry["lacks"]) == ("measured", "passed", {})
    assert {"step", "log_prob", "outside"} <= set(entry["measures"])
    assert entry["curves"]["float64"] <= 1e-9
    assert len(entry["curves"]["after"]) == 3
    assert min(entry["memory"]["peak_bytes"] + entry["memory"]["saved_bytes"]) > 0


def test_a_case_that_is_not_there(capsys):
    assert main(["peers", "--case", "nothing such"]) == 2
    assert "there is no case nothing such; there are nflows-nsf, " in capsys.readouterr().err


# --- the gate ---------------------------------------------------------------------------------------------------------


class Flow(nn.Module):
    """One affine layer, whose loss may be off when it is 'accelerated'."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.off = 0.0

    def log_prob(self, x):
        return -(x * self.net(x).exp()).square().sum(1) + self.net(x).sum(1) + self.off


def toy(**changes):
    options = {
        "id": "toy", "text": "toy", "library": "torch", "build": lambda quick: Flow(), "batch": 8,
        "data": lambda rows, generator, quick: (torch.randn(rows, 3, generator=generator),),
        "loss": lambda m, x: -m.log_prob(x).mean(), "log_prob": lambda m, x: m.log_prob(x),
        "networks": lambda m: [(m, "net")],
    }  # fmt: skip
    return Case(**(options | changes))


class Report(list):
    notes = ()


def measured(case, monkeypatch, change=lambda model: None):
    monkeypatch.setattr("nfkernels.accelerate", lambda model, *a, **k: (change(model), Report())[1])
    return measure(case, pace=QUICK, device=CPU, quick=True, steps=10, save=lambda entry: None)


def test_a_model_that_stays_what_it_is_passes(monkeypatch):
    entry = measured(toy(), monkeypatch)
    assert entry["status"] == "measured", entry
    assert entry["curves"]["float64"] == entry["curves"]["float32"] == 0
    assert entry["curves"]["nudged"] > 0


def test_a_density_that_moved_is_not_timed(monkeypatch):
    entry = measured(toy(), monkeypatch, lambda model: setattr(model, "off", 1e-5))
    assert entry["status"] == "wrong"
    assert entry["reason"].startswith("log_prob in float64 differs by")
    assert not entry["measures"]


def test_a_gradient_off_by_a_factor_is_not_timed(monkeypatch):
    """Adam does not see it: the curves would be the same."""
    entry = measured(toy(), monkeypatch, lambda model: model.net.weight.register_hook(lambda g: g * 1.001))
    assert entry["status"] == "wrong"
    assert entry["reason"].startswith("the gradient of net.weight in float64 differs by")


def test_a_training_that_parted_is_not_timed(monkeypatch):
    """Right at the first call, and off from the third step on."""

    def later(model):
        calls = []

        def hook(gradient):
            calls.append(0)
            return gradient * torch.tensor([1.0, 1.5, 2.0]) * len(calls) if len(calls) > 2 else gradient

        model.net.weight.register_hook(hook)

    entry = measured(toy(), monkeypatch, later)
    assert entry["status"] == "wrong"
    assert entry["reason"].startswith("float64 losses part by")


def test_curves_part_where_one_is_not_finite():
    assert curves.apart([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert curves.apart([math.nan, 100.0], [math.nan, 101.0]) == pytest.approx(1 / 101)


def test_a_nudge_is_one_unit_in_the_last_place():
    model = Flow()
    before = model.net.weight.detach().clone()
    curves.nudge(model, 0)
    change = (model.net.weight - before).abs() / before.abs()
    assert ((change > 0) & (change < 1.3e-7)).all()


def test_where_training_parts_by_itself_a_nudge_says_how_far(monkeypatch):
    """A model that doubles every difference in each step: no two roundings of it end alike."""
    wild = toy(loss=lambda m, x: torch.sin(1e13 * m.net.weight.sum()) - m.log_prob(x).mean())
    made = lambda fast, dtype: (torch.manual_seed(0), Flow().to(dtype))[1]  # noqa: E731

    def other(fast, dtype):
        model = made(fast, dtype)
        if fast:
            curves.nudge(model, 9)
        return model

    assert curves.compare(wild, other, 5, 8, True)["gate"] == "passed"
    assert curves.compare(toy(), other, 5, 8, True)["float64"] < 1e-9
    calm = curves.compare(toy(), lambda f, d: made(f, d) if not f else _moved_by(made(f, d), 1e-6), 5, 8, True)
    assert calm["gate"].startswith("float64 losses part by")


def _moved_by(model, step):
    with torch.no_grad():
        model.net.weight += step
    return model


# --- stand-ins and turns ----------------------------------------------------------------------------------------------


def test_stand_ins_return_what_the_network_did():
    model, x = Flow(), torch.randn(4, 3)
    expected = model.log_prob(x)
    given = x.clone().requires_grad_()
    (stand_in,) = without_networks(model, [(model, "net")], lambda: model.log_prob(x), fresh=False)
    out = model.log_prob(given)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert stand_in.calls == 2
    assert model.net.in_features == 3  # asked of the network behind it
    assert given.grad is not None


def test_the_factor_is_before_over_after():
    import time

    found = in_turns([lambda: time.sleep(0.01), lambda: time.sleep(0.002)], QUICK, CPU)
    assert 2 < found["ratio"]["median"] < 6
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]


# --- the page ---------------------------------------------------------------------------------------------------------


def made_up(ratio, **changes):
    m = {"before_ms": {"median": 10.0 * ratio}, "after_ms": {"median": 10.0}, "rounds": 9,
         "ratio": {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}}  # fmt: skip
    return {
        "id": "a", "text": "A", "library": "torch", "version": "1", "asked": {"step": 2.0}, "status": "measured",
        "batch": 4, "measures": {"step": m}, "lacks": {}, "notes": [], "memory": {"peak_bytes": [2**21, 2**20]},
        "layers": [{"layer": "L", "status": "fused", "reason": "", "count": 3},
                   {"layer": "M", "status": "kept", "reason": "a | b", "count": 1}],
        "curves": {"float64": 1e-12, "float32": 2e-7, "nudged": 1e-6, "before": [1.0, 2.0], "after": [1.0, 2.0]},
    } | changes  # fmt: skip


def test_the_table_tells_factor_goal_and_what_got_slower():
    text = page.table([made_up(2.5), made_up(0.9)])
    assert "25 → 10, **2.50x** (2.40x to 2.60x); goal 2x |" in text
    assert "goal 2x **SLOWER** |" in text
    assert "3 fused, 1 kept" in text
    assert r"a \| b" in page.kept([made_up(2.5)])
    assert page.problems([made_up(2.5)]) == []
    assert page.problems([made_up(0.9)]) == ["a, step: 0.9x: slower by more than 5 %"]
    traded = made_up(0.9) | {"asked": {"step": 0.75}}
    assert page.problems([traded]) == []
    assert "SLOWER" not in page.table([traded])


def test_a_wrong_model_has_no_times():
    text = page.table([made_up(2.5, status="wrong", reason="log_prob differs")])
    assert "| A | WRONG: log_prob differs |" in text
    assert "2.50x" not in text


def test_the_newest_of_every_case_is_shown(tmp_path):
    folder = tmp_path / "cpu"
    folder.mkdir()
    facts = {"kind": "cpu", "quick": False, "machine": {"name": "C", "threads": 2}, "versions": {"torch": "2"}}
    for day, cases in ((1, [made_up(2.0), made_up(3.0, id="b", text="B")]), (2, [made_up(4.0)])):
        run = facts | {"date": f"2030-01-0{day}", "time": "1", "commit": f"c{day}", "cases": cases}
        (folder / f"peers-2030-01-0{day}-c{day}.json").write_text(json.dumps(run))
    block = page.block(tmp_path)
    assert "**4.00x**" in block
    assert "**3.00x**" in block
    assert "**2.00x**" not in block
    assert "measured 2030-01-02 at c2, 2030-01-01 at c1" in block
    assert "peers.png" in page.text("cpu", page.devices(tmp_path)["cpu"])


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.peers import picture

    picture.draw([made_up(2.0), made_up(3.0, id="b")], "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_no_empty_panel_is_left_in_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks.peers import picture
    from nfkernels import plot

    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    picture.draw([made_up(2.0, id=name) for name in "abcd"], "title", tmp_path / "p.png")
    assert [axis.get_visible() for axis in drawn[0].axes] == [True] * 4 + [False] * 2
