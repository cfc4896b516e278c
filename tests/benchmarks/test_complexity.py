"""The linear flows' table: every layer's counted operations against its promise, and how sweeps are timed and told."""

import json
import math
import platform
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.complexity import bars, measure, page, peers, run
from benchmarks.complexity.layers import ROWS, Cost, Sweep, sweeps
from benchmarks.complexity.measure import OURS, QUICK, growth

SWEEPS = sweeps()
DIAGONAL = next(s for s in SWEEPS if s.layer == "DiagonalLinear(d)")
SIDES = {"inverse": 0, "logdet": 1}


@pytest.fixture(scope="module")
def counts():
    """Sweep -> its counts, made once."""
    made = {}

    def of(sweep):
        if sweep.id not in made:
            made[sweep.id] = [measure.counted(sweep, n) for n in sweep.counted]
        return made[sweep.id]

    return of


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda s: s.id)
def test_counted_operations_grow_as_claimed(sweep, counts):
    for direction, side in SIDES.items():
        promise, claim = (sweep.inverse, sweep.logdet)[side]
        assert (claim.exponent, claim.log) <= (promise.exponent, promise.log)
        for what in ("operations", "moved"):
            values = [c[direction][what] for c in counts(sweep)]
            assert growth(claim, list(sweep.counted), values) <= claim.exponent + 0.02, (direction, what, values)
        for size, found in zip(sweep.counted, counts(sweep)):
            total = found[direction]["operations"] + found[direction]["moved"]
            assert total <= sweep.bound[side] * claim.at(size), (direction, size, total / claim.at(size))


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda s: s.id)
def test_the_operations_are_there(sweep, counts):
    """A bound from below: a formula that forgets the work would pass every bound from above."""
    for direction, side in SIDES.items():
        claim = (sweep.inverse, sweep.logdet)[side][1]
        last = counts(sweep)[-1][direction]
        assert last["operations"] + last["moved"] >= sweep.bound[side] * claim.at(sweep.counted[-1]) / 10


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda s: s.id)
def test_the_gate_passes(sweep):
    assert measure.check_ours(sweep) is None


def test_every_row_of_the_promise_is_here():
    rows = {"full matrix", "diagonal", "triangular", "block diagonal", "LU-factored", "spatial convolution"}
    assert rows | {"1x1 convolution"} == {s.row for s in SWEEPS} - {""}
    assert len({s.id for s in SWEEPS}) == len(SWEEPS)


def test_growth():
    sizes = [4, 8, 32]
    assert growth(Cost("", 2), sizes, [3 * n**2 for n in sizes]) == pytest.approx(2)
    assert growth(Cost("", 1, log=True), sizes, [n * math.log2(n) for n in sizes]) == pytest.approx(1)
    assert growth(Cost("", 2), sizes, [16, 64, 64 * 16 * 2]) == pytest.approx(2.5)  # the steepest step
    assert growth(Cost("", 0), sizes, [0.0, 0.0, 0.0]) == 0.0


def test_freed_memory_is_kept_where_glibc_is():
    assert measure.keep_memory() in (True, False)
    assert measure.keep_memory() or platform.libc_ver()[0] != "glibc"


def test_a_fit_looks_at_the_top_decade():
    points = [(n, 100.0) for n in (2, 4, 8)] + [(n, n**1.5) for n in (16, 32, 64, 128)]
    assert measure.fitted(points) == pytest.approx(1.5)
    assert measure.fitted(points[:3]) is None
    assert 1.0 < measure.allowed(Cost("", 1, log=True), [2**8, 2**9, 2**10, 2**11]) < 1.2


# --- measuring --------------------------------------------------------------------------------------------------------


def slow_builder(size):
    raise RuntimeError("not on this version")


def sweep_of(build, **changes) -> Sweep:
    return replace(DIAGONAL, build=build, sizes=(4, 64), counted=(4, 8), **changes)


def test_an_entry_has_everybody():
    def missing(size):
        import a_library_that_is_not_installed  # noqa: F401

    others = {"by hand": peers.DIAGONAL["by hand"], "broken": slow_builder, "absent": missing}
    entry = measure.measure(replace(DIAGONAL, sizes=(4, 64), counted=(4, 8), peers=others), QUICK)
    assert entry["gate"] == "passed"
    own = entry["contenders"][OURS]
    assert [n for n, *_ in own["inverse"]["times"]] == [4, 8, 16, 32]
    assert own["logdet"]["status"] == "measured"
    assert own["logdet"]["exponent"] is not None
    assert entry["contenders"]["by hand"]["inverse"]["status"] == "measured"
    broken, absent = entry["contenders"]["broken"], entry["contenders"]["absent"]
    assert broken["inverse"]["reason"] == "RuntimeError: not on this version"
    assert {s["status"] for s in broken.values()} == {"failed"}
    assert {s["status"] for s in absent.values()} == {"unavailable"}
    assert page.problems(entry) == [] or "exponent" in page.problems(entry)[0]


