"""Runs from end to end, without a GPU and without waiting: gate, budget, failures, partial files, exit statuses."""

import json
from dataclasses import replace

import pytest
import torch
from fakes import FakeClock, FakeShell, FakeTimer

from benchmarks import cpu, gpu, ops, roofline
from benchmarks import run as running
from benchmarks.__main__ import main
from benchmarks.case import FORWARD, STEP, Case
from benchmarks.machine import command_line
from benchmarks.ops import channel_mix
from benchmarks.record import Budget, Record
from benchmarks.run import Setting, announce, measure, measure_all
from benchmarks.stages import Finished
from benchmarks.tables import case_line, device_page
from benchmarks.timing import CpuTimer, Prepared, spread_of
from nfkernels.ops._library import forced_backend

CPU = torch.device("cpu")
FACTS = {"folder": "somewhere", "date": "2030-01-02", "commit": "abc", "kind": "cpu"}
CASE = Case("channel_mix", FORWARD, (2, 4, 3, 3))


def setting(timer=None, interleave=True):
    return Setting(CPU, timer or FakeTimer(), cache=2**12, most_sets=3, interleave=interleave, say=lambda line: None)


def eager(contender):
    return not contender.compiled


def off_by(amount, backend="native"):
    """The channel mix, wrong on one backend only."""
    right = channel_mix.call("")

    def run(v, inverse):
        (y,) = right(v, inverse)
        return (y + amount if forced_backend() == backend else y,)

    return replace(channel_mix.OP, call=lambda variant: run)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("direction", [FORWARD, "backward", STEP])
def test_an_entry(direction, interleave):
    entry = measure(channel_mix.OP, replace(CASE, direction=direction), setting(interleave=interleave), {}, eager)
    assert {n: e["status"] for n, e in entry["contenders"].items()} == dict.fromkeys(
        ("native", "reference", "conv2d", "copy"), "measured"
    )
    own = entry["contenders"]["native"]
    assert own["same_bits"] is True
    assert own["error"] < 1e-6
    assert own["call_us"]["median"] == 10.0
    assert own["host_us"]
    assert ("host_grad_us" in own) == (direction == FORWARD and not interleave)
    if direction != FORWARD:
        assert own["saved_bytes"] == CASE.data_bytes + 4 * 4 * 4
    assert entry["sets"] == 3
    json.dumps(entry)


def test_a_red_gate_prints_wrong_and_no_speed():
    entry = measure(off_by(1e-3), CASE, setting(), {"copy_bytes_per_s": 1e9}, eager)
    own = entry["contenders"]["native"]
    assert own["status"] == "wrong"
    assert not any(key.endswith("_us") for key in own)
    line = case_line(entry)
    assert "native WRONG (output 0: off by 0.001" in line
    assert "x)" not in line  # no ratio for anyone: there is nothing to compare with
    facts = {"machine": {"name": "A"}, "versions": {}, "folder": "a", "kind": "cpu", "stages": {}, "roofline": {}}
    row = next(r for r in device_page({**facts, "cases": [entry]}, "").splitlines() if r.startswith("| channel_mix"))
    assert "WRONG" in row
    assert "x |" not in row
    assert row.count("not measured") == 4


def test_a_rival_that_is_wrong_gets_no_ratio():
    entry = measure(off_by(1.0, backend=None), CASE, setting(), {}, eager)
    assert entry["contenders"]["native"]["status"] == "measured"
    rivals = channel_mix.OP.peers("")
    wrong = replace(channel_mix.OP, peers=lambda v: {"conv2d": replace(rivals["conv2d"], run=lambda v, i: (v["x"],))})
    line = case_line(measure(wrong, CASE, setting(), {}, eager))
    assert "conv2d WRONG" in line
    assert "reference 10 us (1.0x)" in line


def test_runs_that_differ_are_a_problem(tmp_path):
    count = iter(range(1000))
    right = channel_mix.call("")

    def drifting(v, inverse):
        return (right(v, inverse)[0] * (1 + 1e-7 * (next(count) % 2)),)

    record = Record(tmp_path, FACTS, Budget(None))
    record.case(measure(replace(channel_mix.OP, call=lambda variant: drifting), CASE, setting(), {}, eager))
    assert record.problems() == [f"{CASE.id}, native: runs on the same inputs differ"]
    assert "NOT THE SAME BITS" in case_line(record.data["cases"][0])


def test_a_failing_case_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def failing(v, inverse):
        raise RuntimeError("no kernel image\nand more")

    bad = replace(channel_mix.OP, name="bad", call=lambda v: failing, cases=lambda kind: [replace(CASE, op="bad")])
    good = replace(channel_mix.OP, cases=lambda kind: [CASE])
    monkeypatch.setattr(ops, "tables", lambda names: [bad, good])
    code = cpu.run(tmp_path, minutes=None, quick=True, names=[], commit="abc", timer=FakeTimer())
    assert code == 1
    data = json.loads(next(tmp_path.rglob("*.json")).read_text())
    first, second = data["cases"]
    assert first["contenders"]["native"] == {"status": "failed", "reason": "RuntimeError: no kernel image"}
    assert second["contenders"]["native"]["status"] == "measured"
    assert "PROBLEM: bad forward 2x4x3x3, native: failed" in capsys.readouterr().out


