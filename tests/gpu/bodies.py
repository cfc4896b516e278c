"""What the GPU tests do, by op, backend and device, so that the same lines run on a CPU where that means something."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.case import FORWARD, INVERSE, STEP, Case, Contender, Op, Sample, draw, exact, needs_grad, prepare
from benchmarks.gate import EPS, compare, same_bits
from benchmarks.ops import tables

OPS = {op.name: op for op in tables()}
GPU = pytest.mark.gpu
SERVED = [
    pytest.param("cpu", "native", id="cpu-native"),
    pytest.param("cuda", "native", id="cuda-native", marks=GPU),
    pytest.param("cuda", "triton", id="cuda-triton", marks=GPU),
]
ON_GPU = SERVED[1:]
SHAPES = [(3, 12, 16, 16), (2, 48, 7, 5), (70, 6), (5, 33, 4, 4), (1, 4, 1, 1), (4, 3, 129), (2, 8, 64, 96), (0, 4, 3)]
FORMATS = ("contiguous", "channels_last", "sliced")
# (data, params)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
]


def variants(op: Op) -> list[str]:
    """Every set of options that the op's table has."""
    return list(dict.fromkeys(case.variant for case in op.cases("cuda")))


def direction_of(op: Op) -> str:
    return STEP if op.differentiable else FORWARD


def contender(op: Op, variant: str, backend: str) -> Contender:
    return Contender(backend, op.call(variant), backend, ours=True)


def relaid(t: torch.Tensor, fmt: str) -> torch.Tensor:
    """The same numbers in another layout; ``sliced`` is the middle of a wider tensor whose rest is not a number."""
    if t.dim() < 2:
        return t
    if fmt == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if fmt == "sliced" and t.is_floating_point():
        wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, 1 : 1 + t.shape[1]] = t
        return wide[:, 1 : 1 + t.shape[1]]
    return t


def sample_of(op: Op, case: Case, device: str, fmt: str = "contiguous", seed: int = 0) -> Sample:
    sample = draw(op, case, device, seed)
    inputs = {k: v if k.endswith("weight") else relaid(v, fmt) for k, v in sample.inputs.items()}
    return Sample(inputs, [relaid(t, fmt) for t in sample.cotangents])


def run(op: Op, case: Case, backend: str, sample: Sample):
    """Outputs, and gradients where the case asks for them."""
    c = contender(op, case.variant, backend)
    with c.context(needs_grad(case)):
        return prepare(op, case, c.run, sample)()


def check_exact(op: Op, case: Case, device: str, backend: str, fmt: str = "contiguous") -> None:
    """Every output and gradient against the reference in float64."""
    sample = sample_of(op, case, device, fmt)
    plain = run(op, case, "reference", sample)
    target = run(op, case, "reference", exact(op, sample))
    verdict = compare(run(op, case, backend, sample), plain, target)
    assert verdict.ok, f"{case.id}, {fmt}, {backend} on {device}: {verdict.reason}"


def directions(op: Op) -> list[str]:
    return [direction_of(op)] + [INVERSE] * any(c.direction == INVERSE for c in op.cases("cuda"))


def check_repeats(op: Op, case: Case, device: str, backend: str, runs: int = 5) -> None:
    """The same inputs give the same bits, run after run."""
    sample = sample_of(op, case, device)
    first = run(op, case, backend, sample)
    for _ in range(runs - 1):
        assert same_bits(first, run(op, case, backend, sample)), f"{case.id}, {backend} on {device}"


def check_non_finite(op: Op, case: Case, device: str, backend: str) -> None:
    """What is not finite shows where the reference shows it, and in no other sample."""
    clean = sample_of(op, case, device)
    dirty = Sample({k: v.clone() for k, v in clean.inputs.items()})
    for row, key in enumerate([k for k in ("x", "params") if k in dirty.inputs]):
        for i, value in enumerate((float("nan"), float("inf"))):
            dirty.inputs[key][2 * row + i].flatten()[-1] = value
    want, got, whole = (run(op, case, b, s) for b, s in (("reference", dirty), (backend, dirty), (backend, clean)))
    for a, b, c in zip(got, want, whole, strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(b)), f"{case.id}, {backend} on {device}"
        assert same_bits([a[4:]], [c[4:]])


def check_by_slices(op: Op, case: Case, device: str, backend: str, chunks: int) -> None:
    """A tensor too large for float64 copies: every slice of its first spatial axis against the reference on it alone.
    Outputs per sample are sums over positions, so theirs add up."""
    sample = draw(op, case, device)
    with torch.no_grad():
        got = run(op, case, backend, sample)
        sums = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) if t.dim() == 1 else None for t in got]
        length = -(-case.shape[2] // chunks)
        for start in range(0, case.shape[2], length):
            here = {k: v.narrow(2, start, min(length, case.shape[2] - start)) if v.dim() > 2 else v
                    for k, v in sample.inputs.items()}  # fmt: skip
            want = run(op, case, "reference", Sample(here))
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                if sums[index] is not None:
                    sums[index] += b.double()
                    continue
                part = a.narrow(2, start, b.shape[2])
                worst = (part.float() - b.float()).abs().max().item()
                assert worst <= 4 * EPS[a.dtype] * max(1.0, b.abs().max().item()), (case.id, backend, start, worst)
    for a, total in zip(got, sums, strict=True):
        if total is not None:
            torch.testing.assert_close(a.double(), total, rtol=1e-4, atol=1e-2)


@contextlib.contextmanager
def other_stream(device: str):
    """A stream that is not the default one; nothing on a CPU."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
