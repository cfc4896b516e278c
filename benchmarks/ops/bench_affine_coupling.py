"""Affine coupling in Glow's form, against the package's own reference, the few lines that every Glow port writes (eager
and compiled), and a copy of the same bytes.

    python -m pytest benchmarks/ops --benchmark-columns=min,median,rounds --benchmark-sort=name

Bytes: forward and inverse read x and params and write y; the backward reads half of y, params and dy and writes dx and
dparams (DESIGN: 3 N s and 4 N s for a full output).
"""

import pytest
import torch
from common import COPY, assert_close, copy_of, saved_bytes

from nfkernels import affine_coupling, use_backend

CONTENDERS = ("nfkernels", "reference eager", "hand-written eager", "hand-written compiled", COPY)
SHAPES = [(64, 48, 16, 16), (64, 12, 16, 16), (4096, 64)]
FORM = {"scale_map": "glow", "order": "shift_first", "identity": "first"}


def eager(x, params, inverse=False):
    """The coupling as every Glow port writes it."""
    x1, x2 = x.chunk(2, 1)
    shift, raw = params.chunk(2, 1)
    scale = torch.sigmoid(raw + 2)
    logdet = torch.log(scale).flatten(1).sum(1)
    if inverse:
        return torch.cat([x1, x2 / scale - shift], 1), -logdet
    return torch.cat([x1, (x2 + shift) * scale], 1), logdet


def fused(x, params, inverse=False):
    return affine_coupling(x, params, inverse=inverse, **FORM)


def reference(x, params, inverse=False):
    with use_backend("reference"):
        return fused(x, params, inverse)


def contender(name):
    return {
        "nfkernels": fused,
        "reference eager": reference,
        "hand-written eager": eager,
        "hand-written compiled": torch.compile(eager),
    }[name]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_no_grad(benchmark, shape, direction, name):
    torch.manual_seed(0)
    x, params = torch.randn(shape), torch.randn(shape)
    benchmark.group = f"affine_coupling {direction} {shape}"
    if name == COPY:
        benchmark(copy_of(3 * x.nbytes))
        return
    run, inverse = contender(name), direction == "inverse"
    with torch.no_grad():
        with use_backend("reference"):
            want = fused(x.double(), params.double(), inverse)
        assert_close([v.double() for v in run(x, params, inverse)], want, atol=1e-3 if inverse else 1e-4)
        benchmark(run, x, params, inverse)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(benchmark, shape, name):
    torch.manual_seed(0)
    x, params = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    benchmark.group = f"affine_coupling forward+backward {shape}"
    if name == COPY:
        benchmark(copy_of(7 * x.nbytes + x.nbytes // 2))
        return
    run = contender(name)

    def step(run=run):
        return torch.autograd.grad(run(x, params), [x, params], [dy, dlogdet])

    assert_close(step(), step(fused) if name != "nfkernels" else step(eager), rtol=1e-3)
    inputs = {x.untyped_storage().data_ptr()}
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: run(x, params), inputs)
    benchmark.extra_info["output_and_params_bytes"] = 2 * x.nbytes
    if name == "nfkernels":
        assert benchmark.extra_info["saved_bytes"] <= 2 * x.nbytes
    benchmark(step)
