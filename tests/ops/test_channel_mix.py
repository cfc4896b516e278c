"""Channel mix: kernels against the reference in float64, gradients, transforms, errors."""

import itertools

import pytest
import torch
from cases import all_traced, opcheck, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import channel_mix, use_backend
from nfkernels.ops import _library

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}


def run(x, weight, bias, dy, upcast=False):
    leaves = [None if t is None else (t.double() if upcast else t).detach().requires_grad_() for t in (x, weight, bias)]
    y = channel_mix(*leaves)
    inputs = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


@pytest.mark.covering
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 12, 13, 24, 48, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_native_matches_reference(channels, dtype):
    for i, (spatial, fmt) in enumerate(
        itertools.product(
            [(), (7,), (4, 4), (16, 16), (7, 7), (0,), (1, 1), (2, 2, 2)], ["contiguous", "channels_last", "sliced"]
        )
    ):
        batch = (3, 0, 9)[i % 3]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = tensor(batch, channels, spatial, dtype, fmt), tensor(batch, channels, spatial, dtype, fmt)
        weight = torch.randn(channels, channels, dtype=compute) / channels**0.5
        bias = torch.randn(channels, dtype=compute) if i % 2 else None
        chosen = run(x, weight, bias, dy)
        with use_backend("native"):
            got = run(x, weight, bias, dy)
        with use_backend("reference"):
            plain, exact = run(x, weight, bias, dy), run(x, weight, bias, dy, upcast=True)
        assert got[0].stride() == chosen[0].stride() == torch.empty_like(x).stride()
        terms = max(channels, x.numel() // channels)
        check(got, plain, exact, terms)
        check(chosen, plain, exact, terms)


def check(got, plain, exact, terms):
    """Errors at most twice those of plain PyTorch; ``terms`` are those of the longest sum."""
    compute = torch.float64 if plain[0].dtype == torch.float64 else torch.float32
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == c.shape
        if a.numel():
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * (terms**0.5 if a.dtype == compute else 1)
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


def raw(backend, direction, *args):
    out = _library._state.ops[f"_channel_mix_{direction}"].on(backend, *args)
    return [out] if direction == "forward" else list(out)


def exact_of(direction, *args):
    return raw("reference", direction, *(a.double() if isinstance(a, torch.Tensor) else a for a in args))


def against_reference(direction, *args):
    channels = args[0].shape[1]
    terms = max(channels, args[0].numel() // max(channels, 1))
    check(raw("native", direction, *args), raw("reference", direction, *args), exact_of(direction, *args), terms)


# Channels on both sides of every kernel's limits; columns that fill no tile, several, and a persistent grid twice over.
CHANNELS = [1, 2, 3, 5, 12, 24, 25, 31, 32, 33, 48, 49, 64, 65, 96, 130, 200, 300]
COLUMNS = {
    "rows cross samples": (3, (451,), "contiguous"),
    "wide rows": (2, (24, 24), "contiguous"),
    "channels last": (3, (20, 20), "channels_last"),
    "sliced": (2, (17, 30), "sliced"),
    "table": (901, (), "contiguous"),
    "one column": (1, (1,), "contiguous"),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_kernel_of_every_width(channels, columns):
    batch, spatial, fmt = COLUMNS[columns]
    dtypes = [torch.float32, torch.bfloat16] if channels < 130 else [torch.float32]
    for dtype in dtypes if columns != "table" else [torch.float32, torch.float64]:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = tensor(batch, channels, spatial, dtype, fmt), tensor(batch, channels, spatial, dtype, fmt)
        weight = torch.randn(channels, channels, dtype=compute) / channels**0.5
        against_reference("forward", x, weight, torch.randn(channels, dtype=compute))
        against_reference("backward", x, weight, dy, None, None, True, True, True)


def test_many_columns():
    for channels in (4, 12, 24, 32):
        x = torch.randn(3, channels, 50, 64)
        weight = torch.randn(channels, channels)
        against_reference("forward", x, weight, None)
        against_reference("backward", x, weight, torch.randn_like(x), None, None, True, True, True)


SUBSETS = list(itertools.product([False, True], repeat=3))


@pytest.mark.covering
@pytest.mark.parametrize("need", SUBSETS)
@pytest.mark.parametrize("channels", [3, 24, 33, 67])
def test_raw_backward_makes_what_is_needed(channels, need):
    for dtype in (torch.float32, torch.float64, torch.float16):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = tensor(2, channels, (9, 16), dtype, "contiguous"), tensor(2, channels, (9, 16), dtype, "channels_last")
        weight = torch.randn(channels, channels, dtype=compute)
        against_reference("backward", x, weight, dy, None, None, *need)


def orthogonal(channels, dtype):
    return torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0].to(dtype).contiguous()


@pytest.mark.covering
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("channels", [1, 3, 12, 24, 31, 32, 48, 64, 67, 130])
def test_rebuild_makes_the_input_from_the_output(channels, columns):
    batch, spatial, fmt = COLUMNS[columns]
    dtypes = [torch.float32, torch.bfloat16] if channels < 130 else [torch.float32]
    for dtype in dtypes if columns != "table" else [torch.float32, torch.float64]:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        weight = orthogonal(channels, compute)
        y, dy = tensor(batch, channels, spatial, dtype, fmt), tensor(batch, channels, spatial, dtype, fmt)
        inverse, bias = weight.t().contiguous(), torch.randn(channels, dtype=compute)
        against_reference("backward", y, weight, dy, inverse, bias, True, True, True)
        *_, x = raw("native", "backward", y, weight, dy, inverse, bias, True, True, True)
        assert x.stride() == torch.empty_like(y).stride()


@pytest.mark.covering
@pytest.mark.parametrize("need", SUBSETS)
@pytest.mark.parametrize("channels", [5, 33, 67])
def test_rebuild_and_what_is_needed(channels, need):
    for dtype in (torch.float32, torch.float64):
        weight = orthogonal(channels, dtype)
        y, dy = torch.randn(2, channels, 90, dtype=dtype), torch.randn(2, channels, 90, dtype=dtype)
        against_reference("backward", y, weight, dy, weight.t().contiguous(), None, *need)


@pytest.mark.covering
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("channels", [5, 24, 33, 67])
def test_what_is_not_finite_stays_in_its_column(channels, value):
    x, dy, weight = torch.randn(2, channels, 90), torch.randn(2, channels, 90), torch.randn(channels, channels)
    clean = raw("native", "backward", x, weight, dy, None, None, True, True, True)
    (y,) = raw("native", "forward", x, weight, None)
    bad_x, bad_dy = x.clone(), dy.clone()
    bad_x[1, 3, 40] = bad_dy[0, 2, 7] = value
    (bad_y,) = raw("native", "forward", bad_x, weight, None)
    assert not bad_y[1, :, 40].isfinite().any()
    bad_y[1, :, 40] = y[1, :, 40]
    assert torch.equal(bad_y, y)
    dx, dweight, dbias, _ = raw("native", "backward", bad_x, weight, bad_dy, None, None, True, True, True)
    assert not dx[0, :, 7].isfinite().any()
    dx[0, :, 7] = clean[0][0, :, 7]
    assert torch.equal(dx, clean[0])
    assert not dweight[2].isfinite().any()
    assert not dweight[:, 3].isfinite().any()
    dweight[2], dweight[:, 3] = clean[1][2], clean[1][:, 3]
    assert torch.equal(dweight, clean[1])
    assert torch.equal(dbias.isfinite(), torch.arange(channels) != 2)


def test_gradcheck():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), torch.randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(channel_mix, (x, weight, bias))
    assert torch.autograd.gradgradcheck(channel_mix, (x, weight, bias))
    assert torch.autograd.gradgradcheck(channel_mix, (x, weight))
    assert torch.autograd.gradgradcheck(channel_mix, (x, weight.detach(), bias))


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_only_the_needed_gradients_are_made(needed):
    x, weight, bias = torch.randn(2, 5, 9), torch.randn(5, 5), torch.randn(5)
    leaves = [t.requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)]
    channel_mix(*leaves).square().sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needed
    wide = [t.detach().double().requires_grad_() for t in leaves]
    channel_mix(*wide).square().sum().backward()
    for t, w in zip(leaves, wide, strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 12, 16, 16), (200, 8), (5, 6, 7, 7)])