def test_a_contender_that_fails_takes_no_other_with_it():
    def failing(v, inverse):
        raise RuntimeError("out of memory")

    rivals = channel_mix.OP.peers("")
    op = replace(channel_mix.OP, peers=lambda v: {"conv2d": replace(rivals["conv2d"], run=failing)})
    entry = measure(op, CASE, setting(), {}, eager)
    assert entry["contenders"]["conv2d"] == {"status": "failed", "reason": "RuntimeError: out of memory"}
    assert entry["contenders"]["native"]["status"] == "measured"


def test_a_backend_that_is_not_here_is_no_failure(tmp_path, monkeypatch):
    original = running.contenders
    extra = running.Contender("triton", channel_mix.call(""), "triton", ours=True)
    monkeypatch.setattr(running, "contenders", lambda *a: [*original(*a), extra])
    record = Record(tmp_path, FACTS, Budget(None))
    record.case(measure(channel_mix.OP, CASE, setting(), {}, eager))
    found = record.data["cases"][0]["contenders"]["triton"]
    assert found["status"] == "unavailable"
    assert "the triton backend" in found["reason"]
    assert record.problems() == []


def test_running_out_of_memory_after_the_gate_is_a_failure(monkeypatch):
    monkeypatch.setattr(running, "_time", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    entry = measure(channel_mix.OP, CASE, setting(), {}, eager)
    assert {e["status"] for e in entry["contenders"].values()} == {"failed"}


def test_an_element_that_is_never_written_is_wrong():
    torch.use_deterministic_algorithms(False)  # so that only the gate itself poisons
    right = channel_mix.call("")

    def unwritten(v, inverse):
        (y,) = right(v, inverse)
        if forced_backend() != "native":
            return (y,)
        out = torch.empty_like(y)
        out.flatten()[1:] = y.flatten()[1:]
        return (out,)

    op = replace(channel_mix.OP, call=lambda variant: unwritten)
    assert measure(op, CASE, setting(), {}, eager)["contenders"]["native"]["status"] == "wrong"


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(running, "_memory_short", lambda case, device: "needs about 40 GiB, 1 are here")
    entry = measure(channel_mix.OP, CASE, setting(), {}, eager)
    assert entry["contenders"]["native"] == {"status": "skipped", "reason": "needs about 40 GiB, 1 are here"}


def test_budget_exhaustion_is_recorded(tmp_path):
    clock = FakeClock()
    work = [(channel_mix.OP, replace(CASE, shape=(n, 4, 3, 3))) for n in (1, 2, 3, 4)]
    record = Record(tmp_path, FACTS, budget := Budget(1.0, clock))
    where = setting(FakeTimer(clock, seconds=25.0))
    announce(work, record, where)
    assert measure_all(work, record, where, budget, wanted=eager) == 3
    data = json.loads(record.path.read_text())
    assert [c["contenders"]["native"]["status"] for c in data["cases"]] == ["measured"] * 3 + ["not reached"]
    assert data["cases"][0]["contenders"]["compile"]["status"] == "not reached"
    assert data["cases"][3]["contenders"]["copy"]["status"] == "not reached"
    assert record.problems() == []


def test_a_run_that_is_killed_leaves_a_whole_file(tmp_path):
    class Killed(FakeTimer):
        def measure(self, contenders, host):
            if len(self.measured) >= 8:
                raise KeyboardInterrupt
            return super().measure(contenders, host)

    work = [(channel_mix.OP, replace(CASE, shape=(n, 4, 3, 3))) for n in (1, 2, 3, 4)]
    record, where = Record(tmp_path, FACTS, budget := Budget(None)), setting(Killed())
    announce(work, record, where)
    with pytest.raises(KeyboardInterrupt):
        measure_all(work, record, where, budget, wanted=eager)
    assert [p.name for p in record.path.parent.iterdir()] == ["2030-01-02-abc.json"]
    data = json.loads(record.path.read_text())
    assert data["finished"] is False
    assert [c["contenders"]["native"]["status"] for c in data["cases"]] == ["measured"] * 2 + ["not reached"] * 2


def test_results_are_never_written_over(tmp_path):
    names = [Record(tmp_path, FACTS, Budget(None)).path.name for _ in range(3)]
    assert names == ["2030-01-02-abc.json", "2030-01-02-abc-2.json", "2030-01-02-abc-3.json"]


def test_without_a_gpu_one_sentence_and_exit_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no CUDA device here" in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_op_is_one_sentence(tmp_path, capsys):
    assert main(["cpu", "--ops", "splines", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("unknown op 'splines': expected one of affine_coupling")


def test_cpu_quick_runs_end_to_end(tmp_path, capsys):
    assert main(["cpu", "--quick", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.rglob("*.json")
    data = json.loads(path.read_text())
    assert path.name == f"{data['date']}-abc.json"
    assert path.parent.name == data["folder"]
    assert data["finished"] is True
    assert data["roofline"]["copy_bytes_per_s"] > 0
    for case in data["cases"]:
        assert case["contenders"]["native"]["status"] == "measured", case["id"]
        assert case["contenders"]["reference"]["status"] == "measured", case["id"]
        assert case["contenders"]["native"]["same_bits"], case["id"]
        assert case["floor_us"] > 0
    assert {c["op"] for c in data["cases"]} == {op.name for op in ops.tables()}
    page, out = path.with_suffix(".md").read_text(), capsys.readouterr().out
    assert all(f"| {case['id']} |" in page for case in data["cases"])
    assert "| channel_mix forward 2x4x4x4 |" in out
    assert "not reached within the budget: 0 cases, and some contenders of" in out  # what would be compiled


@pytest.mark.parametrize("failing", [False, True])
def test_a_gpu_run_in_all_its_stages(tmp_path, monkeypatch, capsys, failing):
    """Everything but the CUDA calls: CPU tensors, a fake timer, and a shell that answers for builds and tests."""
    from benchmarks import stages

    monkeypatch.setattr(stages, "stale", lambda root=None: [])
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/usr/bin/{name}")
    word = "FAILED" if failing else "PASSED"
    text = f"tests/gpu/test_smoke.py::test_a {word} [ 50%]\ntests/gpu/test_smoke.py::test_b PASSED [100%]\n"
    shell = FakeShell(
        **{"compute-sanitizer": Finished(0, "ERROR SUMMARY: 0 errors"), "pytest": Finished(int(failing), text)}
    )
    timer, asked = FakeTimer(), []
    code = gpu.run(
        tmp_path, minutes=8, quick=True, names=[], commit="abc", device=CPU, timer=timer, shell=shell,
        clock=FakeClock(), peers=lambda out, **options: asked.append(options) or int(failing),
    )  # fmt: skip
    assert asked[0]["device"] == "cuda"
    assert asked[0]["minutes"] <= 4
    assert code == int(failing)
    data = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert {n: s["status"] for n, s in data["stages"].items()} == {
        "build": "done", "tests": "failed" if failing else "done", "sanitizer": "done",
        "peers": "failed" if failing else "done",
    }  # fmt: skip
    assert data["stages"]["tests"]["counts"] == ({"failed": 1, "passed": 1} if failing else {"passed": 2})
    assert all(c["contenders"]["native"]["status"] == "measured" for c in data["cases"])
    assert data["roofline"]["fp32_flops"] > 0
    out = capsys.readouterr().out
    assert out.index("So far:") < out.index("tests: ")  # a first table before anything slow
    assert (next(tmp_path.rglob("*-tests.log"))).read_text() == text


def test_gpu_runs_leave_compiled_contenders_for_last(tmp_path, monkeypatch):
    """They take seconds each; a budget that ends before them leaves all the rest measured."""
    clock = FakeClock()
    monkeypatch.setattr(ops, "tables", lambda names: [replace(channel_mix.OP, cases=lambda kind: [CASE])])
    monkeypatch.setattr(roofline, "measure", lambda *a, **k: {"copy_bytes_per_s": 1e9})
    timer = FakeTimer(clock, seconds=1.0)
    skip = ["build", "tests", "sanitizer", "peers"]
    gpu.run(tmp_path, minutes=0.04, quick=False, names=[], commit="a", skip=skip, device=CPU, timer=timer, clock=clock)
    data = json.loads(next(tmp_path.rglob("*.json")).read_text())
    entries = data["cases"][0]["contenders"]
    assert entries["native"]["status"] == "measured"
    assert entries["compile"]["status"] == "not reached"


def test_compiled_contenders_are_compiled_and_gated(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: asked.append(f) or f)
    entry = measure(channel_mix.OP, replace(CASE, direction="backward"), setting(), {}, lambda c: c.compiled)
    assert len(asked) == 1
    assert set(entry["contenders"]) == {"compile"}
    assert entry["contenders"]["compile"]["status"] == "measured"


def test_cpu_timer_interleaves_and_rotates():
    order = []

    def slow(name):
        def call():
            order.append(name)
            torch.randn(200_000).sort()  # longer than the millisecond that a turn lasts

        return call

    contenders = {
        "a": Prepared([slow("a0"), slow("a1")], torch.no_grad),
        "b": Prepared([slow("b0")], torch.no_grad),
    }
    found = CpuTimer(seconds=0.0, rounds=5).measure(contenders, host=False)
    assert order[-6:] == ["a0", "b0", "a1", "b0", "a0", "b0"]
    assert found["a"]["rounds"] == 5
    assert 0 < found["a"]["call_us"]["min"] <= found["a"]["call_us"]["median"] <= found["a"]["call_us"]["p90"]


def test_the_command_is_told_without_paths():
    assert command_line(["cpu", "--out", "/a/b", "--quick"]) == "python -m benchmarks cpu --quick"
    assert command_line(["gpu", "--out=/a/b", "--minutes", "4"]) == "python -m benchmarks gpu --minutes 4"


def test_spread():
    assert spread_of([3.0, 1.0, 2.0, 100.0, 4.0]) == {"min": 1.0, "median": 3.0, "p90": 4.0}
