"""Reports from made-up results: the README's block, the devices' pages, the pictures, and when they are out of date."""

import json
from pathlib import Path

import pytest
from fakes import made_up_case, made_up_run, measured

from benchmarks import report
from benchmarks.results import devices
from benchmarks.tables import case_table, host_table

SHAPE = [128, 12, 128, 128]


def write(root: Path, name: str, data: dict) -> None:
    folder = root / "benchmarks" / "results" / data["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return tmp_path


def coupling(**changes):
    entries = {
        "native": measured(80.0, 76.0, host_us={"min": 9.0, "median": 11.5, "p90": 13.0}),
        "triton": measured(82.0, 80.0),
        "reference": measured(400.0),
        "hand-written": measured(320.0),
        "compile": measured(120.0),
    }
    return made_up_case("affine_coupling", "forward", SHAPE, entries | changes, moved=3)


def row(root, start="| `affine_coupling`, forward |"):
    text = (root / "README.md").read_text()
    return next(line for line in text.splitlines() if line.startswith(start))


def test_golden(root):
    write(root, "a.json", made_up_run([coupling()]))
    assert report.run(check=False, root=root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\nafter\n")
    assert "old" not in text
    # 3 * 100.7 MB in 76 us is 3.97 TB/s of 4; the fastest eager call takes 320 us, the compiled one 120.
    assert row(root, "| op |") == "| op | NVIDIA H200 |"
    assert row(root) == "| `affine_coupling`, forward | 76 us; 4.0x / 1.5x; 99% |"
    assert row(root, "| `affine_coupling`, backward |") == "| `affine_coupling`, backward | not measured |"
    page = "benchmarks/results/nvidia-h200/README.md"
    assert (
        f"[NVIDIA H200]({page}): NVIDIA H200, torch 2.11.0, copy bandwidth 4,000 GB/s; GPU tests: 12 passed; "
        "last run 2030-01-02 at aaaaaaa." in text
    )
    assert (root / "benchmarks/results/nvidia-h200/speed.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        "| affine_coupling forward 128x12x128x128 | 76 | 80 | 400 | 320 | 120 | 4.0x | 1.5x | 99% | 99% |"
        in (root / page).read_text()
    )


def test_never_measured_reads_not_measured(root):
    assert report.run(check=False, root=root) == 0
    assert row(root) == "| `affine_coupling`, forward | not measured |"
    cpu = made_up_run([coupling()], kind="cpu", folder="cpu-avx2-2-threads", roofline={})
    cpu["machine"] = {"name": "A CPU", "threads": 2, "instruction_sets": ["avx2"], "last_level_cache_bytes": None}
    write(root, "a.json", cpu)
    report.run(check=False, root=root)
    assert row(root, "| op |") == "| op | NVIDIA H200 | CPU, AVX2, 2 threads |"
    assert row(root) == "| `affine_coupling`, forward | not measured | 76 us; 4.0x / 1.5x; not measured |"


@pytest.mark.parametrize("status", ["not reached", "skipped", "failed", "unavailable"])
def test_what_has_no_time_has_no_ratio(root, status):
    gone = {name: {"status": status, "reason": "because"} for name in ("native", "triton")}
    write(root, "a.json", made_up_run([coupling(**gone)]))
    report.run(check=False, root=root)
    assert row(root) == "| `affine_coupling`, forward | not measured |"


def test_a_red_gate_has_no_speed_even_if_times_are_in_the_file(root):
    wrong = {"status": "wrong", "reason": "output 0: off", "call_us": {"median": 1.0}, "kernel_us": {"median": 1.0}}
    write(root, "a.json", made_up_run([coupling(native=wrong, triton=wrong)]))
    report.run(check=False, root=root)
    assert row(root) == "| `affine_coupling`, forward | WRONG |"
    wrong_rival = coupling(compile=wrong)
    assert "| 4.0x | not measured |" in case_table(made_up_run([wrong_rival]))


def test_triton_stands_where_cuda_is_not_here(root):
    write(root, "a.json", made_up_run([coupling(native={"status": "unavailable", "reason": "no nvcc"})]))
    report.run(check=False, root=root)
    assert row(root) == "| `affine_coupling`, forward | 80 us; 3.9x / 1.5x; 94% |"


def test_the_newest_run_that_reached_a_case_counts(root):
    unreached = {n: {"status": "not reached"} for n in coupling()["contenders"]}
    write(root, "c.json", made_up_run([coupling()], date="2030-01-01", commit="old"))
    write(root, "b.json", made_up_run([coupling(native=measured(70.0))], date="2030-01-03", commit="mid"))
    write(root, "a.json", made_up_run([coupling() | {"contenders": unreached}], date="2030-01-04", commit="new"))
    write(root, "d.json", made_up_run([coupling(native=measured(1.0))], date="2030-01-05", quick=True))
    found = devices(root / "benchmarks" / "results")["nvidia-h200"]
    assert [c["contenders"]["native"]["call_us"]["median"] for c in found["cases"]] == [70.0]
    assert found["cases"][0]["commit"] == "mid"
    assert found["commit"] == "new"
    assert [commit for _, commit in found["runs"]] == ["old", "mid", "new"]


def test_bandwidth_is_that_of_the_run_that_measured(root):
    write(root, "a.json", made_up_run([coupling()], date="2030-01-01", roofline={"copy_bytes_per_s": 8e12}))
    write(root, "b.json", made_up_run([], date="2030-01-02"))
    report.run(check=False, root=root)
    assert row(root).endswith("; 50% |")


def test_check_says_when_the_readme_is_behind(root, capsys):
    write(root, "a.json", made_up_run([coupling()]))
    assert report.run(check=True, root=root) == 1
    assert "README.md is not what the results say" in capsys.readouterr().err
    assert "old" in (root / "README.md").read_text()
    report.run(check=False, root=root)
    assert report.run(check=True, root=root) == 0
    write(root, "b.json", made_up_run([coupling(native=measured(70.0))], date="2030-01-03"))
    assert report.run(check=True, root=root) == 1


def test_a_readme_without_its_block_is_an_error(root):
    (root / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="must hold"):
        report.run(check=True, root=root)


def test_results_of_another_schema_are_refused(root):
    write(root, "a.json", made_up_run([]) | {"schema": 2})
    with pytest.raises(ValueError, match="results schema 2"):
        devices(root / "benchmarks" / "results")


def test_other_json_beside_results_is_left_alone(root):
    write(root, "a.json", made_up_run([coupling()]))
    report.run(check=False, root=root)
    before = (root / "README.md").read_text()
    (root / "benchmarks/results/nvidia-h200/notes.json").write_text(json.dumps({"steps_per_second": 30.0}))
    assert report.run(check=True, root=root) == 0
    assert (root / "README.md").read_text() == before


def test_host_time_of_launch_bound_cases():
    recorded = {"host_grad_us": {"median": 21.0}}
    run = made_up_run([coupling(), coupling(native=coupling()["contenders"]["native"] | recorded)])
    rows = [line for line in host_table(run).splitlines() if "| CUDA |" in line]
    assert rows == [f"| affine_coupling forward 128x12x128x128 | CUDA | 11.5 | {last} |" for last in ("", "21")]


def test_this_repository_is_up_to_date():
    assert report.run(check=True) == 0
