"""The CUDA kernels, run on the CPU by the emulator (tests/emulator) in several thread orders and under the sanitizers;
and the emulator itself: its primitives, and the faults that it must catch."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BUILD = Path(__file__).parents[1] / "emulator/build.py"
spec = importlib.util.spec_from_file_location("emulator_build", BUILD)
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)
pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
TESTS = Path(__file__).parents[1]
KERNELS = sorted((TESTS.parent / "csrc/cuda").glob("*.cu"))
OP_TESTS = [path for path in (TESTS / f"ops/test_{kernel.stem}.py" for kernel in KERNELS) if path.exists()]
# Forward and gradients against the reference, every layout and stride, NaN and infinities, the same bits in any order.
KEEP = (
    "native_matches or layouts or any_shape or expanded or non_finite or same_bits or rebuil or cut_by or every_size"
    " or test_every_width or not_finite_stays or every_form or any_spline or what_is_needed or not_depend"
    " or not_a_number"
)
# For less time, and for the sanitizers, which take several times as long: float16 (the last of four types) is
# bfloat16's code with another rounding.
KEEP_BRIEF = f"({KEEP}) and not dtype3 and not test_every_width"
ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


# --- the op tests ----------------------------------------------------------------------------------------------------


def run_op_tests(*options, files=OP_TESTS, env=None, keep=KEEP):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            keep,
            *options,
            *map(str, files),
        ],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(not OP_TESTS, reason="there are no CUDA kernels")
def test_ops_in_random_thread_order():
    run_op_tests("--cuda-emulator=plain", "--thread-order=random:1", keep=KEEP_BRIEF)


@pytest.mark.exhaustive
@pytest.mark.skipif(not OP_TESTS, reason="there are no CUDA kernels")
@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
def test_ops_in_thread_order(order):
    run_op_tests("--cuda-emulator=plain", f"--thread-order={order}")


# In the third order. A few files in each process: starting one under the sanitizers takes as long as a file's tests.
# Compiling every kernel for them takes two cores two minutes, and so waits to be asked for; that they catch what they
# must is tested always, on kernels with planted faults.
@pytest.mark.exhaustive
@pytest.mark.parametrize("files", [OP_TESTS[i::3] for i in range(3)], ids=range(3))
def test_ops_under_the_sanitizers(files):
    run_op_tests(
        *("--cuda-emulator=asan", "--thread-order=reverse"),
        files=files,
        env=emulator.sanitizer_environment(),
        keep=KEEP_BRIEF,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", OP_TESTS, ids=lambda path: path.stem)
def test_all_of_the_ops_under_the_sanitizers(path):
    run_op_tests("--cuda-emulator=asan", files=[path], env=emulator.sanitizer_environment())


# --- primitives ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "ucontext"])
def planted(request):
    module = emulator.load("nfkernels_planted", request.param)
    yield module
    module.set_order("forward", 0)


def address(array) -> int:
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES := [np.float32, np.float64, np.int32, np.uint32])
def test_shuffles(planted, dtype, order):
    planted.set_order(*order)
    threads = 96
    x = (normal(threads) * 1e6).astype(np.int64).astype(dtype)
    out = np.zeros((6, threads), dtype)
    planted.shuffles(DTYPES.index(dtype), address(x), address(out), threads)
    warps, lane = x.reshape(-1, 32), np.arange(32)
    down = [np.where(lane + d < 32, lane + d, lane) for d in (1, 16)]
    for row, source in zip(out, [np.full(32, 5), 31 - lane, lane ^ 1, lane ^ 21, *down], strict=True):
        np.testing.assert_array_equal(row.reshape(-1, 32), warps[:, source])


def test_votes(planted):
    x = np.concatenate([np.full(32, -1), np.full(32, 1), np.where(np.arange(32) == 7, 1, -1)]).astype(np.float32)
    out = np.zeros((2, 96), np.float32)
    planted.votes(address(x), address(out), 96)
    positive = x.reshape(3, 32) > 0
    np.testing.assert_array_equal(out[0].reshape(3, 32), np.broadcast_to(positive.any(1)[:, None], (3, 32)))
    np.testing.assert_array_equal(out[1].reshape(3, 32), np.broadcast_to(positive.all(1)[:, None], (3, 32)))


def tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("depth", [8, 64])
def test_matrix_product(planted, depth):
    a, b, d = normal(16, depth), normal(depth, 8, seed=1), np.full((16, 8), np.nan, np.float32)
    exact = a.astype(np.float64) @ b
    planted.product(1, address(a), address(b), address(d), depth)
    np.testing.assert_allclose(d, tf32(a).astype(np.float64) @ tf32(b), rtol=0, atol=2e-5)
    assert np.abs(d - exact).max() > 2e-4  # which is why a kernel takes three of them
    planted.product(3, address(a), address(b), address(d), depth)
    np.testing.assert_allclose(d, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("half", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
def test_storage_rounds_as_torch_does(planted, half, dtype):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (every[:-1].double() + every[1:].double()).div(2).float()
    x = torch.cat([torch.from_numpy(bits.view(np.float32)), every, ties, torch.tensor([65519.99, 65520.0, 3e-8, -0.0])])
    stored, back = torch.empty(x.numel(), dtype=dtype), torch.empty(x.numel())
    planted.conversions(half, address(x), address(stored), address(back), x.numel())
    want = x.to(dtype)
    number = ~x.isnan()
    assert torch.equal(stored[number].view(torch.int16), want[number].view(torch.int16))
    assert torch.equal(back[number], want[number].float())
    assert stored[~number].isnan().all()
    assert back[~number].isnan().all()


@pytest.mark.parametrize("which", range(6))
def test_packs(planted, which):
    values = [4, 2, 8, 8, 1, 2][which] * 64
    x = np.random.default_rng(0).integers(0, 255, values * [4, 8, 2, 4, 2, 4][which], dtype=np.uint8)
    out = np.zeros_like(x)
    planted.packs(which, address(x), address(out))
    np.testing.assert_array_equal(out, x)


def turns(planted, blocks, threads):
    out = np.zeros((blocks, 2, threads), np.int32)
    planted.turns(address(out), blocks, threads, 8)
    return out


def test_thread_orders(planted):
    rising = np.arange(70)
    planted.set_order("forward", 0)
    np.testing.assert_array_equal(turns(planted, 1, 70)[0], [rising, rising])
    planted.set_order("reverse", 0)
    np.testing.assert_array_equal(turns(planted, 1, 70)[0], [rising[::-1], rising[::-1]])
    planted.set_order("random", 3)
    first = turns(planted, 2, 70)
    planted.set_order("random", 3)
    np.testing.assert_array_equal(first, turns(planted, 2, 70))
    np.testing.assert_array_equal(np.sort(first.reshape(4, 70)), np.broadcast_to(rising, (4, 70)))
    assert len({tuple(row) for row in [*first.reshape(4, 70), rising]}) == 5
    with pytest.raises(ValueError, match="unknown thread order"):
        planted.set_order("backward", 0)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("2147483648 blocks", (2**31, 32, 8)),
        ("1025 threads", (1, 1025, 8)),
        ("0 threads", (1, 0, 8)),
        ("232449 bytes of shared memory", (1, 32, 227 * 1024 + 1)),
    ],
)
def test_impossible_launches(planted, message, arguments):
    with pytest.raises(RuntimeError, match=message):
        planted.turns(0, *arguments)


# --- planted faults --------------------------------------------------------------------------------------------------


def warp_sums(x):
    padded = np.zeros(-(-len(x) // 32) * 32, np.float32)
    padded[: len(x)] = x
    return np.repeat(padded.reshape(-1, 32).sum(1), 32)[: len(x)]


def plus_one(x):
    return x + 1


def reverse(width):
    return lambda x: x.reshape(-1, width)[:, ::-1].ravel()


# name -> (n, what it computes, what catches it: part of the emulator's error, or None for a wrong result)
FAULTS = {
    "missing_barrier": (256, reverse(64), None),
    "missing_barrier_before_reuse": (256, reverse(64), None),
    "missing_warp_barrier": (256, reverse(32), None),
    "divergent_barrier": (200, plus_one, r"wait for each other .* sync_block, in barriers\.cu:\d+"),
    "early_return": (200, plus_one, r"block 1 of 2: .* 72 threads \(0, 1, 2, 3, \.\.\.\) at sync_block, .* returned"),
    "missing_lane": (200, warp_sums, r"wait for each other .* 8 threads .* at shuffle_xor, in barriers\.cu:\d+"),
    "mixed_collectives": (64, plus_one, "other lanes of its warp wait at"),
    "partial_warp": (256, warp_sums, r"shuffle_xor needs 32 lanes, but .* 100 threads\), in barriers\.cu:\d+"),
    "unwritten": (200, plus_one, None),
    "misaligned_vector": (64, plus_one, r"a vector load of 16 bytes at an address .*, in memory\.cu:\d+"),
    "misaligned_copy": (64, plus_one, r"copy_async of 16 bytes at an address .*, in memory\.cu:\d+"),
    "missing_copy_wait": (200, plus_one, None),
    "copy_past_shared": (200, plus_one, r"does not write into the block's 256 bytes .*, in memory\.cu:\d+"),
    "unrounded_operand": (32, tf32, r"not rounded by to_tf32 .*, in primitives\.cu:\d+"),
    "out_of_bounds_shared": (256, plus_one, r"written 0 bytes behind the end of its 256 bytes of shared memory"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(planted, name, order):
    n, compute, message = FAULTS[name]
    planted.set_order(*order)
    x = normal(n)

    def matches(fault):
        out = torch.empty(n)  # NaN, by the fixture of every test
        getattr(planted, name)(fault, address(x), address(out), n)
        return np.allclose(out.numpy(), compute(x), rtol=1e-5, atol=1e-5)

    assert matches(False)
    if message is None:
        assert not matches(True)
    else:
        with pytest.raises(RuntimeError, match=message):
            matches(True)
    assert matches(False)  # an error leaves the emulator usable


# --- under the sanitizers --------------------------------------------------------------------------------------------

SANITIZED = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("nfkernels_planted", sys.argv[1])
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)
name, faults, n = sys.argv[2], sys.argv[3], int(sys.argv[4])
x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
for order in ("forward", "reverse", "random"):
    planted.set_order(order, 1)
    for which in name.split(","):
        for fault in faults:
            out = np.full(n, np.nan, np.float32)
            try:
                getattr(planted, which)(fault == "1", x.ctypes.data, out.ctypes.data, n)
            except RuntimeError as error:
                print("told", error)
            else:
                assert not np.isnan(out).any()
print("survived")
"""


