"""Building, testing and the memory checker, as a GPU run drives them."""

import os
import sys
import time

import pytest
from fakes import FakeShell

from benchmarks import stages
from benchmarks.stages import Finished


def tree(root, *, modules):
    """A source tree whose compiled modules are as old as said, relative to the sources."""
    (root / "csrc").mkdir()
    (root / "nfkernels").mkdir()
    for path in (root / "setup.py", root / "csrc" / "a.cu"):
        path.write_text("")
        os.utime(path, (1000, 1000))
    for name, age in modules.items():
        path = root / "nfkernels" / f"{name}.abi3.so"
        path.write_text("")
        os.utime(path, (1000 + age, 1000 + age))


@pytest.mark.parametrize(
    ("modules", "stale"),
    [
        ({}, ["nfkernels._C", "nfkernels._C_cuda"]),
        ({"_C": 5}, ["nfkernels._C_cuda"]),
        ({"_C": 5, "_C_cuda": -5}, ["nfkernels._C_cuda"]),
        ({"_C": 5, "_C_cuda": 5}, []),
    ],
)
def test_stale(tmp_path, modules, stale):
    tree(tmp_path, modules=modules)
    assert stages.stale(tmp_path) == stale


def building(root, makes):
    """A shell whose build makes the named modules."""

    def run(command, limit, extra):
        assert command[1:] == ["setup.py", "build_ext", "--inplace"]
        run.extra = extra
        for name in makes:
            path = root / "nfkernels" / f"{name}.abi3.so"
            path.write_text("")
            os.utime(path, (2000, 2000))
        return Finished(0, "the compiler's words")

    return run


def test_build_makes_what_is_missing_for_this_gpu(tmp_path, monkeypatch):
    tree(tmp_path, modules={"_C": 5})
    monkeypatch.setattr(stages, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    shell = building(tmp_path, ["_C_cuda"])
    found = stages.build(60, "9.0", shell, tmp_path)
    assert found == {"status": "done", "reason": "built nfkernels._C_cuda for 9.0"}
    assert shell.extra == {"NFKERNELS_CUDA": "auto", "TORCH_CUDA_ARCH_LIST": "9.0"}


def test_build_that_makes_nothing_says_so(tmp_path, monkeypatch):
    tree(tmp_path, modules={"_C": 5})
    monkeypatch.setattr(stages, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    found = stages.build(60, "9.0", building(tmp_path, []), tmp_path)
    assert found["status"] == "failed"
    assert found["reason"] == "nfkernels._C_cuda did not build"
    assert found["log"] == "the compiler's words"


def test_build_without_nvcc_says_what_is_missing(tmp_path, monkeypatch):
    tree(tmp_path, modules={"_C": 5})
    monkeypatch.setattr(stages, "nvcc", lambda: None)
    shell = FakeShell()
    found = stages.build(60, "9.0", shell, tmp_path)
    assert found == {"status": "skipped", "reason": "nfkernels._C_cuda missing or stale, and there is no nvcc"}
    assert shell.commands == []


def test_gpu_tests_are_counted_and_failures_named(tmp_path):
    text = (
        "tests/gpu/test_a.py::test_x[cuda-native] PASSED   [ 25%]\n"
        "tests/gpu/test_a.py::test_x[a b-(3, 4)] FAILED   [ 50%]\n"
        "tests/gpu/test_a.py::test_two SKIPPED (needs two CUDA devices) [ 75%]\n"
        "tests/gpu/test_b.py::test_y ERROR [100%]\n"
        "FAILED tests/gpu/test_a.py::test_x[a b-(3, 4)] - AssertionError\n"
    )
    found = stages.gpu_tests(60, tmp_path / "log", FakeShell(pytest=Finished(1, text)))
    assert found["status"] == "failed"
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failures"] == ["tests/gpu/test_a.py::test_x[a b-(3, 4)]", "tests/gpu/test_b.py::test_y"]
    assert (tmp_path / "log").read_text() == text


def test_gpu_tests_of_several_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 16)
    text = (
        "tests/gpu/test_a.py::test_x[a b] \n"
        "[gw0] [ 50%] PASSED tests/gpu/test_a.py::test_x[a b] \n"
        "[gw1] [100%] FAILED tests/gpu/test_a.py::test_y \n"
    )
    shell = FakeShell(pytest=Finished(1, text))
    found = stages.gpu_tests(60, tmp_path / "log", shell)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert found["failures"] == ["tests/gpu/test_a.py::test_y"]
    assert shell.commands[0][-2:] == ["-n", "3"]


def test_gpu_tests_cut_short_say_how_far_they_came(tmp_path):
    text = "tests/gpu/test_a.py::test_x PASSED [ 25%]\ntests/gpu/test_a.py::test_y "
    found = stages.gpu_tests(60, tmp_path / "log", FakeShell(pytest=Finished(None, text)))
    assert found["status"] == "cut short"
    assert found["reason"] == "1 passed; stopped after 60 s"


def test_no_test_run_is_a_failure(tmp_path):
    assert stages.gpu_tests(60, tmp_path / "log", FakeShell(pytest=Finished(5, "")))["status"] == "failed"


@pytest.mark.parametrize(
    ("done", "status", "words"),
    [
        (Finished(0, "ERROR SUMMARY: 0 errors"), "done", "memcheck: no errors; racecheck: no errors"),
        (Finished(86, "ERROR SUMMARY: 3 errors"), "failed", "memcheck: errors: ERROR SUMMARY: 3 errors"),
        (Finished(1, "Error: Device not supported"), "skipped", "does not work here: Device not supported"),
        (Finished(1, "1 failed"), "failed", "the tests failed under it: 1 failed"),
        (Finished(None, ""), "skipped", "stopped after 30 s"),
    ],
)
def test_sanitizer(monkeypatch, done, status, words):
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/usr/bin/{name}")
    shell = FakeShell(sanitizer=done)
    found = stages.sanitizer(60, shell)
    assert found["status"] == status
    assert words in found["reason"]
    assert shell.extras[0] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert [c[2] for c in shell.commands] == ["memcheck", "racecheck"]


def test_no_sanitizer_is_told(monkeypatch):
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    monkeypatch.setattr(stages.Path, "is_file", lambda path: False)
    assert stages.sanitizer(60, FakeShell()) == {"status": "skipped", "reason": "compute-sanitizer is not here"}


def test_shell_stops_a_command_and_its_children_and_keeps_what_they_said():
    start = time.monotonic()
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    done = stages.shell([sys.executable, "-c", code], 1.0, {})
    assert done.code is None
    assert done.text == "begun\n"
    assert time.monotonic() - start < 20


def test_shell_runs_in_the_tree_with_the_tree_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os; print(os.environ['PYTHONPATH'] == os.getcwd() + ':/elsewhere', os.environ['X'])"
    assert stages.shell([sys.executable, "-c", code], 60.0, {"X": "y"}) == Finished(0, "True y\n")
