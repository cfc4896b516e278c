"""The autoregressive convolution's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, placed

from nfkernels import autoregressive_conv, use_backend
from nfkernels.reference.autoregressive_conv import Form
from nfkernels.reference.autoregressive_conv import forward as reference
from nfkernels.triton import autoregressive_conv as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, size=3, *, raster=False, reverse=False, solve=True, dtype=F32, layout="contiguous", bias=True):
    g = torch.Generator().manual_seed(0)
    channels, compute = shape[1], F64 if dtype == F64 else F32
    form = Form(size, size, raster, reverse)
    x = placed(torch.randn(shape, generator=g, dtype=F64).to(dtype), layout)
    weight = 0.4 * torch.randn(len(form.offsets()), channels, channels, generator=g, dtype=F64) / (channels**0.5 * size)
    weight, shift = weight.to(compute), torch.randn(channels, generator=g, dtype=F64).to(compute) if bias else None
    got = launchers.forward(x, weight, shift, *form, solve)
    plain = torch.empty_like(x).copy_(reference(x, weight, shift, form, solve))
    exact = reference(x.double(), weight.double(), None if shift is None else shift.double(), form, solve)
    assert_close("y", got, plain, exact)


@pytest.mark.covering(2)
@pytest.mark.parametrize("raster", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("solve", [False, True])
def test_kinds(raster, reverse, solve):
    options = {"raster": raster, "reverse": reverse, "solve": solve}
    compare((2, 3, 4, 5), **options)
    compare((1, 2, 3, 2), 5, bias=False, **options)
    compare((2, 2, 2, 3), dtype=BF16, layout="channels_last", **options)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_dtypes_and_memory_layouts(dtype, layout):
    for solve in (False, True):
        compare((2, 3, 4, 3), raster=True, solve=solve, dtype=dtype, layout=layout)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 1, 7), (2, 2, 6, 1), (1, 17, 2, 3), (1, 1, 70, 2), (40, 2, 2, 2)]
)
def test_shapes(shape):
    """One channel, one pixel, one row, one column, more channels and more rows than a tile."""
    for solve in (False, True):
        compare(shape, solve=solve)


def test_where_the_barrier_orders_no_stores_the_reference_serves(monkeypatch):
    monkeypatch.setattr(launchers, "barrier_orders_stores", lambda device: False)
    monkeypatch.setattr(launchers, "solve_kernel", None)
    compare((2, 3, 4, 5), dtype=BF16, layout="channels_last")


def test_gradients_and_empty_batch():
    for inverse in (False, True):
        grads = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            x, weight = torch.randn(2, 3, 3, 4), 0.2 * torch.randn(3, 3, 3, 3)
            weight[:, :, 1, 1] += torch.eye(3)
            leaves = [t.requires_grad_() for t in (x, weight, torch.randn(3))]
            with use_backend(backend):
                y = autoregressive_conv(*leaves, inverse=inverse)
                grads.append(torch.autograd.grad(y.square().sum(), leaves))
                assert autoregressive_conv(x[:0], weight, inverse=inverse).shape == (0, 3, 3, 4)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
