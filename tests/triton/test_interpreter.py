"""Runs the checks in ``interpreted/`` under Triton's interpreter, each file in a process of its own.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, and its patches would leak into later compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="Triton is not installed")

HERE = Path(__file__).parent / "interpreted"


CHECKS = [
    "check_affine_coupling",
    "check_autoregressive_conv",
    "check_autoregressive_inverse",
    "check_channel_mix",
    "check_coupling_mix",
    "check_dequantize",
    "check_gaussian_log_density",
    "check_lu_compose",
    "check_lu_linear",
    "check_rational_quadratic_spline",
    "check_scale_map",
]


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, str(HERE / f"{name}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
