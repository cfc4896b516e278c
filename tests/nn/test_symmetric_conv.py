"""Symmetric convolution: the cosine transform, the mirrored convolution it is, and kernels without an inverse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nfkernels import nn as N
from nfkernels.nn.symmetric_conv import dct, idct

F64 = torch.float64
SIZES = [(1,), (2,), (5,), (6,), (1, 1), (1, 3), (2, 1), (4, 4), (5, 4), (4, 5), (3, 3)]
LENGTHS = [1, 2, 3, 4, 5, 8, 9, 30, 31]


def all_frequencies(c, n):
    """What the transform keeps as real and imaginary part, one after the other."""
    return torch.cat([c.real, -c.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


@pytest.mark.parametrize("n", LENGTHS)
def test_the_transform_by_its_definition(n):
    x, t = torch.randn(3, 2, n, dtype=F64), torch.arange(n, dtype=F64)
    c = dct(x, 1)
    torch.testing.assert_close(all_frequencies(c, n), x @ torch.cos(math.pi * (t[:, None] + 0.5) * t / n))
    torch.testing.assert_close(-c.imag[..., 1:], all_frequencies(c, n).flip(-1)[..., : n // 2])
    torch.testing.assert_close(idct(c, (n,)), x)


@pytest.mark.parametrize("size", [(n,) for n in LENGTHS] + [size for size in SIZES if len(size) == 2], ids=str)
def test_the_transform_is_scipys(size):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(3, *size, dtype=F64)
    c = dct(x, len(size))
    exact = torch.from_numpy(fft.dctn(x.numpy(), axes=tuple(range(1, x.dim())))) / 2 ** len(size)
    torch.testing.assert_close(all_frequencies(c, size[-1]), exact)
    torch.testing.assert_close(idct(c, size), x)


def random(channels, kernel, dims, spread=0.1):
    layer = N.SymmetricConv(channels, kernel, dims=dims).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p))
    return layer


def mirrored(layer, x):
    """The definition: numpy's mirror, then every tap at its distance."""
    weight, x = layer.weight.detach().double().numpy(), x.double().numpy()
    reach = [n - 1 for n in weight.shape[1:]]
    padded = np.pad(x, [(0, 0), (0, 0), *((r, r) for r in reach)], mode="symmetric")
    y = np.zeros_like(x)
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        window = tuple(slice(r + o, r + o + n) for r, o, n in zip(reach, offset, x.shape[2:]))
        tap = weight[(slice(None), *map(abs, offset))]
        y += tap.reshape(-1, *[1] * layer.dims) * padded[(slice(None), slice(None), *window)]
    return torch.from_numpy(y) + layer.bias.detach().double().reshape(-1, *[1] * layer.dims)


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
@pytest.mark.parametrize(
    "size", [(1,), (2,), (5,), (6,), (1, 1), (1, 3), (2, 1), (4, 4), (5, 4), (4, 5), (3, 3)], ids=str
)
def test_every_size_and_kernels_wider_than_the_image_too(size, kernel):
    layer = random(2, kernel, len(size))
    x = torch.randn(3, 2, *size, dtype=F64)
    y, logdet = layer(x)
    torch.testing.assert_close(y, mirrored(layer, x))
    torch.testing.assert_close(layer.inverse(y)[0], x, atol=1e-13 * layer.condition_number(size), rtol=0)
    units = torch.eye(2 * math.prod(size), dtype=F64).reshape(-1, 2, *size)
    matrix = (mirrored(layer, units) - mirrored(layer, torch.zeros_like(units))).flatten(1).T
    torch.testing.assert_close(logdet, torch.linalg.slogdet(matrix).logabsdet.expand(3))
    singular = torch.linalg.svdvals(matrix)
    assert layer.condition_number(x.shape) == pytest.approx((singular.max() / singular.min()).item())


@pytest.mark.parametrize("kernel", [(1, 5), (3, 1)])
def test_a_kernel_per_axis(kernel):
    layer = random(2, kernel, 2)
    assert layer.weight.shape == (2, *((k + 1) // 2 for k in kernel))
    x = torch.randn(2, 2, 4, 5, dtype=F64)
    torch.testing.assert_close(layer(x)[0], mirrored(layer, x))


def round_trip_error(layer, x):
    layer = layer.float()
    return ((layer.inverse(layer(x)[0])[0] - x).norm() / x.norm()).item()


@pytest.mark.parametrize("sharpness", [0.0, 0.4, 0.49, 0.4999, 0.499999])
@pytest.mark.parametrize("size", [(64,), (1009,), (65536,), (16, 32), (31, 33)], ids=str)
def test_float32_round_trip_is_as_good_as_the_condition_number(size, sharpness):
    layer = N.SymmetricConv(3, 3, dims=len(size))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight.flatten(1)[:, :2] = torch.tensor([1.0, sharpness])
    x = torch.randn(4, 3, *size)
    assert round_trip_error(layer, x) < 4e-7 * layer.condition_number(size)


def test_it_starts_near_the_identity():
    for dims, kernel in itertools.product((1, 2), (1, 3, 7)):
        layer = N.SymmetricConv(32, kernel, dims=dims)
        assert layer.condition_number((16, 15)) < 2


# --- no inverse -------------------------------------------------------------------------------------------------------

# 1 + 2 cos(pi f / n), which is zero at two thirds of the highest frequency
NO_INVERSE = {
    "1d": ((9,), "the kernel of this SymmetricConv has no inverse at frequency 6 of 9"),
    "2d": ((3, 4), r"the kernel of this SymmetricConv has no inverse at frequency \(2, 0\) of 3 x 4"),
}


def sum_of_three(dims):
    layer = N.SymmetricConv(2, 3 if dims == 1 else (3, 1), dims=dims)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


@pytest.mark.parametrize(("size", "message"), NO_INVERSE.values(), ids=list(NO_INVERSE))
def test_a_frequency_that_is_lost_is_named(size, message):
    layer = sum_of_three(len(size))
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=message):
            function(torch.randn(2, 2, *size))
    assert layer.condition_number(size) > 1e14
    with torch.no_grad():
        layer.weight[1] = float("nan")
    with pytest.raises(ValueError, match="has no inverse at frequency"):
        layer(torch.randn(2, 2, *size))
    assert math.isnan(layer.condition_number(size))


@pytest.mark.parametrize("size", [(9,), (3, 4)], ids=str)
def test_where_no_value_is_looked_at_it_comes_out_infinite_and_nan(size):
    layer, x = sum_of_three(len(size)), torch.randn(2, 2, *size)
    torch._dynamo.reset()
    y, logdet = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.isfinite(y).all()
    assert torch.isneginf(logdet).all()
    back, logdet = torch.compile(N.Inverse(layer), fullgraph=True, backend="eager")(x)
    assert torch.isnan(back).all()
    assert torch.isposinf(logdet).all()


MISTAKES = {
    "even": (lambda: N.SymmetricConv(2, 4), "SymmetricConv needs a kernel with a centre, of odd size, got 4"),
    "no channels": (lambda: N.SymmetricConv(0), "^SymmetricConv needs at least 1 channel, got 0$"),
    "dims": (lambda: N.SymmetricConv(2, 3, dims=3), "SymmetricConv has 1 or 2 dims, got 3"),
    "rank": (lambda: N.SymmetricConv(2)(torch.zeros(1, 2, 4)), r"SymmetricConv takes \[B, C, H, W\], got"),
    "lengths": (
        lambda: N.SymmetricConv(2, dims=1).inverse(torch.zeros(1, 2, 4), lengths=torch.tensor([2])),
        "SymmetricConv reaches across the end of its axis: it takes no lengths",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
