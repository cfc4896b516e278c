"""Periodic convolutions: the convolution they are, every size and kernel, accuracy, and kernels without an inverse."""

from __future__ import annotations

import pytest
import torch

from nfkernels import nn as N

KINDS = [
    (N.PeriodicConv1d, False), (N.PeriodicConv1d, True), (N.PeriodicConv2d, False), (N.PeriodicConv2d, True),
]  # fmt: skip
every_kind = pytest.mark.parametrize(("kind", "depthwise"), KINDS, ids=["1d", "1d-depthwise", "2d", "2d-depthwise"])
F64 = torch.float64


def random(kind, channels, kernel, depthwise=False, spread=0.3, bias=True):
    layer = kind(channels, kernel, depthwise=depthwise, bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p))
    return layer


def rolled(layer, x):
    """The definition, tap by tap."""
    y = 0
    for tap in torch.cartesian_prod(*(torch.arange(k) for k in layer.kernel_size)).reshape(-1, layer.dims).tolist():
        shifts = [(k - 1) // 2 - j for j, k in zip(tap, layer.kernel_size)]
        moved = x.roll(shifts, tuple(range(2, x.dim())))
        weight = layer.weight[(..., *tap)]
        y = y + (weight.reshape(-1, *[1] * layer.dims) * moved if layer.depthwise else
                 torch.einsum("oi,bi...->bo...", weight, moved))  # fmt: skip
    return y if layer.bias is None else y + layer.bias.reshape(-1, *[1] * layer.dims)


def dense(layer, shape):
    """The matrix of the linear map on one sample, column by column."""
    layer = layer.double()
    size = torch.Size(shape).numel()
    with torch.no_grad():
        x = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)]).reshape(-1, *shape)
        return (rolled(layer, x)[1:] - rolled(layer, x)[:1]).reshape(size, size).T


@every_kind
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_it_is_torchs_circular_convolution(kind, depthwise, kernel):
    layer = random(kind, 3, kernel, depthwise)
    torch_kind = torch.nn.Conv1d if kind is N.PeriodicConv1d else torch.nn.Conv2d
    groups = 3 if depthwise else 1
    other = torch_kind(3, 3, kernel, padding="same", padding_mode="circular", groups=groups, dtype=F64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, *[6, 5][-layer.dims :], dtype=F64)
    torch.testing.assert_close(layer(x)[0], other(x))


SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (3, 3), (4, 4), (5, 4), (4, 5), (1, 7)]


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("kernel", [2, 3, (1, 5), (7, 4)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_every_size_kernels_that_wrap_around_too(size, kernel, depthwise):
    layer = random(N.PeriodicConv2d, 2, kernel, depthwise)
    x = torch.randn(3, 2, *size, dtype=F64)
    y, logdet = layer(x)
    torch.testing.assert_close(y, rolled(layer, x))
    matrix = dense(layer, x.shape[1:])
    torch.testing.assert_close(logdet, torch.linalg.slogdet(matrix).logabsdet.expand(3))
    singular = torch.linalg.svdvals(matrix)
    assert layer.condition_number(x.shape) == pytest.approx((singular.max() / singular.min()).item())
    assert layer.condition_number(size) == layer.condition_number(x.shape)
    torch.testing.assert_close(layer.inverse(y)[0], x, atol=1e-13 * layer.condition_number(size), rtol=0)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 13])
def test_sequences_of_every_length(size, kernel, depthwise):
    layer = random(N.PeriodicConv1d, 2, kernel, depthwise)
    x = torch.randn(3, 2, size, dtype=F64)
    y, logdet = layer(x)
    torch.testing.assert_close(y, rolled(layer, x))
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(dense(layer, x.shape[1:])).logabsdet)


def round_trip_error(layer, x):
    layer = layer.float()
    return ((layer.inverse(layer(x)[0])[0] - x).norm() / x.norm()).item()