def test_same_bits_for_any_number_of_threads(shape):
    x, weight = torch.randn(shape), torch.randn(shape[1], shape[1])
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            outcomes.append(run(x, weight, torch.ones(shape[1]), x))
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_wide_and_row_major_mixes_go_to_the_library():
    calls = []
    op = _library._state.ops["_channel_mix_forward"]
    original = op.reference
    op.reference = lambda *a: calls.append(a[0].shape) or original(*a)
    try:
        channel_mix(torch.randn(2, 300, 3), torch.eye(300))
        channel_mix(torch.randn(6, 4).t(), torch.eye(6))
        channel_mix(torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last), torch.eye(6))
        assert len(calls) == 3
        channel_mix(torch.randn(2, 6, 4, 4), torch.eye(6))
        assert len(calls) == 3
    finally:
        op.reference = original


def test_a_table_on_the_cpu_is_a_product_with_pytorchs_own_gradients():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6)
    assert "ChannelMix" not in type(channel_mix(x, weight).grad_fn).__name__
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would take it for a network's
        y = channel_mix(x, weight)
    torch.testing.assert_close(y, x @ weight.t())
    with use_backend("native"):
        assert "ChannelMix" in type(channel_mix(x, weight).grad_fn).__name__


def test_strided_bias_and_weight():
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(6, 6)[::2, ::2], torch.randn(6)[::2]
    want = torch.einsum("oc,bcp->bop", weight, x) + bias[:, None]
    torch.testing.assert_close(channel_mix(x, weight, bias), want)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    spatial = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)), *spatial)
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    wide = torch.randn([shape[i] * steps[i] for i in order])
    x = wide.permute([order.index(i) for i in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    weight = torch.randn(shape[1], shape[1])
    with use_backend("native"):
        got = run(x, weight, None, torch.ones(()).expand(shape))
    with use_backend("reference"):
        want = run(x, weight, None, torch.ones(()).expand(shape))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_float32():
    """Every peer's 1x1 convolution autocasts: the round trip is then off by many grey levels."""
    x, weight = torch.randn(2, 6, 8, 8), torch.linalg.qr(torch.randn(6, 6))[0]
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = channel_mix(x, weight)
            back = channel_mix(y, weight.t())
        assert y.dtype == torch.float32
        assert (back - x).abs().max() < 1e-5


@all_traced
@pytest.mark.parametrize("need", [(True, True, True), (True, False, True), (False, True, False)])
def test_opcheck(need, everything):
    for x in (
        torch.randn(2, 4, 3, 3),
        torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4),
    ):
        weight = torch.randn(4, 4)
        traced = everything or x.is_contiguous()
        opcheck(torch.ops.nfkernels._channel_mix_forward, (x, weight, torch.randn(4)), traced=traced)
        args = (x, weight, torch.randn_like(x), None, None, *need)
        opcheck(torch.ops.nfkernels._channel_mix_backward, args, traced=traced)


def test_compile_fullgraph_equals_eager():
    def step(x, weight, bias):
        return channel_mix(x, weight, bias).sin().sum()

    inputs = [
        torch.randn(2, 4, 5, requires_grad=True),
        torch.randn(4, 4, requires_grad=True),
        torch.randn(4, requires_grad=True),
    ]
    eager = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_func_transforms_and_forward_mode():
    x, weight = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda a: channel_mix(a[None], weight)[0])(x), channel_mix(x, weight))
    _, tangent = torch.func.jvp(lambda a: channel_mix(a, weight), (x,), (x,))
    torch.testing.assert_close(tangent, channel_mix(x, weight))
    jacobian = torch.func.jacrev(lambda w: channel_mix(x, w))(weight)
    assert jacobian.shape == (*x.shape, 4, 4)


X = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: channel_mix(torch.zeros(3), torch.eye(3))),
        ("floating point", lambda: channel_mix(X.long(), torch.eye(4))),
        (r"weight must be \[4, 4\]", lambda: channel_mix(X, torch.eye(3))),
        (r"bias must be \[4\]", lambda: channel_mix(X, torch.eye(4), torch.zeros(3))),
        ("weight is on meta", lambda: channel_mix(X, torch.eye(4, device="meta"))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
