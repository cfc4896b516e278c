"""The autoregressive inverse's Triton kernel against the reference, on tiny networks."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_close, placed, widened

from nfkernels import Degrees, ScaleMap, autoregressive_inverse, use_backend
from nfkernels.triton import autoregressive_inverse as launchers

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def rising(width, passes, first=1):
    """Degrees of a hidden layer; with ``first=0`` some units see no feature at all."""
    spread = max(passes - first, 1)
    return tuple(sorted(min(first, passes - 1) + i % spread for i in range(width)))


def compare(batch, features, widths, *, dtype=F32, contexts=(), bias=True, layout="contiguous", seed=0, first=1,
            transform="exp", grads=False, **options):  # fmt: skip
    """x and the log-determinant on Triton, on the reference, and on the reference in float64."""
    g = torch.Generator().manual_seed(seed)
    features = tuple(range(features)) if isinstance(features, int) else features
    passes = max(features) + 1
    degrees = Degrees(features, tuple(rising(w, passes, first) for w in widths))
    per = 2 if ScaleMap.parse(transform).has_scale else 1

    def random(*size):
        return torch.randn(size, generator=g, dtype=F64).to(F64 if dtype == F64 else F32)

    weights = []  # what the degrees mask is NaN: reading it would show
    for mask in degrees.masks(per):
        weights.append(torch.where(mask, random(*mask.shape) / max(mask.shape[1], 1) ** 0.5, math.nan))
    biases = [0.3 * random(len(w)) if bias and (i + seed) % 3 else None for i, w in enumerate(weights)]
    context = [0.5 * random(batch, w) if i in contexts else None for i, w in enumerate(widths)]
    z = placed(random(batch, len(features)).to(dtype), layout)
    inputs = [z, *weights, *biases, *context]

    def results(backend, inputs):
        leaves = [t if t is None else t.detach().requires_grad_(grads) for t in inputs]
        n = len(weights)
        with use_backend(backend):
            x, logdet = autoregressive_inverse(
                leaves[0], leaves[1 : n + 1], leaves[n + 1 : 2 * n + 1], degrees, context=leaves[2 * n + 1 :],
                transform=transform, **options,
            )  # fmt: skip
            found = [x.detach(), logdet.detach()]
            if grads:
                kept = [t for t in leaves if t is not None]
                found += torch.autograd.grad(x.sin().sum() + logdet.cos().sum(), kept)
        return found

    got, plain = results("triton", inputs), results("reference", inputs)
    exact = results("reference", [widened(t) for t in inputs])
    # A network's sums are taken in another order: what that changes passes through every later degree.
    for i, found in enumerate(zip(got, plain, exact, strict=True)):
        loose = 0.0
        if found[2].numel():
            loose = 2 * (found[1].double() - found[2]).abs().max() + 60 * torch.finfo(dtype).eps * found[2].abs().max()
        assert_close(f"output {i}", *found, float(loose))


@pytest.mark.covering
@pytest.mark.parametrize("widths", [(5,), (8, 8), (9, 6, 4), (3, 70)], ids=str)
@pytest.mark.parametrize("features", [1, 2, 5, (2, 0, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_networks(features, widths, first):
    """One feature, several of one degree in any order, more units than a tile reads at once."""
    if first:
        compare(7, features, widths, contexts=(0,))
    else:
        compare(3, features, widths, dtype=F64, first=0, seed=1)


@pytest.mark.covering
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "silu", "tanh"])
@pytest.mark.parametrize("first", [True, False])
def test_activations(activation, first):
    if first:
        compare(5, 3, (6, 6), activation=activation)
    else:
        compare(5, 3, (6, 6), activation=activation, final_activation=False, dtype=F64)


def test_residual_layers():
    widths = (6, 6, 6, 6, 6)
    compare(5, 3, widths, residual=(-1, -1, 0, -1, 2), final_activation=False)
    compare(5, 3, widths, residual=(-1, -1, 0, -1, 2), contexts=(0, 1, 3), dtype=F64)
    compare(5, 3, (6,) * 8, residual=(-1, 0, 1, 2, 3, 4, 5, 6))


@pytest.mark.covering
@pytest.mark.parametrize(
    "transform", ["additive", "glow", "nflows", ScaleMap("softplus", clamp=1.5), ScaleMap.freia_all_in_one()], ids=str
)
@pytest.mark.parametrize("inverse", [False, True])
def test_transforms(transform, inverse):
    for order, layout in (("scale_first", "shift_scale"), ("shift_first", "scale_shift")):
        compare(5, 3, (6,), transform=transform, order=order, layout=layout, inverse=inverse)


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_dtypes_and_memory_layouts(layout, dtype):
    compare(5, 4, (6, 5), layout=layout, dtype=dtype, contexts=(1,), bias=False)


@pytest.mark.parametrize("batch", [1, 16, 17, 50])
def test_batches(batch):
    compare(batch, 3, (6, 5), contexts=(0, 1))


def test_many_samples_take_larger_tiles(monkeypatch):
    monkeypatch.setattr(launchers, "MANY_FROM", 70)
    compare(70, 3, (7, 5))
    compare(70, 3, (7, 5), dtype=F64)


def test_empty():
    compare(0, 3, (4,))
    compare(2, 3, (0,))


def test_gradients():
    compare(4, 3, (6, 5), contexts=(0,), grads=True)


def test_where_the_barrier_orders_no_stores_the_reference_serves(monkeypatch):
    monkeypatch.setattr(launchers, "barrier_orders_stores", lambda device: False)
    monkeypatch.setattr(launchers, "inverse_kernel", None)
    compare(5, 3, (6, 5), layout="channels_last")
