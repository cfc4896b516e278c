"""The affine coupling's Triton kernels against the reference, every option, on tiny shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import assert_close, placed, widened

from nfkernels import ScaleMap, affine_coupling, use_backend
from nfkernels.ops._layout import readable
from nfkernels.ops.affine_coupling import _make_form as make_form
from nfkernels.reference import affine_coupling as reference
from nfkernels.triton import affine_coupling as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, *, count=None, dtype=F32, params_dtype=None, layouts=("contiguous", "contiguous"), mask=None,
            gain=False, running=False, grads="both", seed=0, **options):  # fmt: skip
    """Forward and backward of one case on Triton, on the reference, and on the reference in float64."""
    g = torch.Generator().manual_seed(seed)
    count = shape[1] if count is None else count
    scale_map = options.setdefault("scale_map", "glow")
    halves = 2 if ScaleMap.parse(scale_map).has_scale else 1
    compute = F64 if dtype == F64 else F32

    def random(*size, dtype=dtype):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    x = placed(random(*shape), layouts[0])
    params = placed(random(shape[0], halves * count, *shape[2:], dtype=params_dtype or dtype), layouts[1])
    inputs = {"x": x, "params": params}
    if gain:
        inputs["gain"] = 0.5 + torch.rand(count, generator=g, dtype=F64).to(compute)
    if running:
        inputs["logdet"] = random(shape[0], dtype=compute)
    dy, dlogdet = random(*shape), random(shape[0], dtype=compute)
    if mask is not None:
        options["mask"] = mask

    def results(backend, inputs, dy, dlogdet):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        with use_backend(backend):
            y, logdet = affine_coupling(**leaves, **options)
            if grads == "sum":
                loss = y.sum() + logdet.sum()
            elif grads == "logdet":
                loss = (logdet * dlogdet).sum()
            elif grads == "y":
                loss = (y * dy).sum()
            else:
                loss = (y * dy).sum() + (logdet * dlogdet).sum()
            loss.backward()
        return {"y": y.detach(), "logdet": logdet.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}

    got = results("triton", inputs, dy, dlogdet)
    plain = results("reference", inputs, dy, dlogdet)
    exact = results("reference", {k: widened(v) for k, v in inputs.items()}, dy.double(), dlogdet.double())
    for name in got:
        assert_close(name, got[name], plain[name], exact[name])
    compare_rebuilt(got["y"], inputs, dy, dlogdet, options)
    return got


def compare_rebuilt(y, inputs, dy, dlogdet, options):
    """The input that a backward rebuilds, and that asking for it changes no gradient."""
    options = dict(options)
    channel_map, mask = options.pop("channel_map", None), options.pop("mask", None)
    defaults = {"layout": "shift_scale", "order": "scale_first", "identity": "none", "inverse": False}
    form, packed = make_form(**defaults | options)
    params, gain = inputs["params"], inputs.get("gain")
    if mask is not None:
        mask = readable(mask.expand(-1, -1, *y.shape[2:]))
    arguments = (y, params, dy, dlogdet, channel_map, mask, gain, *packed)
    *grads, x = launchers.backward(*arguments, True)
    for a, b in zip(grads, launchers.backward(*arguments, False), strict=False):
        assert torch.equal(a, b)
    plain = torch.empty_like(y).copy_(reference.rebuild(y, params, channel_map, mask, gain, form))
    exact = reference.rebuild(widened(y), widened(params), channel_map, mask, widened(gain), form)
    assert_close("rebuilt x", x, plain, exact)


MAPS = {
    "additive": ScaleMap.additive(),
    "exp": ScaleMap.exp(),
    "exp clamped": ScaleMap("exp", clamp=0.8, prescale=0.7, offset=0.1, gain=0.9),
    "glow": ScaleMap.glow(),
    "sigmoid gain": ScaleMap("sigmoid", gain=1.7, reciprocal=True),
    "nflows": ScaleMap.nflows(),
    "nflows softplus": ScaleMap.nflows_softplus(),
    "softplus": ScaleMap("softplus", gain=1.3),
    "softplus clamped": ScaleMap("softplus", clamp=1.1, reciprocal=True),
    "freia": ScaleMap.freia(),
    "atan": ScaleMap("atan", clamp=1.5, prescale=3.0, reciprocal=True),
    "realnvp": ScaleMap.realnvp(2.0),
    "tanh": ScaleMap("tanh", clamp=0.5, offset=-0.2, gain=2.0),
    "zuko": ScaleMap.zuko(),
    "softclip": ScaleMap("softclip", clamp=2.0, gain=-0.7),
    "scaled shift": ScaleMap.freia_all_in_one(1.5),
    "scaled shift alone": ScaleMap("additive", prescale=-0.3, scaled_shift=True),
}


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", MAPS)
def test_scale_maps(name, inverse):
    m = MAPS[name]
    compare((9, 5), scale_map=m, inverse=inverse)
    if m.has_scale:
        compare((9, 5), scale_map=m, inverse=inverse, gain=True)
        compare((3, 4), dtype=F64, scale_map=m, inverse=inverse, gain=inverse)


@pytest.mark.parametrize("kind", ["sigmoid", "tanh", "atan", "softplus", "softclip"])
def test_extreme_raw_values(kind):
    """Log-scales far out on both sides, digit for digit, and NaN as NaN."""
    m = ScaleMap(kind, clamp=2.0 if kind in ("tanh", "atan", "softclip") else float("inf"))
    r = torch.tensor([-80.0, -30.0, -15.1, -14.9, -1.0, -1e-4, -1e-30, 0.0, 1e-30, 1e-4, 0.42, 2.5, 16.0, 80.0])
    params = torch.stack([torch.zeros_like(r), r], 1)
    x = torch.ones(len(r), 1)
    with use_backend("triton"):
        y, logdet = affine_coupling(x, params, scale_map=m)
        nan, _ = affine_coupling(x, params * float("nan"), scale_map=m)
    exact_y, exact = affine_coupling(x.double(), params.double(), scale_map=m)
    near_1 = 1.2e-7 if kind == "softplus" else 0  # where its logarithm is small, s itself has no more digits
    torch.testing.assert_close(logdet.double(), exact, rtol=6e-7, atol=near_1)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-6, atol=0)
    assert nan.isnan().all()


LAYOUTS = ("shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved")


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
@pytest.mark.parametrize("identity", ["none", "first", "second"])
def test_forms(layout, order, identity):
    for inverse in (False, True):
        count = 5 if identity == "none" else 2
        compare((3, 5, 7), count=count, layout=layout, order=order, identity=identity, inverse=inverse, gain=inverse)


DTYPES = [(F64, F64), (F64, BF16), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]


@pytest.mark.covering
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 11, 17)], ids=str)
def test_dtypes(dtypes, shape):
    compare(shape, count=3, identity="first", dtype=dtypes[0], params_dtype=dtypes[1], running=True, gain=True)


MEMORY = list(itertools.product(("contiguous", "channels_last", "sliced"), repeat=2))


@pytest.mark.covering
@pytest.mark.parametrize("layouts", MEMORY, ids="-".join)
@pytest.mark.parametrize("shape", [(3, 6, 2, 5), (2, 12, 7, 9)], ids=["rows", "images"])
@pytest.mark.parametrize("first", [True, False])
def test_memory_layouts(layouts, shape, first):
    if first:
        compare(shape, count=shape[1] // 2, identity="second", layouts=layouts)
    else:
        compare(shape, layouts=layouts, scale_map="exp", layout="scale_shift_interleaved", params_dtype=BF16)


SHAPES = [(1, 1), (3, 1), (37, 2), (2, 1, 1, 1), (3, 7, 1), (2, 13, 13), (2, 3, 601), (2, 1031), (1, 1, 4, 0)]


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, first):
    """One channel, one position, odd and prime, several samples to a program and one sample to several tiles."""
    if first:
        compare(shape, gain=True, running=True)
    else:
        compare(shape, count=shape[1] // 2, identity="first", scale_map="realnvp")


def test_log_determinant_in_two_stages():
    for options in ({}, {"running": True, "gain": True}):
        got = compare((1, 3, 5, 800), count=2, identity="first", **options)
        again = compare((1, 3, 5, 800), count=2, identity="first", **options)
        assert all(torch.equal(got[k], again[k]) for k in got)


def test_empty_batch():
    x, params = torch.zeros(0, 4, 3), torch.zeros(0, 8, 3)
    with use_backend("triton"):
        y, logdet = affine_coupling(x, params)
    assert (y.shape, logdet.shape, logdet.dtype) == (x.shape, (0,), F32)
    form = (2, 1.0, 2.0, 1.0, float("inf"), 0.0)
    dx, dparams, dgain, _ = launchers.backward(x, params, None, None, None, None, torch.ones(4), *form, False)
    assert (dx.shape, dparams.shape) == (x.shape, params.shape)
    assert torch.equal(dgain, torch.zeros(4))


def checkerboard(h, w):
    return ((torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0)[None, None]


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", ["checkerboard", "lengths", "channels", "all"])
def test_masks(kind, inverse):
    shape = (3, 4, 5, 6)
    g = torch.Generator().manual_seed(1)
    mask = {
        "checkerboard": checkerboard(5, 6),
        "lengths": (torch.arange(6) < torch.tensor([6, 2, 0])[:, None])[:, None, None, :],
        "channels": torch.tensor([True, False, False, True])[None, :, None, None],
        "all": torch.rand(shape, generator=g) < 0.5,
    }[kind]
    compare(shape, mask=mask, inverse=inverse, gain=True)
    compare(shape, mask=mask, inverse=inverse, count=3, identity="first", layouts=("channels_last", "contiguous"))
    compare(shape, mask=mask, scale_map="additive", inverse=inverse)
    compare((2, 4, 5, 60), mask=checkerboard(5, 60), inverse=inverse, order="shift_first")


def test_masked_raw_values_are_not_read():
    """A raw value that overflows, where nothing is transformed, leaves no trace."""
    mask = checkerboard(2, 4)
    x, params = torch.randn(2, 1, 2, 4), torch.randn(2, 2, 2, 4)
    params = torch.where(mask, params, torch.inf).requires_grad_()
    with use_backend("triton"):
        y, logdet = affine_coupling(x, params, mask=mask, scale_map="exp")
        (y.sum() + logdet.sum()).backward()
    assert all(v.isfinite().all() for v in (y, logdet, params.grad))


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3), (2, 6, 150)], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_channel_map(shape, inverse):
    channel_map = torch.tensor([2, -1, 0, -1, 3, 1])
    compare(shape, count=4, channel_map=channel_map, inverse=inverse, gain=True)
    compare(shape, count=4, channel_map=channel_map, layout="shift_scale_interleaved", order="shift_first")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    compare(shape, count=4, channel_map=channel_map, mask=mask, inverse=inverse, scale_map="additive")
    compare(shape, count=4, channel_map=channel_map, mask=mask, inverse=inverse, scale_map="exp", gain=True)


@pytest.mark.covering
@pytest.mark.parametrize("grads", ["sum", "logdet", "y"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 200)], ids=str)
def test_gradients_given(grads, shape):
    """``sum()`` sends a gradient of stride 0; either output may have none at all."""
    compare(shape, grads=grads)
    compare(shape, grads=grads, count=2, identity="second", order="shift_first", gain=True)
    compare(shape, grads=grads, scale_map="additive")


def test_missing_gradients_as_the_raw_op_sees_them():
    y, params = torch.randn(3, 4, 5), torch.randn(3, 8, 5)
    form = (2, 1.0, 2.0, 1.0, float("inf"), 0.0)
    dx, dparams, dgain, _ = launchers.backward(y, params, None, torch.ones(1).expand(3), None, None, None, *form, False)
    assert not dx.any()
    assert not dparams[:, :4].any()
    assert dparams[:, 4:].isfinite().all()
    assert dgain.numel() == 0


@pytest.mark.parametrize("m", [ScaleMap.glow(), ScaleMap.exp(), ScaleMap.freia_all_in_one()], ids=lambda m: m.kind)
def test_round_trip(m):
    x, params = torch.randn(3, 5, 130), torch.randn(3, 4, 130)
    with use_backend("triton"):
        y, logdet = affine_coupling(x, params, identity="first", scale_map=m)
        back, total = affine_coupling(y, params, identity="first", scale_map=m, inverse=True, logdet=logdet)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, torch.zeros(3), rtol=0, atol=1e-3)
