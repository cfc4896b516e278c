"""The op tests once more on each instruction set below the best one this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("nfkernels._C", reason="the compiled module is not built")
TESTS = Path(__file__).parents[1]
SETS = ["baseline", "avx2", "avx512"]


FILES = [
    *(f"ops/test_{op}.py" for op in ("affine_coupling", "channel_mix", "coupling_mix", "dense_net", "dequantize")),
    *(
        f"ops/test_{op}.py"
        for op in ("gaussian_log_density", "lu_layer", "philox_uniform", "rational_quadratic_spline")
    ),
    "csrc/test_elementary.py",
]
KEEP = (
    "(native_matches or elementary or accuracy or special or non_finite or threads or every_backend or as_accurate"
    " or hard_inputs) and not million"
)
RUN = """
import sys, pytest, torch, nfkernels._C
assert nfkernels._C.isa() == sys.argv[1], nfkernels._C.isa()
sys.exit(pytest.main(sys.argv[2:]))
"""
SLOWER = pytest.mark.parametrize("isa", SETS[: SETS.index(_C.isa())])


def run_op_tests(isa, *options):
    done = subprocess.run(
        [sys.executable, "-c", RUN, isa, "-q", "-x", "-p", "no:cacheprovider", "-k", KEEP, *options]
        + [str(TESTS / file) for file in FILES],
        env=os.environ | {"NFKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@SLOWER
def test_ops_on(isa):
    run_op_tests(isa)


@pytest.mark.exhaustive
@SLOWER
def test_all_of_the_ops_on(isa):
    run_op_tests(isa, "-m", "")
