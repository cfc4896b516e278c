"""The channel mix's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, placed

from nfkernels import channel_mix, use_backend
from nfkernels.triton import channel_mix as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, *, dtype=F32, layout="contiguous", bias=True, grads="random"):
    g = torch.Generator().manual_seed(0)
    compute = F64 if dtype == F64 else F32
    channels = shape[1]

    def random(*size, dtype=compute):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    x = placed(random(*shape, dtype=dtype), layout)
    weight = random(channels, channels) / channels**0.5
    inputs = [x, weight] + ([random(channels)] if bias else [])
    dy = random(*shape, dtype=dtype)

    def results(backend, inputs, dy):
        leaves = [v.detach().requires_grad_() for v in inputs]
        with use_backend(backend):
            y = channel_mix(*leaves)
            (y.sum() if grads == "sum" else (y * dy).sum()).backward()
        return [y.detach(), *(v.grad for v in leaves)]

    got, plain = results("triton", inputs, dy), results("reference", inputs, dy)
    exact = results("reference", [v.double() for v in inputs], dy.double())
    for name, *values in zip(("y", "dx", "dweight", "dbias"), got, plain, exact, strict=False):
        assert_close(name, *values)
    return got


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12, 16, 17, 31, 32, 48, 65, 131, 200])
def test_channels(channels):
    compare((2, channels, 3, 3))


SHAPES = [(7, 6), (1, 1), (3, 4, 1, 1), (1, 2, 1031), (3, 20, 29), (150, 5), (40, 33), (2, 3, 0)]


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, first):
    if first:
        compare(shape)
    else:
        compare(shape, bias=False)


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("channels", [6, 24, 70])
def test_memory_layouts(layout, channels):
    compare((2, channels, 3, 5), layout=layout)
    compare((2, channels, 3, 5), layout=layout, grads="sum")


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 20, 40, 66])
def test_dtypes(dtype, channels):
    compare((2, channels, 9), dtype=dtype)


@pytest.mark.parametrize("channels", [3, 20, 70])
def test_gradients_asked_for(channels):
    x, weight, dy = torch.randn(2, channels, 9), torch.randn(channels, channels), torch.randn(2, channels, 9)
    full = launchers.backward(x, weight, dy, None, None, True, True, True)[:3]
    for need in range(8):
        flags = [bool(need & 1), bool(need & 2), bool(need & 4)]
        grads = launchers.backward(x, weight, dy, None, None, *flags)[:3]
        for asked, got, expected in zip(flags, grads, full, strict=True):
            if asked:
                torch.testing.assert_close(got, expected)
            else:
                assert got.shape == (0,)


def test_several_tiles_for_one_worker(monkeypatch):
    """The weight's gradient from fewer workers than tiles; the same bits twice."""
    monkeypatch.setattr(launchers.tiles, "WORKERS", 1)
    monkeypatch.setattr(launchers.tiles, "PROGRAMS", 2)
    for channels, size in ((16, 64 * 19), (20, 32 * 18)):
        first, second = compare((1, channels, size)), compare((1, channels, size))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch():
    x, weight = torch.zeros(0, 3, 4), torch.eye(3)
    with use_backend("triton"):
        assert channel_mix(x, weight).shape == x.shape
    dx, dweight, dbias, _ = launchers.backward(x, weight, x, None, None, True, True, True)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros(3, 3))
    assert torch.equal(dbias, torch.zeros(3))
