"""The kernels' own exp, log, log1p, tanh and atan against float64, in units in the last place."""

import ctypes

import numpy as np
import pytest

_C = pytest.importorskip("nfkernels._C", reason="the compiled module is not built")

FUNCTIONS = {
    "exp": (
        0,
        np.exp,
        lambda: np.concatenate([np.linspace(-104, 88.7, 400_001), np.random.default_rng(0).normal(0, 1e-3, 50_000)]),
        2.0,
    ),
    "log": (
        1,
        np.log,
        lambda: np.concatenate([np.exp(np.linspace(-103, 88, 400_001)), np.linspace(0.5, 2, 200_001)]),
        2.0,
    ),
    "log1p": (
        2,
        np.log1p,
        lambda: np.concatenate([np.linspace(0, 1, 400_001), 10 ** np.linspace(-30, 0, 100_001)]),
        2.0,
    ),
    "tanh": (
        3,
        np.tanh,
        lambda: np.concatenate([np.linspace(-10, 10, 400_001), 10 ** np.linspace(-30, 0, 100_001)]),
        2.0,
    ),
    "atan": (
        4,
        np.arctan,
        lambda: np.concatenate([np.linspace(-50, 50, 400_001), 10 ** np.linspace(-30, 10, 100_001)]),
        3.0,
    ),
}


def apply(which: int, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    _C.elementary(which, x.ctypes.data_as(ctypes.c_void_p).value, y.ctypes.data_as(ctypes.c_void_p).value, len(x))
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name):
    which, exact, points, bound = FUNCTIONS[name]
    x = points().astype(np.float32)
    x = np.minimum(x, np.float32(1)) if name == "log1p" else x
    want = exact(x.astype(np.float64))
    ulp = np.spacing(np.maximum(np.abs(want), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
    error = np.abs(apply(which, x) - want) / ulp
    assert error.max() <= bound, (x[error.argmax()], error.max())


def test_special_values():
    inf, nan = np.inf, np.nan
    x = np.array([nan, inf, -inf, 0.0, 89.0, -200.0], dtype=np.float32)
    np.testing.assert_array_equal(apply(0, x), np.array([nan, inf, 0, 1, inf, 0], dtype=np.float32))
    np.testing.assert_array_equal(apply(1, x)[[0, 1, 2, 3, 5]], np.array([nan, inf, nan, -inf, nan], dtype=np.float32))
    np.testing.assert_array_equal(apply(3, x)[[0, 1, 2, 3]], np.array([nan, 1, -1, 0], dtype=np.float32))
    assert np.isnan(apply(4, x)[0])
