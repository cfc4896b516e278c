"""The op tests once more on each instruction set below the best one this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("nfkernels._C", reason="the compiled module is not built")
TESTS = Path(__file__).parents[1]
SETS = ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("isa", SETS[: SETS.index(_C.isa())])
def test_ops_on(isa):
    env = os.environ | {"NFKERNELS_CPU_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "import torch, nfkernels._C as c; print(c.isa())"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert probe.stdout.strip() == isa, probe.stdout + probe.stderr
    files = [
        TESTS / "ops/test_affine_coupling.py",
        TESTS / "ops/test_channel_mix.py",
        TESTS / "ops/test_coupling_mix.py",
        TESTS / "ops/test_dense_net.py",
        TESTS / "ops/test_dequantize.py",
        TESTS / "ops/test_gaussian_log_density.py",
        TESTS / "ops/test_lu_layer.py",
        TESTS / "ops/test_philox_uniform.py",
        TESTS / "ops/test_rational_quadratic_spline.py",
        TESTS / "csrc/test_elementary.py",
    ]
    keep = "native_matches or elementary or accuracy or special or non_finite or threads or every_backend"
    keep = f"({keep} or as_accurate or hard_inputs) and not nine_million"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", keep, *map(str, files)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