def sanitized(names, faults, n):
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, emulator.build("nfkernels_planted", "asan"), names, faults, str(n)],
        env=os.environ | emulator.sanitizer_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("out_of_bounds_read", r"heap-buffer-overflow.*READ of size 4.*in .*neighbours<true>.*memory\.cu:\d+"),
        ("out_of_bounds_write", r"heap-buffer-overflow.*WRITE of size 4.*in .*fours<true>.*memory\.cu:\d+"),
        ("out_of_bounds_shared", r"heap-buffer-overflow.*WRITE of size 4.*in .*shifted.*memory\.cu:\d+"),
    ],
)
def test_sanitizer_names_the_line(name, report):
    done = sanitized(name, "1", 64 * 3 if name == "out_of_bounds_shared" else 199)
    assert done.returncode != 0, done.stdout
    assert re.search(report, done.stderr, re.DOTALL), done.stderr[:3000]


def test_sanitizer_lets_correct_kernels_pass():
    names = [*FAULTS, "out_of_bounds_read", "out_of_bounds_write"]
    done = sanitized(",".join(names), "0", 64)
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout == "survived\n"


def test_errors_within_kernels_leave_the_sanitizer_content():
    """Threads that an error cuts short are given up in the middle of their stacks."""
    others = ("out_of_bounds_shared", "missing_lane")  # the sanitizer's own; needs a last warp that is not full
    told = [name for name, (_, _, message) in FAULTS.items() if message and name not in others]
    done = sanitized(",".join(told), "1001", 64)
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("told nfkernels emulator: kernel") == 3 * 2 * len(told)