@every_kind
@pytest.mark.parametrize("sharpness", [0.0, 0.4, 0.49, 0.4999, 0.499999])
def test_float32_round_trip_is_as_good_as_the_condition_number(kind, depthwise, sharpness):
    """A kernel (s, 1, s) along the last axis has eigenvalues from 1 - 2 s, at Nyquist, to 1 + 2 s."""
    layer = random(kind, 6, 3, depthwise, spread=0.0, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.01 * (0.5 - sharpness))
        centre = layer.weight if layer.dims == 1 else layer.weight[..., 1, :]
        centre += torch.tensor([sharpness, 1.0, sharpness]) * (1 if depthwise else torch.eye(6)[..., None])
    x = torch.randn(8, 6, *[16, 32][-layer.dims :])
    condition = layer.condition_number(x.shape)
    assert condition > (1 + 2 * sharpness) / (1 - 2 * sharpness) * 0.9
    assert round_trip_error(layer, x) < 4e-7 * condition


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("size", [65536, 10007])
def test_long_sequences_keep_their_precision(size, depthwise):
    layer = random(N.PeriodicConv1d, 3, 5, depthwise, spread=0.05)
    x = torch.randn(2, 3, size)
    exact = rolled(layer, x.double())
    assert ((layer.float()(x)[0] - exact).norm() / exact.norm()).item() < 4e-7
    assert round_trip_error(layer, x) < 4e-7 * layer.condition_number(x.shape)


@every_kind
def test_it_starts_near_the_identity(kind, depthwise):
    for kernel in (2, 3, 7):
        layer = kind(32, kernel, depthwise=depthwise)
        x = torch.randn(2, 32, *[16, 15][-layer.dims :])
        assert layer.condition_number(x.shape) < 2
        torch.testing.assert_close(layer(x)[0], x, atol=1.0, rtol=0)


def test_one_system_for_each_of_half_of_the_frequencies():
    assert N.PeriodicConv2d(5, 3)._spectrum((6, 8)).shape == (6, 5, 5, 5)
    assert N.PeriodicConv2d(5, 3)._spectrum((6, 9)).shape == (6, 5, 5, 5)
    assert N.PeriodicConv2d(5, 3, depthwise=True)._spectrum((6, 8)).shape == (5, 6, 5)
    assert N.PeriodicConv1d(5, 3)._spectrum((8,)).dtype == torch.complex128


# --- no inverse -------------------------------------------------------------------------------------------------------


def fixed(kind, taps, channels=1, depthwise=False):
    taps = torch.as_tensor(taps, dtype=torch.float32)
    layer = kind(channels, tuple(taps.shape), depthwise=depthwise) if taps.dim() == 2 else kind(
        channels, len(taps), depthwise=depthwise
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(taps if depthwise else torch.einsum("oi,...->oi...", torch.eye(channels), taps))
    return layer


NO_INVERSE = {
    "difference": (N.PeriodicConv1d, [1.0, -1.0], (5,), "PeriodicConv1d has no inverse at frequency 0 of 5"),
    "mean of two": (N.PeriodicConv1d, [0.5, 0.5], (6,), "PeriodicConv1d has no inverse at frequency 3 of 6"),
    # 1 + 2 cos(2 pi / 3), which no floating point number makes zero
    "sum of three": (N.PeriodicConv1d, [1.0, 1.0, 1.0], (9,), "PeriodicConv1d has no inverse at frequency 3 of 9"),
    "zero": (N.PeriodicConv1d, [0.0], (4,), "PeriodicConv1d has no inverse at frequency 0 of 4"),
    "not a number": (N.PeriodicConv1d, [float("nan")], (4,), "PeriodicConv1d has no inverse at frequency 0 of 4"),
    "rows": (
        N.PeriodicConv2d,
        [[1.0], [1.0], [1.0]],
        (3, 4),
        r"the kernel of this PeriodicConv2d has no inverse at frequency \(1, 0\) of 3 x 4",
    ),
    "columns": (N.PeriodicConv2d, [[1.0, 1.0]], (3, 4), r"has no inverse at frequency \(0, 2\) of 3 x 4"),
}


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "taps", "size", "message"), NO_INVERSE.values(), ids=list(NO_INVERSE))
def test_a_frequency_that_is_lost_is_named(kind, taps, size, message, channels, depthwise):
    layer = fixed(kind, taps, channels, depthwise)
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=message):
            function(torch.randn(2, channels, *size))
    assert not layer.condition_number(size) < 1e14


