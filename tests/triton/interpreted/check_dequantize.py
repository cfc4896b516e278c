"""The dequantisation's and the generator's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, placed

from nfkernels import dequantize, use_backend
from nfkernels.ops import advance_, philox_uniform, random_key
from nfkernels.triton import dequantize as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEY = advance_(random_key(-7), 2**40 + 3)


def levels_like(shape, levels, dtype, layout):
    g = torch.Generator().manual_seed(0)
    values = torch.randint(0, levels, shape, generator=g)
    values.view(-1)[:1] = levels - 1
    if dtype == torch.uint8:
        if layout == "channels_last":
            order = (0, *range(2, len(shape)), 1)
            return values.byte().permute(order).contiguous().permute(0, len(shape) - 1, *range(1, len(shape) - 1))
        if layout == "sliced":
            wide = torch.full((shape[0], shape[1] + 3, *shape[2:]), 255, dtype=torch.uint8)
            return wide[:, 1 : 1 + shape[1]].copy_(values)
        return values.byte()
    return placed(values.to(dtype), layout)


def compare(shape, *, dtype=torch.uint8, out=None, alpha=None, levels=256, layout="contiguous", running=False):
    x = levels_like(shape, levels, dtype, layout)
    out = out or (F32 if dtype == torch.uint8 else dtype)
    compute = F64 if out == F64 else F32
    logdet = torch.linspace(-1, 1, shape[0], dtype=compute) if running else None

    def results(backend, wide=False):
        leaf = x if dtype == torch.uint8 else (x.double() if wide else x).detach().requires_grad_()
        given = None if logdet is None else logdet.double() if wide else logdet
        with use_backend(backend):
            y, total = dequantize(leaf, KEY, levels=levels, alpha=alpha, logdet=given, dtype=F64 if wide else out)
            if dtype == torch.uint8:
                return [y, total]
            weights = torch.linspace(-1, 1, y.numel(), dtype=F64).reshape(shape).to(y.dtype)
            loss = (y * weights).sum() + (total * total.detach().cos()).sum()
            return [y.detach(), total.detach(), *torch.autograd.grad(loss, leaf)]

    got, plain, exact = results("triton"), results("reference"), results("reference", wide=True)
    for name, *values in zip(("y", "logdet", "dx"), got, plain, exact, strict=False):
        assert_close(name, *values)
    if alpha is None:
        assert torch.equal(got[0], plain[0])
        if out in (F32, F64) and levels <= 256:
            assert torch.equal((got[0] * levels).floor(), x.to(out))
    return got


SHAPES = [(7, 6), (5, 63), (1, 1), (3, 4, 1, 1), (2, 3, 5, 5), (1, 2, 1031), (2, 3, 40, 28), (3, 70, 4), (1, 1, 9000)]


@pytest.mark.covering
@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, alpha, first):
    if first:
        compare(shape, alpha=alpha)
    else:
        compare(shape, alpha=alpha, dtype=F32, running=True)


@pytest.mark.covering
@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 5, 7), (2, 5, 30, 32), (1, 600, 2, 2)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_memory_layouts(shape, layout, alpha, first):
    if first:
        compare(shape, alpha=alpha, layout=layout, running=True)
    else:
        compare(shape, alpha=alpha, layout=layout, dtype=F32)


@pytest.mark.covering
@pytest.mark.parametrize("alpha", [None, 1e-6, 0.3])
@pytest.mark.parametrize("out", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_dtypes(out, alpha, first):
    if first:
        compare((2, 3, 8), out=out, alpha=alpha)
    else:
        compare((2, 3, 8), dtype=out, alpha=alpha, levels=17)


@pytest.mark.parametrize("levels", [2, 5, 17, 49, 255])
def test_levels(levels):
    compare((4, 500), levels=levels)
    compare((4, 500), levels=levels, out=F64)


def test_a_sample_of_several_programs(monkeypatch):
    monkeypatch.setattr(launchers.tiles, "PROGRAMS", 4)
    first, second = (compare((2, 1, 20000), alpha=0.05, running=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_that_are_missing():
    y, ones = torch.randn(3, 4, 5), torch.ones(3)
    for alpha in (-1.0, 0.05):
        both = launchers.backward(y, torch.ones_like(y), ones, 256.0, alpha)
        torch.testing.assert_close(
            launchers.backward(y, torch.ones_like(y), None, 256.0, alpha)
            + launchers.backward(y, None, ones.expand(3), 256.0, alpha),
            both,
        )
    assert launchers.backward(y[:0], y[:0], None, 256.0, 0.1).shape == (0, 4, 5)


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 1100), (2, 3, 4, 6), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_generator_has_the_same_bits(shape, dtype):
    like = torch.empty(shape, dtype=dtype)
    for given in (like, like.transpose(0, 1).contiguous().transpose(0, 1)):
        with use_backend("triton"):
            got = philox_uniform(given, KEY)
        with use_backend("reference"):
            want = philox_uniform(given, KEY)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_keys_of_any_bits():
    for seed, offset in ((0, 0), (-1, -1), (2**63 - 1, -(2**63)), (1, 2**32), (2**32, 1)):
        key = torch.tensor([seed, offset])
        with use_backend("triton"):
            got = philox_uniform(torch.empty(9), key)
        with use_backend("reference"):
            assert torch.equal(got, philox_uniform(torch.empty(9), key))
