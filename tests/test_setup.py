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
    monkeypatch.setattr(recipe, "gpus", list)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert recipe.architectures(nvcc) == (code, ptx)


@pytest.mark.parametrize(
    ("told", "code", "ptx"),
    [
        ("9.0\n9.0\n8.6\n7.5\n", ["86", "90"], []),
        ("7.5\n", ["80", "86", "90", "100"], ["80"]),  # a GPU that the kernels are not for
        ("12.0\n", ["80", "86", "90", "100"], ["80"]),  # one that this nvcc does not know
        ("no devices were found\n", ["80", "86", "90", "100"], ["80"]),
    ],
)
def test_architectures_of_the_gpus_that_are_here(recipe, nvcc, monkeypatch, tmp_path, told, code, ptx):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert recipe.architectures(nvcc) == (code, ptx)


def test_without_nvidia_smi_there_is_no_gpu(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recipe.gpus() == []


@pytest.mark.parametrize(
    ("has_cuda", "environment", "built"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"NFKERNELS_CUDA": "1"}, True),
        (False, {"TORCH_CUDA_ARCH_LIST": "9.0"}, True),
    ],
)
def test_a_cpu_build_of_torch_gets_no_cuda_kernels_unless_asked(
    recipe, nvcc, monkeypatch, tmp_path, has_cuda, environment, built
):
    for name in ("NFKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    nvcc.rename(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(recipe, "torch_has_cuda", lambda: has_cuda)
    ran = []
    monkeypatch.setattr(recipe.NinjaFile, "run", lambda self, output, link: ran.append(output))
    if built:
        recipe.build_cuda(tmp_path / "build", tmp_path / "out.so")
    else:
        with pytest.raises(RuntimeError, match="this PyTorch is a CPU build"):
            recipe.build_cuda(tmp_path / "build", tmp_path / "out.so")
    assert bool(ran) == built


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
