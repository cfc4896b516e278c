"""The Glow's yardsticks (same numbers with the same weights, inverses), the gate that nothing wrong passes, and the
command from end to end on a tiny model."""

import dataclasses
import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.glow import gate, measure, page
from benchmarks.glow.measure import QUICK_PACE, Bench, in_turns, measure_depth, measure_setup
from benchmarks.glow.models import Unavailable, make, options, seeded_images, start, without_split_priors
from benchmarks.glow.setups import CONTENDERS, DIGITS, QUICK, SETUPS, Contender
from benchmarks.glow.stand_in import without_networks
from benchmarks.memory import Traced, saved_bytes
from benchmarks.models import plain_glow

CPU = torch.device("cpu")
PLAIN, OURS = Contender("plain", "plain"), Contender("nfkernels", "nfkernels")
REVERSIBLE = Contender("nfkernels, reversible", "nfkernels", memory="reversible")
TINY = dataclasses.replace(QUICK, steps=3)


@pytest.fixture(scope="module")
def glow():
    return start(TINY)


@pytest.fixture(scope="module")
def x(glow):
    return glow.dequantize(seeded_images(TINY, 3))


@pytest.fixture(scope="module")
def right(glow, x):
    return gate.truth(TINY, glow, x)


def bench(**changes):
    common = {"left": lambda: 1.0, "say": lambda line: None, "save": lambda: None}
    return Bench(CPU, QUICK_PACE, **(common | changes))


def test_the_plain_model_with_our_weights_gives_our_bits_per_dimension(glow, x):
    assert all((flow.permutation != torch.arange(flow.channels)).any() for flow in levels(glow))
    plain = plain_glow.PlainGlow(TINY.shape, **options(TINY))
    plain_glow.copy_weights(plain, glow)
    ours = glow.double().nll(x.double())
    glow.float()
    torch.testing.assert_close(plain.double().bits_per_dim(x.double()).mean(), ours, rtol=1e-12, atol=0)


def levels(glow):
    return [part[1] for part in glow.bijection[1].levels]


def test_the_plain_inverse(glow, x):
    plain = plain_glow.PlainGlow(TINY.shape, **options(TINY)).double()
    plain_glow.copy_weights(plain, glow)
    torch.testing.assert_close(plain.rebuild(plain.latents(x.double())), x.double(), rtol=0, atol=1e-12)
    images = plain.float().sample(5)
    assert images.shape == (5, *TINY.shape)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if "cpu" in c.devices and not c.compiled],
                         ids=lambda c: c.name)  # fmt: skip
def test_the_gate_lets_the_right_pass(contender, glow, x, right):
    if contender.maker == "normflows":
        pytest.importorskip("normflows")
        right = gate.truth(TINY, glow, x, split_priors=False)
    try:
        ready = make(contender, TINY, glow, CPU)
    except Unavailable as error:
        pytest.skip(str(error))
    errors = gate.errors(ready, right)
    assert gate.verdict(errors, contender.precision) is None
    if contender.precision is None:
        assert max(errors.values()) < 1e-5


def test_normflows_has_no_split_priors(glow):
    pytest.importorskip("normflows")
    from benchmarks.models import normflows_glow

    theirs = normflows_glow.NormflowsGlow(TINY.shape, **options(TINY))
    with pytest.raises(ValueError, match="prior weights are zero"):
        normflows_glow.copy_weights(theirs, glow)
    normflows_glow.copy_weights(theirs, without_split_priors(TINY, glow))
    with pytest.raises(Unavailable, match="dropout"):
        make(Contender("normflows", "normflows"), DIGITS, start(DIGITS), CPU)


