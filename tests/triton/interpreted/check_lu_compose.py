"""The LU composition's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comparison import assert_close, placed, widened

from nfkernels import lu_compose, use_backend
from nfkernels.reference import lu_compose as reference
from nfkernels.triton import lu_compose as launchers

F32, F64 = torch.float32, torch.float64


def factors(count, channels, dtype, *, permuted=True, signed=True):
    """What must not be read is not a number."""
    g = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    strict = torch.ones(channels, channels, dtype=torch.bool).tril(-1)
    lower = torch.where(strict, random(count, channels, channels) / channels**0.5, math.nan)
    upper = torch.where(strict.t().contiguous(), random(count, channels, channels) / channels**0.5, math.nan)
    log_s = 0.3 * random(count, channels)
    sign = random(count, channels).sign() if signed else None
    permutation = torch.rand(count, channels, generator=g).argsort(-1) if permuted else None
    return [t if t is None or t.dtype == torch.int64 else placed(t, "contiguous")
            for t in (lower, upper, log_s, sign, permutation)]  # fmt: skip


def compare(count, channels, *, dtype=F32, softplus=False, need=(True, True), grads=(True, True, True), **options):
    given = factors(count, channels, dtype, signed=not softplus, **options)
    kind = (int(softplus), 0.01)
    plain = reference.forward(*given, *kind, *need)
    exact = reference.forward(*map(widened, given), *kind, *need)
    got = launchers.forward(*given, *kind, *need)
    for name, *values in zip(("weight", "inverse", "logdet"), got, plain, exact, strict=True):
        if values[1] is None:
            assert values[0].shape == (0,)
        else:
            assert_close(name, *(v.contiguous() for v in values))
    inverse = reference.forward(*given, *kind, False, True)[1].contiguous()
    cotangents = (inverse.sin(), inverse.cos(), inverse.sum() / 9)
    cotangents = [t if wanted else None for t, wanted in zip(cotangents, grads, strict=True)]
    args = [*given, inverse if grads[1] else None, *cotangents, *kind]
    results = [f(*a) for f, a in ((launchers.backward, args), (reference.backward, args),
                                  (reference.backward, [widened(a) for a in args]))]  # fmt: skip
    for name, *values in zip(("dlower", "dupper", "dlog_s"), *results, strict=True):
        assert_close(name, *values)


@pytest.mark.covering
@pytest.mark.parametrize("channels", [1, 2, 5, 17, 31])
@pytest.mark.parametrize("first", [True, False])
def test_channels(channels, first):
    if first:
        compare(2, channels)
    else:
        compare(1, channels, softplus=True, permuted=False)


@pytest.mark.parametrize("channels", [33, 130])
def test_many_channels(channels):
    compare(1, channels)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_what_is_asked_for(dtype, softplus):
    for need, grads in itertools.zip_longest(
        itertools.product([False, True], repeat=2), itertools.product([False, True], repeat=3), fillvalue=(True, True)
    ):
        compare(2, 6, dtype=dtype, softplus=softplus, need=need, grads=grads)


def test_no_permutation_and_no_sign():
    for softplus in (False, True):
        compare(3, 9, softplus=softplus, permuted=False)
    lower, upper, log_s, *_ = factors(2, 7, F32)
    got, want = (f.forward(lower, upper, log_s, None, None, 0, 0.0, True, True) for f in (launchers, reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_softplus_of_very_negative_parameters():
    """Without eps every digit of exp(r) counts."""
    log_s = torch.tensor([[-30.0, -45.0, -3.0, 20.0]], dtype=F64)
    args = (torch.zeros(1, 4, 4, dtype=F64), torch.zeros(1, 4, 4, dtype=F64), log_s, None, None, 1, 0.0, True, True)
    for a, b in zip(launchers.forward(*args), reference.forward(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_compose(shape):
    count, channels = shape
    lower = torch.zeros(count, channels, channels)
    with use_backend("triton"):
        made = lu_compose(lower.requires_grad_(), lower.detach(), torch.zeros(shape))
        assert made.weight.shape == made.inverse.shape == lower.shape
        assert made.logdet == 0
        made.weight.sum().backward()
    assert lower.grad.shape == lower.shape
