"""What setup.py makes of its variables: architectures, missing tools."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("nfkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path):
    """Lists what it can compile for, as nvcc does."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 90 100\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("wanted", "code", "ptx"),
    [
        (None, ["80", "86", "90", "100"], ["80"]),
        ("", ["80", "86", "90", "100"], ["80"]),
        ("9.0", ["90"], []),
        ("8.0;9.0+PTX", ["80", "90"], ["90"]),
        ("8.6 10.0", ["86", "100"], []),
    ],
)
def test_architectures(recipe, nvcc, monkeypatch, wanted, code, ptx):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert recipe.architectures(nvcc) == (code, ptx)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("7.5", "8.0 .Ampere. or newer"), ("hopper", "'hopper': expected numbers"), ("12.0", "'12.0': expected numbers")],
)
def test_architectures_that_cannot_be(recipe, nvcc, monkeypatch, wanted, said):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(RuntimeError, match=said):
        recipe.architectures(nvcc)


def build(tmp_path, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_without_nvcc_the_build_goes_on_and_says_so(tmp_path):
    done = build(tmp_path, NFKERNELS_CPU="0", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"nvcc was not found ({tmp_path})" in done.stderr
    assert "the Triton kernels serve instead" in done.stderr


def test_asked_for_it_is_fatal(tmp_path):
    done = build(tmp_path, NFKERNELS_CPU="0", NFKERNELS_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


def test_a_word_that_means_nothing(tmp_path):
    done = build(tmp_path, NFKERNELS_CPU="0", NFKERNELS_CUDA="yes")
    assert done.returncode != 0
    assert "NFKERNELS_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr
