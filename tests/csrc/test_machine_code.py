"""The static gate of the CUDA kernels: no spills, 16-byte accesses where they count, and a table that shows changes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

import machine_code
import pytest
import sass
import torch

# Where setup.py builds the module by itself, or was told to, it must be there.
asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or os.environ.get("NFKERNELS_CUDA") == "1"
expected = Path("/usr/local/cuda/bin/nvcc").is_file() and (asked or torch.version.cuda)
if importlib.util.find_spec("nfkernels._C_cuda") is None and not expected:
    pytest.skip("nfkernels._C_cuda is not built: no nvcc, or a CPU build of PyTorch", allow_module_level=True)
if None in (sass.tool("cuobjdump"), sass.tool("nvdisasm"), shutil.which("c++filt")):
    pytest.skip("cuobjdump, nvdisasm or c++filt is not here", allow_module_level=True)

ARCHITECTURES = [
    "sm_90",
    *(pytest.param(a, marks=pytest.mark.exhaustive) for a in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")),
]


def built(architecture):
    available = importlib.import_module("nfkernels._C_cuda").architectures
    if architecture not in available.split(","):
        pytest.skip(f"nfkernels._C_cuda is built for {available}")
    return machine_code.kernels(architecture)


def test_the_module_loads_without_a_gpu_and_says_why_it_does_not_serve():
    """Under a CPU build of PyTorch too: nothing of libtorch_cuda or of the driver is linked."""
    module = importlib.import_module("nfkernels._C_cuda")
    library = importlib.import_module("nfkernels.ops._library")
    assert module.schema_version == library.SCHEMA_VERSION
    assert module.compiler.startswith("nvcc ")
    if not torch.cuda.is_available():
        assert isinstance(module.why_unusable(0), str)
        assert library.cuda_module_missing() == "PyTorch finds no CUDA device"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture):
    kernels = built(architecture)
    assert len(kernels) > 20
    # Elsewhere ptxas parks an address or two in three kernels, far below its limit of registers; a spill is more.
    most = 0 if architecture in machine_code.IN_TABLE else 16
    bad = {name: (k.stack, k.spills) for name, k in kernels.items() if k.stack > most or (k.spills and not k.stack)}
    assert not bad, f"bytes of stack, local accesses: {bad}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hot", machine_code.HOT + machine_code.HOT_READERS)
def test_hot_kernels_move_16_bytes_at_a_time(architecture, hot):
    """Loads (LDG, or LDGSTS straight to shared memory) and stores."""
    kernels = {name: k for name, k in built(architecture).items() if re.fullmatch(hot, name)}
    assert kernels, f"no kernel is called {hot}"
    for name, kernel in kernels.items():
        assert kernel.accesses.get("LDG.128", 0) + kernel.accesses.get("LDGSTS.128", 0) > 0, (name, kernel)
        assert kernel.accesses.get("STG.128", 0) > 0 or hot in machine_code.HOT_READERS, (name, kernel)


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.exhaustive), "sm_90"])
def test_table_is_up_to_date(architecture):
    """Exactly under the compiler that made it; another one gives other numbers, and the tests above bound those."""
    built(architecture)
    written = machine_code.TABLE.read_text(encoding="utf-8")
    if machine_code.compiler() not in written:
        pytest.skip(f"the table is for another compiler than {machine_code.compiler()}")
    made, kept = (machine_code.column(t, architecture) for t in (machine_code.table((architecture,)), written))
    assert made == kept, "run: python tests/csrc/machine_code.py --write, and look at the change"
