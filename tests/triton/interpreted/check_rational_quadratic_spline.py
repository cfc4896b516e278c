"""The rational-quadratic spline's Triton kernels against the reference, every option, on tiny shapes."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_close, placed, widened

from nfkernels import Spline, rational_quadratic_spline, use_backend
from nfkernels.ops.rational_quadratic_spline import form_of
from nfkernels.triton import rational_quadratic_spline as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, *, spline="linear", count=None, dtype=F32, params_dtype=None,
            layouts=("contiguous", "contiguous"), running=False, grads="both", seed=0, **options):  # fmt: skip
    """Forward and backward of one case on Triton, on the reference, and on the reference in float64."""
    g = torch.Generator().manual_seed(seed)
    spline = Spline.parse(spline)
    count = shape[1] if count is None else count
    compute = F64 if dtype == F64 else F32

    def random(*size, dtype=dtype):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    middle, half = (spline.high + spline.low) / 2, (spline.high - spline.low) / 2
    x = placed((middle + 0.7 * half * torch.randn(shape, generator=g, dtype=F64)).to(dtype), layouts[0])
    params = random(shape[0], count * spline.params_per_element, *shape[2:], dtype=params_dtype or dtype)
    inputs = {"x": x, "params": placed(params, layouts[1])}
    if running:
        inputs["logdet"] = random(shape[0], dtype=compute)
    dy = random(*shape)
    dlogdet = random(*(shape if options.get("elementwise") else shape[:1]), dtype=compute)

    def results(backend, inputs, dy, dlogdet):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        with use_backend(backend):
            y, logdet = rational_quadratic_spline(**leaves, spline=spline, **options)
            loss = {
                "both": lambda: (y * dy).sum() + (logdet * dlogdet).sum(),
                "sum": lambda: y.sum() + logdet.sum(),
                "y": lambda: (y * dy).sum(),
                "logdet": lambda: (logdet * dlogdet).sum(),
            }[grads]()
            loss.backward()
        return {"y": y.detach(), "logdet": logdet.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}

    got = results("triton", inputs, dy, dlogdet)
    plain = results("reference", inputs, dy, dlogdet)
    wide = {k: widened(v) for k, v in inputs.items()}, dy.double(), dlogdet.double()
    exact = results("reference", *wide)
    # What rounding the inputs alone would change: a steep spline's error is its condition, and few elements draw it.
    eps = torch.finfo(compute).eps
    scale = {"x": max(map(abs, (spline.low, spline.high))), "params": 1.0, "logdet": 1.0}
    moved = dict.fromkeys(got, 0.0)
    for _ in range(4):
        near = {k: v + eps * scale[k] * torch.randn(v.shape, generator=g, dtype=F64) for k, v in wide[0].items()}
        for name, value in results("reference", near, *wide[1:]).items():
            moved[name] = max(moved[name], float((value - exact[name]).abs().max())) if value.numel() else 0.0
    for name in got:
        assert_close(name, got[name], plain[name], exact[name], 4 * moved[name])
    return got


SPLINES = {
    "linear": Spline(),
    "nflows": Spline.nflows(10, 2.5, prescale=0.125),
    "zuko": Spline.zuko(5),
    "zuko_circular": Spline.zuko_circular(4),
    "circular": Spline.circular(3),
    "unit": Spline.unit(6),
    "two bins": Spline(2),
    "many bins": Spline(33),
    "straight tails": Spline(4, "none", -1.0, 2.0, 0.5, 7.0),
    "ends of slope one": Spline(4, "none", -1.0, 2.0, 0.5, 7.0, derivatives="inner"),
    "half a turn": Spline(3, "circular", 0.0, 1.0, half_turn=True, min_width=0.1, min_height=0.2, min_derivative=0.1),
    "softclip, all slopes": Spline(3, "none", sizes="softclip", slope=0.05, prescale=2.0),
    "identity beside free slopes": Spline(3, derivatives="all"),
}


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", SPLINES)
@pytest.mark.parametrize("first", [True, False])
def test_splines(name, inverse, first):
    if first:
        compare((13, 3), spline=SPLINES[name], inverse=inverse)
    else:
        compare((5, 2), spline=SPLINES[name], inverse=inverse, dtype=F64, elementwise=True)


def test_the_most_bins():
    compare((3, 2), spline=Spline(64))


DTYPES = [(F64, F64), (F64, BF16), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes):
    for shape, inverse in (((5, 6), False), ((2, 3, 4, 30), True)):
        compare(shape, spline=Spline(3), dtype=dtypes[0], params_dtype=dtypes[1], running=True, inverse=inverse)


@pytest.mark.covering
@pytest.mark.parametrize("first", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("one", [True, False])
def test_memory_layouts(first, second, one):
    if one:
        compare((2, 3, 2, 5), spline=Spline(3), layouts=(first, second), elementwise=True)
    else:
        compare((2, 6, 7, 13), spline=Spline(2), layouts=(first, second), inverse=True)


SHAPES = [(1, 1), (37, 2), (2, 1, 1, 1), (3, 7, 1), (2, 2, 301), (2, 601), (1, 1, 4, 0), (2, 5, 9)]


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, first):
    """One channel, one position, odd and prime, several samples to a program and one sample to several tiles."""
    if first:
        compare(shape, spline=Spline(3), running=True)
    else:
        compare(shape, spline=Spline(2, "circular"), elementwise=True, grads="sum")


def test_log_determinant_in_two_stages():
    got, again = (compare((1, 3, 5, 170), spline=Spline(2), running=True) for _ in range(2))
    assert all(torch.equal(got[k], again[k]) for k in got)
    compare((1, 2100), spline=Spline(2), elementwise=True)


def test_empty_batch():
    x, params = torch.zeros(0, 4, 3), torch.zeros(0, 4 * Spline().params_per_element, 3)
    for elementwise in (False, True):
        with use_backend("triton"):
            y, logdet = rational_quadratic_spline(x, params, elementwise=elementwise)
        assert (y.shape, logdet.shape, logdet.dtype) == (x.shape, x.shape if elementwise else (0,), F32)
    dx, dparams = launchers.backward(x, params, None, None, None, None, *form_of("linear", False, False), True, True)
    assert (dx.shape, dparams.shape) == (x.shape, params.shape)


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["checkerboard", "lengths", "channels", "all"])
@pytest.mark.parametrize("first", [True, False])
def test_masks(kind, first):
    shape = (3, 4, 3, 6)
    mask = {
        "checkerboard": ((torch.arange(3)[:, None] + torch.arange(6)) % 2 == 0)[None, None],
        "lengths": (torch.arange(6) < torch.tensor([6, 2, 0])[:, None])[:, None, None, :],
        "channels": torch.tensor([True, False, False, True])[None, :, None, None],
        "all": torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5,
    }[kind]
    if first:
        compare(shape, spline=Spline(3), mask=mask, layouts=("channels_last", "contiguous"))
    else:
        compare(shape, spline=Spline.unit(3), mask=mask, inverse=True, elementwise=True)


def test_what_is_masked_is_not_read():
    """Params that are NaN, where nothing is transformed, leave no trace; nor does data far outside."""
    mask = torch.tensor([True, False, True])[None]
    spline = Spline(3)
    x, params = torch.randn(4, 3), torch.randn(4, 3, spline.params_per_element)
    params[:, 1], x[:, 1] = math.nan, 1e30
    params = params.flatten(1).requires_grad_()
    with use_backend("triton"):
        y, logdet = rational_quadratic_spline(x, params, spline=spline, mask=mask)
        (y.sum() + logdet.sum()).backward()
    assert torch.equal(y[:, 1], x[:, 1])
    assert logdet.isfinite().all()
    assert params.grad.isfinite().all()
    assert not params.grad.unflatten(1, (3, -1))[:, 1].any()


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3), (2, 6, 150)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_channel_map(shape, first):
    channel_map = torch.tensor([2, -1, 0, -1, 3, 1])
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    if first:
        compare(shape, spline=Spline(2), count=4, channel_map=channel_map)
    else:
        compare(shape, spline=Spline(2), count=4, channel_map=channel_map, mask=mask, inverse=True)


@pytest.mark.covering
@pytest.mark.parametrize("grads", ["sum", "logdet", "y"])
@pytest.mark.parametrize("elementwise", [False, True])
def test_gradients_given(grads, elementwise):
    """``sum()`` sends a gradient of stride 0; either output may have none at all."""
    for inverse in (False, True):
        compare((5, 4), spline=Spline(3), grads=grads, elementwise=elementwise, inverse=inverse)
    compare((2, 2, 300), spline=Spline(2), grads=grads, elementwise=elementwise)


def test_gradients_asked_for():
    spline = Spline(3)
    x, params = torch.randn(3, 4), torch.randn(3, 4 * spline.params_per_element)
    given = (x, params, torch.randn(3, 4), torch.randn(3), None, None, *form_of(spline, False, False))
    full = launchers.backward(*given, True, True)
    for flags in ((True, False), (False, True), (False, False)):
        for asked, got, expected in zip(flags, launchers.backward(*given, *flags), full, strict=True):
            assert torch.equal(got, expected if asked else torch.empty(0))


EXTREMES = [Spline(3), Spline.zuko(3), Spline.zuko_circular(3), Spline.unit(3, -3.0, 3.0), Spline.circular(3)]


@pytest.mark.covering
@pytest.mark.parametrize("spline", EXTREMES, ids=lambda s: f"{s.tails}-{s.sizes}-{s.half_turn}")
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_extremes(spline, inverse):
    """Bins of the least size, the steepest and the flattest slopes, x on and beside knots and ends and far outside."""
    g = torch.Generator().manual_seed(0)
    per = spline.params_per_element
    raw = torch.cat([torch.zeros(1, per), 30 * torch.randn(11, per, generator=g), 1e6 * torch.eye(per)[:4]])
    ends = torch.tensor([spline.low, spline.high])
    at = torch.cat([ends, torch.zeros(1), torch.tensor([-1e30, 1e30, -1e-30]), spline.low + 2 * torch.arange(4.0)])
    at = torch.cat([at, at.nextafter(at + 1), at.nextafter(at - 1)])
    x = at.expand(len(raw), -1).contiguous().requires_grad_()
    params = raw[:, None].expand(-1, len(at), -1).flatten(1).contiguous().requires_grad_()
    with use_backend("triton"):
        y, each = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)
        (y.sum() + each.sum()).backward()
    for name, values in (("y", y), ("log", each), ("dx", x.grad), ("dparams", params.grad)):
        assert values.isfinite().all(), name
    with use_backend("triton"):
        nan, _ = rational_quadratic_spline(x * math.nan, params, spline=spline, inverse=inverse)
    assert nan.isnan().all()


@pytest.mark.parametrize("name", ["linear", "zuko", "circular", "unit"])
def test_round_trip(name):
    spline = SPLINES[name]
    g = torch.Generator().manual_seed(0)
    x = spline.low + (spline.high - spline.low) * (1.4 * torch.rand(300, 1, generator=g) - 0.2)
    params = torch.randn(300, spline.params_per_element, generator=g)
    with use_backend("triton"):
        y, logdet = rational_quadratic_spline(x, params, spline=spline)
        back, total = rational_quadratic_spline(y, params, spline=spline, inverse=True, logdet=logdet)
    error = (back - x).abs() / (1 + (-logdet[:, None]).exp())
    assert error.max() < 16 * torch.finfo(F32).eps * max(abs(spline.low), abs(spline.high), 1)
    assert total.abs().max() < 1e-3