class Wrong(nn.Module):
    """Its inverse is right, its log-determinant is not."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), 2.0))

    def forward(self, x):
        return x * self.scale, self.log_abs_det(x)

    def inverse(self, z):
        return z / self.scale, -self.log_abs_det(z)

    def log_abs_det(self, x):
        return self.scale.sum().expand(len(x))


def test_a_wrong_layer_gets_no_time():
    entry = measure.measure(sweep_of(Wrong, peers={}), QUICK)
    assert entry["gate"] == "forward's log-determinant and slogdet differ"
    assert {s["status"] for s in entry["contenders"][OURS].values()} == {"wrong"}
    assert page.problems(entry) == [f"{entry['id']}: {entry['gate']}"]
    assert page.timed(entry, "inverse") == "WRONG"


def test_a_wrong_peer_gets_no_time():
    peer = peers.DIAGONAL["by hand"](4)
    off = replace(peer, logdet=lambda: peer.logdet() + 1)
    found = measure.check_peer(off, (4,))
    assert found == {"inverse": None, "logdet": "wrong: its log-determinant and slogdet differ"}
    assert "comes with the whole transform" in measure.check_peer(replace(peer, logdet=None), (4,))["logdet"]


def test_who_is_slow_ends_early(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 0.0)
    own = measure.measure(replace(DIAGONAL, sizes=(4, 64), counted=(), peers={}), QUICK)["contenders"][OURS]
    assert [len(s["times"]) for s in own.values()] == [1, 1]
    assert {s["status"] for s in own.values()} == {"measured"}


def test_nothing_kept_serves_a_timed_call(monkeypatch):
    sweep = replace(next(s for s in SWEEPS if s.layer == "FullLinear(d)"), peers={})
    peer = measure.as_peer(measure.made(sweep, 8), (8,))
    solves, solve = [], torch.linalg.solve_ex
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda *a, **k: solves.append(1) or solve(*a, **k))
    z = torch.randn(ROWS, 8)
    with torch.no_grad():
        for turn in range(6):
            measure.timed(lambda: peer.inverse(z), peer.weights, turn)
    assert len(solves) == 6


def test_nflows_and_the_others_where_they_are():
    """Each peer that is installed is right, or says why not."""
    known_broken = {"nflows NaiveLinear"}  # torch.solve is gone
    for sweep in SWEEPS:
        for name, build in sweep.peers.items():
            for direction, state in measure.gated(build, sweep).items():
                fine = state["status"] in ("not reached", "unavailable") or name in known_broken
                assert fine, (sweep.id, name, direction, state)


# --- the command and the page -----------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    status = main(["complexity", "--quick", "--layers", "DiagonalLinear", "--out", str(tmp_path), "--commit", "abc"])
    (path,) = tmp_path.glob("*/complexity-*-abc.json")
    return status, path, json.loads(path.read_text())


def test_the_command(measured):
    status, _, data = measured
    assert status == 0
    assert data["finished"]
    assert data["quick"]
    assert "schema" not in data  # the ops' reader leaves it alone
    assert [e["id"] for e in data["sweeps"]] == ["DiagonalLinear(d) over d"]


def test_the_picture_is_of_all_runs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run, "Pace", lambda: QUICK)
    monkeypatch.setattr(run.picture, "draw", lambda data, path: drawn.append((list(data["sweeps"]), path.name)))
    for layer in ("Permutation", "DiagonalLinear"):
        run.run(tmp_path, minutes=None, quick=False, names=[layer], commit="abc", say=lambda line: None)
    both = ["DiagonalLinear(d) over d", "Permutation(d) over d"]
    assert drawn == [(both[1:], "complexity.png"), (both, "complexity.png")]


def test_a_budget_that_is_spent_is_told(tmp_path):
    main(["complexity", "--quick", "--minutes", "0", "--layers", "Diagonal", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/*.json")
    assert [e["gate"] for e in json.loads(path.read_text())["sweeps"]] == ["not reached"]


def test_a_layer_that_is_not_there(capsys):
    assert main(["complexity", "--layers", "LineaR"]) == 2
    assert "no layer is called LineaR; there are: FullLinear, " in capsys.readouterr().err


def test_the_bars_run(tmp_path):
    assert main(["linear", "--quick", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("*/linear-*-abc.json")
    data = json.loads(path.read_text())
    assert [e["id"] for e in data["bars"]] == [b.id for b in bars.BARS]
    for entry in data["bars"]:
        assert {s["status"] for s in entry["contenders"].values()} <= {"measured", "unavailable"}, entry


def entry_of(times: dict[int, float], **peer: list) -> dict:
    """A sweep of the diagonal layer with made-up times, both directions."""
    state = {"status": "measured", "times": [[n, t, t] for n, t in times.items()],
             "exponent": measure.fitted(list(times.items()))}  # fmt: skip
    counts = [[n, {d: {"operations": 3 * n, "moved": n} for d in SIDES}] for n in (256, 512, 1024)]
    contenders = {OURS: dict.fromkeys(SIDES, state)} | {n: dict.fromkeys(SIDES, s) for n, s in peer.items()}
    return measure.facts(DIAGONAL) | {"gate": "passed", "counted": counts, "contenders": contenders}


def write(root, name, entries, kind="complexity", key="sweeps", **changes):
    folder = root / "benchmarks" / "results" / "cpu-a"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"folder": "cpu-a", "machine": {"name": "A CPU", "threads": 2}, "versions": {"torch": "2.13"},
             "commit": "abc", "date": "2030-01-02", "time": "03:04", "quick": False, key: entries}  # fmt: skip
    (folder / f"{kind}-{name}.json").write_text(json.dumps({f"{kind}_schema": 1} | facts | changes))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    (tmp_path / "docs").mkdir()
    marks = "\n\n".join(f"{begin}\n{end}" for begin, end in page.MARKS.values())
    (tmp_path / page.PAGE).write_text(f"# Title\n\n{marks}\n\nafter\n")
    return tmp_path


def row(root, start):
    return next(line for line in (root / page.PAGE).read_text().splitlines() if line.startswith(start))


def test_golden_page(root):
    peer = {"status": "measured", "times": [[64, 20.0, 20.0]]}
    linear = {256: 1.0, 512: 2.0, 1024: 4.0, 2048: 8.0}
    write(root, "old", [entry_of({n: 2 * t for n, t in linear.items()})], date="2030-01-01")
    write(root, "new", [entry_of({64: 2.0} | linear, nflows=peer)])
    write(root, "quick", [entry_of({})], quick=True, date="2030-01-09")
    assert report.run(check=False, root=root) == 0
    assert (
        row(root, "| `DiagonalLinear(d)` |")
        == "| `DiagonalLinear(d)` | d | O(d) |  | 1.00 | 1.00 | O(d) |  | 1.00 | 1.00 |"
    )
    assert "| not measured | not measured |" in row(root, "| `LULinear(d)` |")
    assert row(root, "| `DiagonalLinear(d)` | d | nflows").endswith("|  | 10x at 64 |  | 10x at 64 |")
    assert (
        "A CPU, 2 threads, torch 2.13; measured 2030-01-01 at abc, 2030-01-02 at abc." in (root / page.PAGE).read_text()
    )
    picture = root / "benchmarks/results/cpu-a/complexity.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "(../benchmarks/results/cpu-a/complexity.png)" in (root / page.PAGE).read_text()
    assert report.run(check=True, root=root) == 0
    assert (root / page.PAGE).read_text().startswith("# Title\n\n")


def test_an_exponent_above_the_promise_is_told(root):
    entry = entry_of({256: 1.0, 512: 2.5, 1024: 6.25, 2048: 15.625})
    assert page.timed(entry, "inverse") == "1.32, 0.32 ABOVE"
    assert "an exponent 0.32 above the promise" in page.problems(entry)[0]
    assert page.problems(entry | {"row": ""}) == []


def test_check_covers_the_page(root, capsys):
    report.run(check=False, root=root)
    assert report.run(check=True, root=root) == 0
    contenders = {
        OURS: {"status": "measured", "median_us": 10.0},
        "loop": {"status": "measured", "median_us": 30.0},
        "zuko": {"status": "unavailable", "reason": "not here"},
    }
    ratios = [{"text": "loop takes", "ratio": 3.0}]
    bar = {"id": "`LULinear(64)`", "asked": "2x", "gate": "passed", "ratios": ratios, "contenders": contenders}
    write(root, "a", [bar], kind="linear", key="bars")
    assert report.run(check=True, root=root) == 1
    assert "docs/linear-flows.md is not what the results say" in capsys.readouterr().err
    report.run(check=False, root=root)
    assert row(root, "| `LULinear(64)` |") == (
        "| `LULinear(64)` | 10 | loop 30, zuko unavailable (not here) | loop takes: 3x | 2x |"
    )


def test_the_page_in_this_repository():
    """Its example runs as printed, and its pictures are there."""
    path = report.ROOT / page.PAGE
    text = path.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, page.PAGE, "exec"), {})
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / picture).is_file(), picture


def test_a_page_without_its_marks_is_an_error(root):
    (root / page.PAGE).write_text("nothing")
    with pytest.raises(ValueError, match=r"linear-flows\.md must hold"):
        report.run(check=True, root=root)