@pytest.mark.parametrize("contender", [OURS, PLAIN], ids=lambda c: c.name)
@pytest.mark.parametrize("planted", ["bias", "lower", "weight2", "permutation"])
def test_the_gate_stops_a_wrong_weight(contender, planted, glow, right):
    ready = make(contender, TINY, glow, CPU)
    with torch.no_grad():
        if contender.ours:
            weight = getattr(levels(ready.model)[0], planted)[0]
        else:
            step = ready.model.levels[0][0]
            where = {"bias": step.actnorm.bias, "lower": step.mix.lower, "weight2": step.coupling.net[2].weight}
            weight = where.get(planted, step.mix.permutation)
        weight.copy_(weight.roll(1, 0) if planted == "permutation" else weight + 0.05)
    assert "allowed" in gate.verdict(gate.errors(ready, right), None)


def test_the_gate_stops_a_gradient_that_is_lost(glow, right):
    ready = make(PLAIN, TINY, glow, CPU)
    honest = ready.loss
    ready.loss = lambda x: honest(x) + 0.0 * honest(x)
    assert gate.verdict(gate.errors(ready, right), None) is None
    ready.loss = lambda x: 0.5 * honest(x) + 0.5 * honest(x).detach()
    assert gate.verdict(gate.errors(ready, right), None).startswith("gradient error 0.5")


def test_what_is_not_a_number_is_wrong():
    fine = {"bits_error": 0.0, "gradient_error": 0.0, "rebuilt_error": 0.0}
    assert gate.verdict(fine, None) is None
    assert "gradient error nan" in gate.verdict(fine | {"gradient_error": float("nan")}, None)
    assert gate.verdict(fine | {"rebuilt_error": 0.05}, "everything") is None


def test_a_wrong_contender_gets_no_time(monkeypatch):
    def spoiled(contender, setup, glow, device):
        ready = make(contender, setup, glow, device)
        if not contender.ours:
            with torch.no_grad():
                ready.model.levels[0][0].actnorm.bias.add_(0.05)
        return ready

    monkeypatch.setattr(measure, "make", spoiled)
    entry = {"id": "quick", "setup": QUICK.facts()}
    measure_setup(QUICK, [OURS, PLAIN], bench(), entry)
    wrong = entry["contenders"]["plain"]
    assert wrong["status"] == "wrong"
    assert not any(key.endswith("_ms") for key in wrong)
    assert "| plain | | | | | |" in page.setup_table(entry)
    assert "WRONG (bits error" in page.setup_table(entry)
    assert page.problems([entry]) == []  # a rival's fault is no fault of ours
    assert page.problems([{"id": "a", "contenders": {"nfkernels": wrong}}])[0].startswith("a, nfkernels: wrong")


def test_a_setup_is_measured_whole():
    entry = {"id": "quick", "setup": QUICK.facts()}
    measure_setup(QUICK, [OURS, PLAIN, REVERSIBLE], bench(), entry)
    for name in ("nfkernels", "plain", "nfkernels, reversible"):
        of = entry["contenders"][name]
        assert of["status"] == "measured"
        assert "lacks" not in of
        assert {"step_ms", "sample_ms", "outside_ms"} <= of.keys()
        assert of["peak_bytes"] > 10_000
    json.dumps(entry)