def test_a_size_without_the_lost_frequency_is_fine():
    layer = fixed(N.PeriodicConv1d, [0.5, 0.5])
    x = torch.randn(2, 1, 7)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, atol=1e-5, rtol=0)


def test_channels_that_mix_to_nothing_at_one_frequency():
    layer = N.PeriodicConv1d(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]])[..., None])
    with pytest.raises(ValueError, match="has no inverse at frequency 0 of 5"):
        layer(torch.randn(1, 2, 5))


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("name", ["sum of three", "zero"])
def test_where_no_value_is_looked_at_it_comes_out_infinite_and_nan(name, depthwise):
    kind, taps, size, _ = NO_INVERSE[name]
    layer, x = fixed(kind, taps, 2, depthwise), torch.randn(2, 2, *size)
    torch._dynamo.reset()
    y, logdet = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.isfinite(y).all()
    assert torch.isneginf(logdet).all()
    back, logdet = torch.compile(N.Inverse(layer), fullgraph=True, backend="eager")(x)
    assert torch.isnan(back).all()
    assert torch.isposinf(logdet).all()


MISTAKES = {
    "channels": (lambda: N.PeriodicConv2d(3)(torch.zeros(1, 2, 4, 4)), "PeriodicConv2d was built for 3 channels"),
    "rank 1d": (lambda: N.PeriodicConv1d(3)(torch.zeros(1, 3, 4, 4)), r"PeriodicConv1d takes \[B, C, T\], got"),
    "rank 2d": (lambda: N.PeriodicConv2d(3).inverse(torch.zeros(1, 3, 4)), r"PeriodicConv2d takes \[B, C, H, W\], got"),
    "no positions": (lambda: N.PeriodicConv1d(3)(torch.zeros(1, 3, 0)), r"takes \[B, C, T\], got .*\(1, 3, 0\)"),
    "lengths": (
        lambda: N.PeriodicConv1d(3)(torch.zeros(1, 3, 4), lengths=torch.tensor([3])),
        "PeriodicConv1d reaches across the end of its axis: it takes no lengths",
    ),
    "kernel": (lambda: N.PeriodicConv2d(3, 0), "PeriodicConv2d needs a kernel size of at least 1 for each of 2 axes"),
    "no channels": (lambda: N.PeriodicConv2d(0), "^PeriodicConv2d needs at least 1 channel, got 0$"),
    "no channels 1d": (lambda: N.PeriodicConv1d(0, depthwise=True), "^PeriodicConv1d needs at least 1 channel, got 0$"),
    "fraction": (lambda: N.PeriodicConv2d(4, 3.0), r"PeriodicConv2d needs a whole number for a kernel size, got 3\.0$"),
    "fractions": (lambda: N.PeriodicConv2d(4, (3, 3.0)), r"needs a whole number for a kernel size, got \(3, 3\.0\)$"),
    "kernels": (lambda: N.PeriodicConv2d(3, (1, 2, 3)), r"for each of 2 axes, got \(1, 2, 3\)"),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_is_computed_in_float32(kind, depthwise, dtype):
    layer = random(kind, 3, 3, depthwise).float()
    x = torch.randn(2, 3, *[6, 5][-layer.dims :]).to(dtype)
    for function in (layer, layer.inverse):
        y, logdet = function(x)
        exact, total = function(x.float())
        assert torch.equal(y, exact.to(dtype))
        assert torch.equal(logdet, total)


def test_one_step_of_training_in_both_directions():
    layer = N.PeriodicConv2d(4)
    target = random(N.PeriodicConv2d, 4, 3, spread=0.05).float()
    x = torch.randn(16, 4, 8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x)[0] - target(x)[0].detach()).square().mean() + (layer.inverse(x)[1].mean() / 256).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
