"""The Gaussian log-density's Triton kernels against the reference, every option, on tiny shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comparison import assert_close, placed, widened

from nfkernels import gaussian_log_density, use_backend
from nfkernels.triton import gaussian_log_density as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, *, learned=True, dtype=F32, params_dtype=None, places=("contiguous", "contiguous"), running=False,
            layout="shift_scale", seed=0):  # fmt: skip
    """Forward and backward of one case on Triton, on the reference, and on the reference in float64."""
    g = torch.Generator().manual_seed(seed)
    compute = F64 if dtype == F64 else F32

    def random(*size, dtype=dtype):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    inputs = {"x": placed(random(*shape), places[0])}
    if learned:
        params = 0.5 * random(shape[0], 2 * shape[1], *shape[2:], dtype=F64)
        inputs["params"] = placed(params.to(params_dtype or dtype), places[1])
    if running:
        inputs["logdet"] = random(shape[0], dtype=compute)
    dout = random(shape[0], dtype=compute)

    def results(backend, inputs, dout):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        with use_backend(backend):
            out = gaussian_log_density(**leaves, layout=layout)
            out.backward(dout)
        return {"out": out.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}

    got = results("triton", inputs, dout)
    plain = results("reference", inputs, dout)
    exact = results("reference", {k: widened(v) for k, v in inputs.items()}, dout.double())
    for name in got:
        assert_close(name, got[name], plain[name], exact[name])
    return got


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 7), (2, 3, 400), (2, 6, 11, 17)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_layouts(layout, shape, first):
    if first:
        compare(shape, layout=layout)
    else:
        compare(shape, layout=layout, params_dtype=BF16, places=("contiguous", "channels_last"), running=True)


DTYPES = [(F64, F64), (F64, BF16), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]


@pytest.mark.covering
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 11, 17)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_dtypes(dtypes, shape, first):
    if first:
        compare(shape, dtype=dtypes[0], params_dtype=dtypes[1], running=True)
    else:
        compare(shape, dtype=dtypes[0], learned=False, running=True)


@pytest.mark.covering
@pytest.mark.parametrize("places", itertools.product(("contiguous", "channels_last", "sliced"), repeat=2), ids="-".join)
@pytest.mark.parametrize("shape", [(3, 6, 2, 5), (2, 12, 7, 9)], ids=["rows", "images"])
@pytest.mark.parametrize("first", [True, False])
def test_memory_layouts(places, shape, first):
    if first:
        compare(shape, places=places)
    else:
        compare(shape, places=places, learned=False)


SHAPES = [(1, 1), (3, 1), (37, 2), (2, 1, 1, 1), (3, 7, 1), (2, 13, 13), (2, 3, 601), (2, 1031), (1, 1, 4, 0)]


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, first):
    """One channel, one position, odd and prime, several samples to a program and one sample to several tiles."""
    if first:
        compare(shape, running=True)
    else:
        compare(shape, learned=False)


@pytest.mark.parametrize("learned", [False, True])
def test_a_sum_in_two_stages(learned):
    for running in (False, True):
        got = compare((1, 3, 5, 800), running=running, learned=learned)
        again = compare((1, 3, 5, 800), running=running, learned=learned)
        assert all(torch.equal(got[k], again[k]) for k in got)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 200)], ids=str)
def test_gradients_asked_for(shape):
    x, params = torch.randn(shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])
    dout = torch.randn(1).expand(shape[0])
    dx, dparams = launchers.backward(x, params, dout, 0, True, True)
    only, none = launchers.backward(x, params, dout, 0, True, False)
    assert torch.equal(only, dx)
    assert none.numel() == 0
    none, only = launchers.backward(x, params, dout, 0, False, True)
    assert torch.equal(only, dparams)
    assert none.numel() == 0


def test_empty_batch():
    with use_backend("triton"):
        out = gaussian_log_density(torch.zeros(0, 4, 3), torch.zeros(0, 8, 3))
        assert (out.shape, out.dtype) == ((0,), F32)
        nothing = gaussian_log_density(torch.zeros(2, 4, 0), logdet=torch.ones(2))
        assert torch.equal(nothing, torch.ones(2))
    dx, dparams = launchers.backward(torch.zeros(0, 4, 3), torch.zeros(0, 8, 3), torch.zeros(0), 0, True, True)
    assert (dx.shape, dparams.shape) == ((0, 4, 3), (0, 8, 3))


def test_non_finite_values_come_through():
    x, params = torch.zeros(4, 3, 30), torch.zeros(4, 6, 30)
    x[1, 2, 29], x[2, 0, 1], params[3, 5, 29] = math.inf, math.nan, math.inf
    with use_backend("triton"):
        out = gaussian_log_density(x, params)
    assert out[1] == out[3] == -math.inf
    assert torch.isnan(out[2])
    assert torch.isfinite(out[0])
