"""The density benchmark: every bar runs, contenders are right before they are timed, and the page tells them."""

import json

import pytest
import torch

from benchmarks import bars
from benchmarks.__main__ import main
from benchmarks.density import flows, makers, page, splines

BARS = (*splines.BARS, *flows.BARS)
TINY = makers.Size(4, layers=2, hidden=8, blocks=1, bins=3)


def test_the_bars_run(tmp_path):
    assert main(["density", "--quick", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("*/density-*-abc.json")
    data = json.loads(path.read_text())
    assert [e["id"] for e in data["bars"]] == [b.id for b in BARS]
    for entry in data["bars"]:
        assert {s["status"] for s in entry["contenders"].values()} <= {"measured", "unavailable"}, entry
        assert entry["contenders"][bars.OURS]["status"] == "measured"


def test_a_bar_that_is_not_there(capsys):
    assert main(["density", "--bars", "nothing such"]) == 2
    assert "no bar has nothing such in it; there are: spline, 65,536 elements" in capsys.readouterr().err


def test_nflows_with_our_weights_is_our_flow():
    pytest.importorskip("nflows")
    ours, theirs = makers.our_nsf(TINY), makers.nflows_nsf(TINY)
    x = 2 * torch.randn(50, 4)
    with torch.no_grad():
        assert torch.allclose(ours.log_prob(x), theirs.log_prob(x), atol=1e-4)


def test_a_flow_that_is_wrong_is_not_timed():
    wrong = makers.our_realnvp(TINY)
    right, calls = wrong._log_prob, []

    def log_prob(module, x):
        calls.append(x.dtype)
        return right(module, x) + (x.dtype == torch.float64)

    bar = bars.Bar("b", "none", lambda quick: {bars.OURS: lambda: flows._log_prob(
        makers.Model(wrong.module, log_prob, wrong._sample), torch.randn(5, 4))}, ())  # fmt: skip
    entry = bars.measure(bar, True)
    assert entry["gate"] == "failed"
    assert entry["contenders"][bars.OURS]["status"] == "wrong"
    assert torch.float64 in calls


def test_stand_ins_leave_the_rest_of_a_flow_as_it_is():
    contender = flows._outside(makers.our_nsf(TINY), torch.randn(5, 4))
    assert contender.check()
    contender.call()


def test_the_page_has_a_row_for_every_bar(tmp_path):
    main(["density", "--quick", "--out", str(tmp_path), "--commit", "abc", "--bars", "spline"])
    (path,) = tmp_path.glob("*/density-*-abc.json")
    assert not page.devices(tmp_path)  # a quick run is no result
    path.write_text(path.read_text().replace('"quick": true', '"quick": false'))
    text = page.block(tmp_path)
    assert all(f"| {bar.id} |" in text for bar in splines.BARS)
