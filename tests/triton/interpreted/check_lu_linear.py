"""The LU linear map's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, placed

from nfkernels import lu_linear, use_backend
from nfkernels.triton import lu_linear as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def factors(width, g, dtype):
    strict = torch.ones(width, width, dtype=torch.bool).tril(-1)

    def triangle(mask):
        return (
            torch.where(mask, torch.randn(width, width, generator=g) * 0.5 / width**0.5, float("nan"))
            .to(dtype)
            .contiguous()
        )

    vectors = [(0.3 * torch.randn(width, generator=g)).to(dtype) for _ in range(2)]
    sign = torch.randint(0, 2, (width,), generator=g).to(dtype) * 2 - 1
    return [triangle(strict), triangle(strict.t()), *vectors], sign, torch.randperm(width, generator=g)


def compare(shape, *, inverse=False, dtype=F32, layout="contiguous", permuted=True, diagonal="exp", grads="random"):
    g = torch.Generator().manual_seed(0)
    values, sign, permutation = factors(shape[1], g, F64 if dtype == F64 else F32)
    x = placed(torch.randn(shape, generator=g, dtype=F64).to(dtype), layout)
    dy = torch.randn(shape, generator=g, dtype=F64).to(dtype)

    def results(backend, inputs, dy):
        leaves = [v.detach().requires_grad_() for v in inputs]
        options = {"permutation": permutation} if permuted else {}
        if permuted and diagonal == "exp":
            options["sign"] = sign.to(leaves[1].dtype)
        with use_backend(backend):
            y = lu_linear(*leaves, **options, diagonal=diagonal, inverse=inverse)
            (y.sum() if grads == "sum" else (y * dy).sum()).backward()
        return [y.detach(), *(v.grad for v in leaves)]

    inputs = [x, *values]
    got, plain = results("triton", inputs, dy), results("reference", inputs, dy)
    exact = results("reference", [v.double() for v in inputs], dy.double())
    for name, *found in zip(("y", "dx", "dlower", "dupper", "dlog_s", "dbias"), got, plain, exact, strict=True):
        assert_close(name, *found)


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("first", [True, False])
def test_widths(width, inverse, first):
    if first:
        compare((2, width, 3, 3), inverse=inverse)
    else:
        compare((19, width), inverse=inverse, permuted=False)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_widest(inverse):
    compare((5, 128), inverse=inverse)


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (1, 1), (3, 4, 1, 1), (1, 2, 1031), (300, 5), (2, 3, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, inverse, first):
    if first:
        compare(shape, inverse=inverse)
    else:
        compare(shape, inverse=inverse, permuted=False, diagonal="softplus", grads="sum")


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("first", [True, False])
def test_memory_layouts(layout, inverse, first):
    if first:
        compare((2, 6, 3, 5), layout=layout, inverse=inverse)
    else:
        compare((2, 20, 3, 5), layout=layout, inverse=inverse, grads="sum")


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
def test_dtypes(dtype, inverse):
    for width in (3, 20):
        compare((2, width, 9), dtype=dtype, inverse=inverse)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_asked_for(inverse):
    (lower, upper, log_s, _), sign, permutation = factors(5, torch.Generator().manual_seed(0), F32)
    args = (torch.randn(2, 5, 9), torch.randn(2, 5, 9), lower, upper, log_s, sign, permutation, 0, 0.0, inverse)
    full = launchers.backward(*args, True, True, True)
    for need in range(8):
        flags = [bool(need & 1), bool(need & 2), bool(need & 4)]
        grads = launchers.backward(*args, *flags)
        for asked, got, expected in zip([flags[0], *[flags[1]] * 3, flags[2]], grads, full, strict=True):
            if asked:
                torch.testing.assert_close(got, expected)
            else:
                assert got.shape == (0,)
