"""The elementary functions of the scale maps: within two units in the last place of float64's, at their edges too."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from nfkernels.triton import scale_map

N = 4096


@triton.jit
def apply(p_x, p_y, FUNCTION: tl.constexpr, N: tl.constexpr):
    b_x = tl.load(p_x + tl.arange(0, N))
    if FUNCTION == 0:
        b_y = scale_map.exp(b_x)
    elif FUNCTION == 1:
        b_y = scale_map.log(b_x)
    elif FUNCTION == 2:
        b_y = scale_map.log1p(b_x)
    elif FUNCTION == 3:
        b_y = scale_map.tanh(b_x)
    else:
        b_y = scale_map.atan(b_x)
    tl.store(p_y + tl.arange(0, N), b_y)


def spread(low, high):
    """Evenly in the logarithm, positive."""
    return torch.exp(torch.linspace(math.log(low), math.log(high), N, dtype=torch.float64))


CASES = {
    "exp": (0, torch.exp, [torch.linspace(-87, 88.7, N).double(), spread(1e-9, 1)]),
    "log": (1, torch.log, [spread(1e-38, 1e38), torch.linspace(0.65, 1.5, N).double()]),
    "log1p": (2, torch.log1p, [spread(1e-30, 1), torch.linspace(0.38, 0.45, N).double()]),
    "tanh": (3, torch.tanh, [-spread(1e-30, 30), torch.linspace(0.5, 0.7, N).double()]),
    "atan": (4, torch.atan, [-spread(1e-30, 1e30), torch.linspace(0.2, 3.0, N).double()]),
}


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype):
    number, exact, domains = CASES[name]
    for x in domains:
        x = x.to(dtype)
        y = torch.full_like(x, math.nan)
        apply[(1,)](x, y, number, N)
        expected = exact(x.double())
        # float64 has nothing wider to be held to: PyTorch's own is off by up to one unit.
        units = 2 if dtype == torch.float32 else 3
        torch.testing.assert_close(y.double(), expected, rtol=units * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_edges(name):
    number, exact, _ = CASES[name]
    points = [0.0, 1.0, math.nan] + ([] if name == "log1p" else [math.inf, -math.inf, 1e-40, 3e38, -3e38, -1.0])
    x = torch.zeros(N)
    x[: len(points)] = torch.tensor(points)
    y = torch.empty(N)
    apply[(1,)](x, y, number, N)
    torch.testing.assert_close(y, exact(x), equal_nan=True, rtol=3e-7, atol=0)
