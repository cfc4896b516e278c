"""Runs the checks in ``interpreted/`` under Triton's interpreter, in processes of its own.

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


CHECKS = sorted(HERE.glob("check_*.py"))


def checked(files, *options):
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run([*command, *map(str, files)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("part", range(4))
def test_interpreted(part):
    """A few files to a process: one takes as long to start as many a file's checks."""
    checked(CHECKS[part::4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_all_of_interpreted(path):
    checked([path], "-m", "")
