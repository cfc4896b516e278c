"""One thread per worker, and fresh memory that shows: unwritten elements are NaN in every test."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import thinning
import torch

torch.set_num_threads(1)

TESTS = Path(__file__).parent


def emulator_build():
    """``tests/emulator/build.py``; its name is too common for an import."""
    spec = importlib.util.spec_from_file_location("emulator_build", TESTS / "emulator" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser):
    group = parser.getgroup("nfkernels")
    group.addoption(
        "--cuda-emulator",
        nargs="?",
        const="plain",
        choices=["plain", "asan"],
        help="run the op tests on the CUDA kernels, compiled for the CPU, in the place of the CPU kernels",
    )
    group.addoption(
        "--thread-order",
        default="forward",
        metavar="ORDER",
        help="with --cuda-emulator, whose turn comes first: forward, reverse or random:SEED",
    )


def pytest_configure(config):
    variant = config.getoption("--cuda-emulator")
    if not variant:
        return
    assert "nfkernels" not in sys.modules  # it would have its CPU kernels already
    name, _, seed = config.getoption("--thread-order").partition(":")
    try:
        module = emulator_build().load("nfkernels_emulated", variant)
        module.set_order(name, int(seed or 0))
    except (RuntimeError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    sys.modules["nfkernels._C"] = module

    def share_out(threads):
        """Tests that ask for 1, 2, 3 CPU threads, to see the same bits, get other thread orders and grids here."""
        module.set_order(*[(name, int(seed or 0)), ("reverse", 0), ("random", 0)][(threads - 1) % 3])
        module.set_multiprocessors(2 * threads + 1)

    torch.set_num_threads = share_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n alone, a worker that is done takes tests from the others: some take a minute, most a hundredth of one."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_ignore_collect(collection_path, config):
    """The CPU kernels' own tests have nothing to test under the emulator."""
    if config.getoption("--cuda-emulator") and collection_path in (TESTS / "csrc", TESTS / "triton"):
        return True
    return None


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """``torch.empty`` and its kin, from C++ too, fill with NaN under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest takes what -m leaves
def pytest_collection_modifyitems(items):
    thinning.thin(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keywords: a folder has the name too
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