def test_stand_ins_take_the_networks_out_and_nothing_else(glow):
    images = seeded_images(TINY, 2)
    for contender in (OURS, PLAIN):
        ready = make(contender, TINY, glow, CPU)
        ready.model.train()
        with without_networks([ready.model]):
            ready.from_images(images).backward()
        # Everything that is not a network has a gradient, in every step; no network has.
        used = {name for name, p in ready.model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
        kept = ("log_scale", "bias", "lower", "upper", "log_s")
        assert {name.split(".")[-1] for name in used} == {*kept, "loc"}
        if contender.ours:
            rows = [getattr(flow, name).grad.flatten(1).count_nonzero(1).min() for flow in levels(ready.model)
                    for name in kept]  # fmt: skip
            assert min(rows) > 0
        else:
            assert len(used) == 2 * 3 * len(kept) + 2


def test_stand_ins_notice_networks_that_have_moved(monkeypatch, glow):
    ready = make(OURS, TINY, glow, CPU)
    body = sys.modules["nfkernels.nn.glow_body"]
    monkeypatch.setattr(body, "conv_net", partial(body.conv_net))  # called by another name
    with pytest.raises(RuntimeError, match="never called"), without_networks([ready.model]):
        ready.from_images(seeded_images(TINY, 2)).backward()


def test_bytes_over_depth():
    entry = {"id": "depth", "setup": QUICK.facts()}
    measure_depth(QUICK, (1, 3), [OURS, PLAIN, REVERSIBLE], bench(), entry)
    for name in ("nfkernels", "plain"):
        one, three = entry["contenders"][name]["depths"]
        assert (one["depth"], three["depth"]) == (1, 3)
        # Activations are stored, so that three steps hold about three times what one does.
        assert 2 < three["held_bytes"] / one["held_bytes"] < 3.5
        assert three["saved_bytes"] == pytest.approx(three["held_bytes"], rel=0.15)
    one, three = entry["contenders"]["nfkernels, reversible"]["depths"]
    assert three["held_bytes"] < 1.1 * one["held_bytes"]
    assert "| nfkernels | held for backward, KiB per image |" in page.depth_table(entry)


def test_traced_bytes():
    a = torch.randn(1000, requires_grad=True)

    def call():
        (torch.empty(100_000) + 1).sum()
        return a.exp().sin()

    traced = Traced(call, CPU)
    assert traced.held == 2 * 4000
    assert traced.peak == pytest.approx(2 * 400_000, abs=100)  # a few bytes for the sum
    assert saved_bytes(call) == 4000  # exp's result, which sin saves too


def test_times_are_of_one_call():
    calls = []
    found = in_turns({"a": lambda: calls.append(0)}, bench())
    assert found["a"]["rounds"] == 2
    assert len(calls) == 2 + 2 * 200
    assert found["a"]["median"] < 1.0


def test_a_budget_that_is_over_leaves_the_rest_not_reached():
    entry = {"id": "quick", "setup": QUICK.facts()}
    measure_setup(QUICK, [OURS], bench(left=lambda: 0.0), entry)
    assert entry["contenders"]["nfkernels"]["status"] == "not reached"
    assert "not measured" in page.setup_table(entry)


def test_the_command(tmp_path, capsys):
    arguments = ["glow", "--quick", "--out", str(tmp_path), "--contenders", "nfkernels", "plain"]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("*/glow-*.json")
    data = json.loads(path.read_text())
    assert data["finished"]
    assert data["kind"] == "cpu"
    assert {e["id"] for e in data["entries"]} == {"quick", "depth"}
    printed = capsys.readouterr().out
    assert "nfkernels: step" in printed
    assert "PROBLEM" not in printed
    assert page.runs(path.parent) == []  # trials are not reported


def test_the_command_trains(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main(["glow", "--train", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/glow-*.json")
    (entry,) = json.loads(path.read_text())["entries"]
    for of in entry["contenders"].values():
        assert of["status"] == "measured"
        first, last = of["curve"][0], of["curve"][-1]
        assert first[:2] == [0.0, 0]
        assert last[0] >= 1.0
        assert last[2] < first[2]
        assert abs(of["test_bits"] - last[2]) < 0.5
    starts = {of["curve"][0][2] for of in entry["contenders"].values()}
    assert max(starts) - min(starts) < 1e-4  # from the same weights, judged alike
    assert "test bits/dim" in capsys.readouterr().out


def test_unknown_names_are_told(tmp_path, capsys):
    assert main(["glow", "--contenders", "glowworm", "--out", str(tmp_path)]) == 2
    assert "there is no contender 'glowworm'" in capsys.readouterr().err
    assert main(["glow", "--preset", "huge", "--out", str(tmp_path)]) == 2
    assert "there is no preset huge" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["glow", "--device", "cuda", "--out", str(tmp_path)]) == 2
        assert "no CUDA device" in capsys.readouterr().err


# --- reports ----------------------------------------------------------------------------------------------------------


def made_up(**changes):
    def of(step, **more):
        spread = {"min": step, "median": step, "max": step, "rounds": 9}
        measured = {"status": "measured", "batch": 16, "step_ms": spread, "sample_ms": spread, "outside_ms": spread}
        return {**measured, "peak_bytes": 2**20, "bits_error": 1e-7, **more}

    (setup,) = [s for s in SETUPS["cpu"] if s.id == "cpu"]
    contenders = {"nfkernels": of(10.0), "plain": of(40.0), "normflows": {"status": "unavailable", "reason": "gone"}}
    trained = {"status": "measured", "seconds": 60.0, "steps": 600, "test_bits": 3.5, "test_bits_error": 0.01,
               "curve": [[0.0, 0, 8.0], [30.0, 300, 4.0], [60.0, 600, 3.6]]}  # fmt: skip
    entries = [
        {"id": "cpu", "setup": setup.facts(), "contenders": contenders},
        {"id": "train-shirts", "setup": {"text": "Training on shirts"}, "contenders": {"nfkernels": trained}},
    ]
    return {
        "glow_schema": 1, "kind": "cpu", "folder": "cpu-avx2-2-threads", "machine": {"name": "A CPU", "threads": 2},
        "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2030-01-02", "time": "03:04:05 UTC", "quick": False,
        "entries": entries, **changes,
    }  # fmt: skip


def written(root, data, name="glow-a.json"):
    folder = root / "benchmarks" / "results" / data["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    marks = f"{report.BEGIN}\n{report.END}\n{page.BEGIN}\n{page.END}\n"
    (tmp_path / "README.md").write_text(f"# Title\n\n{marks}")
    return tmp_path


def test_the_report(root):
    report.run(check=False, root=root)
    assert f"{page.BEGIN}\nNot measured.\n{page.END}" in (root / "README.md").read_text()
    folder = written(root, made_up())
    assert report.run(check=True, root=root) == 1
    assert report.run(check=False, root=root) == 0
    assert report.run(check=True, root=root) == 0
    text, told = (root / "README.md").read_text(), (folder / "glow.md").read_text()
    assert "| nfkernels | 10 ms (4.0x) | 10 ms (4.0x) | 10 ms (4.0x) | 1.0 |" in text
    assert "| nfkernels | 60 | 600 | 10 | 3.500 +- 0.010 | 3.600 |" in text
    assert "| nfkernels | 16 | 10 (4.0x) | 10 (4.0x) | 10 (4.0x) | 1.0 | 1e-07 |" in told
    assert "| normflows | | | | | |  | unavailable (gone) |" in told
    assert (folder / "glow-train-shirts.png").read_bytes()[:4] == b"\x89PNG"


def test_the_ratio_is_per_image(root):
    data = made_up()
    data["entries"][0]["contenders"]["nfkernels"]["batch"] = 32
    assert "| nfkernels | 32 | 10 (8.0x) | 10 (4.0x) |" in page.setup_table(data["entries"][0])


def test_the_newest_measurement_of_each_contender_counts(root):
    later = made_up(date="2030-01-03", commit="def")
    later["entries"] = [later["entries"][0]]
    later["entries"][0]["contenders"] = {"nfkernels": later["entries"][0]["contenders"]["plain"],
                                         "plain": {"status": "not reached"}}  # fmt: skip
    folder = written(root, made_up())
    written(root, later, "glow-b.json")
    written(root, made_up(quick=True, date="2030-01-04"), "glow-c.json")
    merged = page.newest(page.runs(folder))
    assert [commit for _, commit in merged["runs"]] == ["abc", "def"]
    medians = {n: page.median(c, "step_ms") for n, c in merged["entries"][0]["contenders"].items()}
    assert medians == {"nfkernels": 40.0, "plain": 40.0, "normflows": None}
    later["entries"][0]["setup"] = {"text": "another size"}  # nothing of the old one is kept beside it
    written(root, later, "glow-b.json")
    assert list(page.newest(page.runs(folder))["entries"][0]["contenders"]) == ["nfkernels"]


def test_a_readme_without_the_block_is_an_error_once_there_are_results(root):
    (root / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.run(check=False, root=root) == 0
    written(root, made_up())
    with pytest.raises(ValueError, match="glow:begin"):
        report.run(check=True, root=root)
