"""The coupling mix's Triton kernels against the reference, on tiny shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import assert_close, placed

from nfkernels import ConditionerInput, ScaleMap, coupling_mix, use_backend
from nfkernels.reference.affine_coupling import Form, Identity, Order
from nfkernels.triton import coupling_mix as launchers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(shape, *, count=None, dtype=F32, params_dtype=None, layouts=("contiguous", "contiguous"), bias=True,
            gain=False, running=False, extra=None, grads="all", **options):  # fmt: skip
    """Forward and backward of one case on Triton, on the reference, and on the reference in float64."""
    g = torch.Generator().manual_seed(0)
    batch, channels, *spatial = shape
    count = channels // 2 if count is None else count
    scale_map = ScaleMap.parse(options.setdefault("scale_map", "glow"))
    compute = F64 if dtype == F64 else F32

    def random(*size, dtype=compute):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    x = placed(random(*shape, dtype=dtype), layouts[0])
    params = random(batch, count * (2 if scale_map.has_scale else 1), *spatial, dtype=params_dtype or dtype)
    stretch = (0.7 + 0.6 * torch.rand(channels, generator=g, dtype=F64)).to(compute)
    inputs = {
        "x": x,
        "params": placed(params, layouts[1]),
        "weight": torch.linalg.qr(random(channels, channels))[0] * stretch,
    }
    if bias:
        inputs["bias"] = random(channels)
    if gain:
        inputs["gain"] = 0.5 + torch.rand(count, generator=g, dtype=F64).to(compute)
    if running:
        inputs["logdet"] = random(batch)
    dz, dlogdet, dextra = random(*shape, dtype=F64), random(batch, dtype=F64), random(*shape, dtype=F64)

    def results(backend, inputs, extra):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        with use_backend(backend):
            z, logdet, *part = coupling_mix(**leaves, **options, extra=extra)
            values, gradients = [], []
            for name, value, gradient in (("z", z, dz), ("logdet", logdet, dlogdet)):
                if grads in ("all", name):
                    values.append(value)
                    gradients.append(gradient.to(value.dtype))
            if part and grads in ("all", "extra"):
                values.append(part[0])
                gradients.append(dextra[:, : extra.count].to(part[0].dtype))
            grad = torch.autograd.grad(values, list(leaves.values()), gradients, allow_unused=True)
        named = {f"d{k}": v for k, v in zip(leaves, grad, strict=True) if v is not None}
        return {"z": z.detach(), "logdet": logdet.detach()} | named, part

    got, part = results("triton", inputs, extra)
    plain, plain_part = results("reference", inputs, extra)
    wide = replace(extra, dtype=F64) if extra else None
    dextra = dextra if extra is None else dextra.to(extra.dtype).double()
    exact, _ = results("reference", {k: v.double() for k, v in inputs.items()}, wide)
    assert got.keys() == plain.keys() == exact.keys()
    for name in got:
        assert_close(name, got[name], plain[name], exact[name])
    for mine, its in zip(part, plain_part, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (its.shape, its.stride(), its.dtype)
        assert torch.equal(mine, got["z"].narrow(1, extra.start, extra.count).to(extra.dtype))
    return got


@pytest.mark.covering
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 31, 32, 48])
@pytest.mark.parametrize("first", [True, False])
def test_channels(channels, first):
    if first:
        compare((2, channels, 3, 3), running=True)
    else:
        compare((2, channels, 7), identity="second", order="shift_first")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6])
def test_how_many_are_transformed(count):
    for identity in ("first", "second"):
        compare((2, 6, 9), count=count, identity=identity, gain=count > 0)
    if count == 6:
        compare((2, 6, 9), count=count, identity="none")


SHAPES = [
    (7, 6),
    (1, 2),
    (600, 2),
    (3, 4, 1, 1),
    (1, 2, 1031),
    (3, 20, 29),
    (150, 20),
    (40, 33),
    (5, 3, 7, 7),
    (2, 4, 0),
]


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_shapes(shape, first):
    """Several samples to a tile and several tiles to a sample; with and without what is optional."""
    if first:
        compare(shape, running=True, gain=True)
    else:
        compare(shape, bias=False)


@pytest.mark.covering
@pytest.mark.parametrize("m", ["additive", "glow", "nflows", "exp", "freia", "realnvp", "zuko", "nflows_softplus"])
@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
def test_scale_maps(m, order):
    compare((2, 6, 3, 5), scale_map=m, order=order, gain=m != "additive")


LAYOUTS = ["shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved"]


@pytest.mark.covering
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [True, False])
def test_layouts_of_params(layout, first):
    if first:
        compare((2, 5, 11), layout=layout)
    else:
        compare((2, 20, 11), layout=layout, scale_map="additive")


@pytest.mark.covering
@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("sliced", "channels_last")])
@pytest.mark.parametrize("channels", [6, 24])
def test_memory_layouts(layouts, channels):
    compare((2, channels, 3, 5), layouts=layouts, params_dtype=BF16)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("channels", [3, 16, 20, 40])
def test_dtypes(dtype, channels):
    compare((2, channels, 9), dtype=dtype, running=True)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_conditioner_input(dtype, last):
    compare((2, 6, 3, 5), extra=ConditionerInput(0, 3, dtype, last))
    compare((3, 20, 7), extra=ConditionerInput(9, 11, dtype, last), dtype=BF16)
    for channels in (20, 40):
        compare((3, channels, 7), extra=ConditionerInput(4, 1, dtype, last), dtype=F64)
    compare((70, 5), extra=ConditionerInput(0, 5, dtype, last))


@pytest.mark.parametrize("grads", ["z", "logdet", "extra"])
def test_gradients_given(grads):
    """Any of the three outputs may have none."""
    for order in ("scale_first", "shift_first"):
        compare((2, 5, 7), grads=grads, extra=ConditionerInput(1, 3), gain=True, order=order)
    compare((2, 20, 7), grads=grads, extra=ConditionerInput(1, 3), scale_map="additive")


@pytest.mark.parametrize("channels", [5, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_flags_of_the_raw_backward(channels):
    """What is asked for, and the input rebuilt in the same pass; a gradient of stride 0."""
    x, params = torch.randn(3, channels, 9), torch.randn(3, 2 * (channels // 2), 9)
    weight = torch.linalg.qr(torch.randn(channels, channels))[0].contiguous()
    bias, gain = torch.randn(channels), torch.rand(channels // 2) + 0.5
    for order, inverse in ((Order.scale_first, False), (Order.shift_first, True)):
        form = Form(ScaleMap.nflows(), order=order, identity=Identity.second, inverse=inverse).pack()
        z, _, _ = launchers.forward(x, params, weight, bias, gain, None, *form, 0, 0, 0, False)
        args = (z, params, weight, weight.t().contiguous(), bias, torch.ones(()).expand(3, channels, 9))
        args = (*args, torch.ones(1).expand(3), None, gain, *form, 0)
        full = launchers.backward(*args, True, True, True)
        torch.testing.assert_close(full[5], x, rtol=1e-4, atol=1e-4)
        for need in range(8):
            flags = [bool(need & 1), bool(need & 2), bool(need & 4)]
            asked = [True, True, flags[0], flags[1], True, flags[2]]
            for wanted, got, expected in zip(asked, launchers.backward(*args, *flags), full, strict=True):
                if wanted:
                    torch.testing.assert_close(got, expected)
                else:
                    assert got.shape == (0,)


@pytest.mark.parametrize(("channels", "size"), [(12, 64 * 11), pytest.param(20, 64 * 7, marks=pytest.mark.exhaustive)])
def test_several_tiles_for_one_worker(monkeypatch, channels, size):
    """Fewer workers than tiles, forward and backward; the same bits twice."""
    monkeypatch.setattr(launchers.tiles, "WORKERS", 2)
    monkeypatch.setattr(launchers.tiles, "PROGRAMS", 2)
    monkeypatch.setattr(launchers, "MOST_TILES", 5)
    first, second = (compare((1, channels, size), gain=True, running=True) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_empty_batch():
    x, params, weight = torch.zeros(0, 4, 3), torch.zeros(0, 4, 3), torch.eye(4)
    with use_backend("triton"):
        z, logdet, part = coupling_mix(x, params, weight, extra=ConditionerInput(0, 2))
    assert (z.shape, logdet.shape, part.shape) == (x.shape, (0,), (0, 2, 3))
    form = Form(ScaleMap.glow(), identity=Identity.first).pack()
    args = (x, params, weight, weight, None, None, None, None, torch.ones(2), *form, 0, True, True, True)
    dx, dparams, *sums, x_again = launchers.backward(*args)
    assert (dx.shape, dparams.shape, x_again.shape) == (x.shape, params.shape, x.shape)
    assert all(torch.equal(s, torch.zeros(n)) for s, n in zip(sums, [(4, 4), 4, 2], strict=True))
