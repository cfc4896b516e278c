"""Dequantisation: kernels against the reference in float64, exact grey levels, Jacobians, gradients, errors."""

import itertools
import math

import pytest
import torch
from cases import all_traced, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import dequantize, use_backend
from nfkernels.ops import _library, advance_, philox_uniform, random_key
from nfkernels.reference import dequantize as reference

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of the raw op's dtype
KEY = advance_(random_key(-7), 3)
SHAPES = [(3, 5, 7, 11), (4, 3, 16, 16), (70, 5), (3, 4, 13), (0, 4, 3), (2, 4, 0), (1, 1, 1, 1), (1, 3, 160, 130)]
LAYOUTS = ["contiguous", "channels_last", "sliced", "stepped"]


def images(shape, layout="contiguous", dtype=torch.uint8, levels=256):
    """Whole grey levels, the highest among them; what lies outside a slice is another level."""
    if layout == "sliced":
        wide = images((shape[0], shape[1] + 3, *shape[2:]), dtype=dtype, levels=levels)
        return wide[:, 1 : 1 + shape[1]]
    if layout == "stepped":
        return images((*shape[:-1], 2 * shape[-1]), dtype=dtype, levels=levels)[..., ::2]
    x = torch.randint(0, levels, shape)
    x.view(-1)[:1] = levels - 1
    x = x.to(dtype)
    if layout == "channels_last":
        order = (0, *range(2, len(shape)), 1)
        return x.permute(order).contiguous().permute(0, len(shape) - 1, *range(1, len(shape) - 1))
    return x


def run(x, out, *, upcast=False, logdet=None, **options):
    """Outputs, and the gradient of a fixed random loss where x passes one."""
    dtype = torch.float64 if upcast else out
    leaf = x if x.dtype == torch.uint8 else (x.double() if upcast else x).detach().requires_grad_()
    running = logdet if logdet is None or not upcast else logdet.double()
    y, total = dequantize(leaf, KEY, dtype=dtype, logdet=running, **options)
    if x.dtype == torch.uint8:
        return [y, total]
    torch.manual_seed(1)
    gy, gl = torch.randn(y.shape).to(out), torch.randn(total.shape).to(reference.arithmetic(out))
    (grad,) = torch.autograd.grad([y, total], [leaf], [gy.to(y.dtype), gl.to(total.dtype)])
    return [y.detach(), total.detach(), grad]


@pytest.mark.covering
@pytest.mark.parametrize("alpha", [None, 0.05, 1e-6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_matches_reference(layout, alpha):
    for n, (shape, given_, out) in enumerate(itertools.product(SHAPES, [torch.uint8, None], FLOATS)):
        x = images(shape, layout, given_ or out)
        running = torch.randn(shape[0]).to(reference.arithmetic(out)) if n % 2 else None
        options = {"alpha": alpha, "logdet": running, "levels": 256}
        with use_backend("native"):
            got = run(x, out, **options)
        with use_backend("reference"):
            plain, exact = run(x, out, **options), run(x, out, upcast=True, **options)
        assert got[0].stride() == torch.empty_like(x if len(got) == 2 else plain[0]).stride()
        assert got[0].stride() == plain[0].stride()
        if alpha is None:
            assert torch.equal(got[0], plain[0])
            assert torch.equal(got[1], plain[1])
        for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
            assert a.dtype == b.dtype
            if not a.numel():
                continue
            assert torch.isfinite(a).all()
            # A sum has the error of its terms; the gradient is exponential in y.
            terms = math.sqrt(x[0].numel()) if i == 1 else 1 + exact[0].abs().max() if i == 2 else 1
            slack = 8 * EPS[a.dtype] * c.abs().max().clamp(min=1) * terms
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("levels", [2, 3, 16, 17, 49, 100, 255, 256])
def test_grey_levels_come_back(levels, backend):
    x = torch.arange(levels, dtype=torch.uint8).repeat(300)[None]
    for dtype in (torch.float32, torch.float64):
        with use_backend(backend):
            for given_ in (x, x.to(dtype)):
                v, logdet = dequantize(given_, KEY, levels=levels, dtype=dtype)
                assert torch.equal((v * levels).floor(), x.to(dtype))
                assert v.min() >= 0
                assert v.max() < 1
                assert torch.equal(logdet, torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_levels_come_back_from_any_noise(dtype):
    """All levels of all sizes up to 256 with the noises whose sums round: next to 0 and next to 1."""
    ulp = 2.0**-24
    noise = torch.tensor([0.0, ulp, 2 * ulp, 0.5, 1 - 3 * ulp, 1 - 2 * ulp, 1 - ulp], dtype=dtype)[:, None]
    for levels in range(2, 257):
        x = torch.arange(levels, dtype=dtype)[None]
        v = reference._unit(x, noise, levels, reference._LARGEST[dtype])
        assert torch.equal((v * levels).floor(), x.expand(len(noise), levels)), levels
        assert ((v - (x + noise) / levels).abs() <= 4 * torch.finfo(dtype).eps * v + ulp / levels).all()


def kernel_noise(wanted):
    """An element whose noise is at least ``wanted``: its index and key, found by drawing."""
    for seed in range(200):
        u = philox_uniform(torch.empty(1, 1 << 20), random_key(seed))
        if u.max() >= wanted:
            return int(u.argmax()), random_key(seed), float(u.max())
    raise AssertionError("no such noise was drawn")


def test_white_with_noise_next_to_one_stays_below_one():
    """255 + u rounds to 256 in float32 from u = 1 - 2^-17 on."""
    index, key, u = kernel_noise(1 - 2**-18)
    assert torch.tensor(255.0) + u == 256
    x = torch.full((1, 1 << 20), 255, dtype=torch.uint8)
    for backend in ("native", "reference"):
        with use_backend(backend):
            for dtype in FLOATS:
                v, _ = dequantize(x, key, dtype=dtype)
                assert v[0, index] < 1
                assert (v[0, index] * 256).floor() == 255 or dtype in (torch.bfloat16, torch.float16)
            y, logdet = dequantize(x, key, alpha=1e-6)
            assert torch.isfinite(y).all()
            assert torch.isfinite(logdet).all()


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_logit_comes_back(alpha, backend):
    x = images((4, 3, 16, 16))
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        with use_backend(backend):
            v, _ = dequantize(x, KEY, dtype=dtype)
            y, _ = dequantize(x, KEY, dtype=dtype, alpha=alpha)
        back = (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)
        assert (back - v).abs().max() < bound
        assert y.abs().max() <= math.log((1 - alpha) / alpha) * (1 + 1e-6)


@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_logdet_is_that_of_the_jacobian(alpha, backend):
    """With respect to v: the images' own Jacobian has -log(levels) per element besides."""
    x = images((2, 3, 2), dtype=torch.float64, levels=17)
    with use_backend(backend):
        jacobian = torch.autograd.functional.jacobian(lambda v: dequantize(v, KEY, levels=17, alpha=alpha)[0], x)
        _, logdet = dequantize(x, KEY, levels=17, alpha=alpha)
    for b in range(2):
        block = jacobian[b, :, :, b].reshape(6, 6)
        torch.testing.assert_close(torch.linalg.slogdet(block)[1] + 6 * math.log(17), logdet[b], rtol=1e-12, atol=1e-12)


@pytest.mark.covering
@pytest.mark.parametrize("alpha", [None, 0.05, 0.3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck(alpha, backend):
    x = images((2, 3, 4), dtype=torch.float64, levels=8).requires_grad_()
    running = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def f(x, running):
        return dequantize(x, KEY, levels=8, alpha=alpha, logdet=running)

    with use_backend(backend):
        assert torch.autograd.gradcheck(f, (x, running), eps=1e-5, atol=1e-4)
        assert torch.autograd.gradgradcheck(f, (x, running), eps=1e-5, atol=1e-4)


def test_only_one_output_used():
    for alpha, pick in itertools.product((None, 0.1), (0, 1)):
        x = images((2, 3, 5), dtype=torch.float64).requires_grad_()
        y = dequantize(x, KEY, alpha=alpha)[pick]
        (got,) = torch.autograd.grad(y.sum(), x)
        with use_backend("reference"):
            (want,) = torch.autograd.grad(dequantize(x, KEY, alpha=alpha)[pick].sum(), x)
        torch.testing.assert_close(got, want)
        assert (got.count_nonzero() == 0) == (alpha is None and pick == 1)


def test_running_logdet_of_bytes_passes_its_gradient():
    running = torch.zeros(3, requires_grad=True)
    for alpha in (None, 0.1):
        _, logdet = dequantize(images((3, 2, 4)), KEY, alpha=alpha, logdet=running)
        (grad,) = torch.autograd.grad((logdet * torch.tensor([1.0, 2.0, 3.0])).sum(), running)
        assert grad.tolist() == [1, 2, 3]
    _, logdet = dequantize(images((3, 2)), KEY, logdet=(given_ := torch.randn(3)))
    assert logdet.data_ptr() != given_.data_ptr()
    assert torch.equal(logdet, given_)


@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (700, 5), (1, 3, 160, 161)])
def test_same_bits_for_any_number_of_threads(shape, alpha):
    x, outcomes = images(shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            outcomes.append([*run(x, torch.float32, alpha=alpha), *run(x.float(), torch.float32, alpha=alpha)])
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_noise_is_that_of_the_generator_whatever_the_layout():
    for shape in ((3, 5, 6, 7), (4, 9)):
        u = philox_uniform(torch.empty(shape, dtype=torch.float64), KEY)
        for layout in LAYOUTS:
            x = images(shape, layout)
            v, _ = dequantize(x, KEY, dtype=torch.float64)
            torch.testing.assert_close(v * 256 - x, u, rtol=0, atol=1e-12)
    x = images((3, 4, 5))
    assert torch.equal(dequantize(x, KEY)[0], dequantize(x, KEY.clone())[0])
    assert not torch.equal(dequantize(x, KEY)[0], dequantize(x, advance_(KEY.clone()))[0])


@pytest.mark.parametrize("strides", [(6, 0, 6, 2), (0, 9, 3, 1), (2, 1, 0, 0), (0, 0, 0, 0)])
def test_expanded_images(strides):
    x = images((64,)).as_strided((2, 4, 3, 3), strides)
    for alpha in (None, 0.1):
        got = dequantize(x, KEY, alpha=alpha)
        for a, b in zip(got, dequantize(x.contiguous(), KEY, alpha=alpha), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3).map(tuple))
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)), *spatial)
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    alpha = data.draw(st.sampled_from([None, 0.05]))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32]))
    wide = images([shape[i] * steps[i] for i in order], dtype=dtype)
    x = wide.permute([order.index(i) for i in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    with use_backend("native"):
        got = run(x, torch.float32, alpha=alpha)
    with use_backend("reference"):
        want = run(x, torch.float32, alpha=alpha)
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- PyTorch's machinery --------------------------------------------------------------------------------------------


@all_traced
@pytest.mark.parametrize("alpha", [-1.0, 0.05])
def test_opcheck(alpha, everything):
    for i, (x, code) in enumerate(itertools.product(
        [images((2, 4, 3, 3)), images((2, 4, 3, 3), "channels_last"), images((2, 4, 3, 3), "sliced"), images((0, 4))],
        range(4),
    )):  # fmt: skip
        compute = torch.float64 if code == 1 else torch.float32
        logdet = torch.zeros(len(x), dtype=compute)
        args = (x, KEY, logdet, 256.0, alpha, code)
        opcheck(torch.ops.nfkernels._dequantize_forward, args, traced=everything or i % 5 == 0)
        y = torch.randn(x.shape).to(FLOATS[code])
        dlogdet = torch.ones(1, dtype=reference.arithmetic(y.dtype)).expand(len(x))
        args = (y, torch.ones_like(y), dlogdet, 256.0, alpha)
        opcheck(torch.ops.nfkernels._dequantize_backward, args, traced=everything or i % 5 == 0)
    opcheck(torch.ops.nfkernels._dequantize_forward, (torch.ones(2, 3), KEY, None, 256.0, alpha, 0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_equals_eager(dynamic):
    def step(x, key):
        y, logdet = dequantize(x, key, alpha=0.05)
        advance_(key)
        return y.sin().sum() + dequantize(x, key)[0].sum() - logdet.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = images((batch, 4, 5), dtype=torch.float32).requires_grad_()
        eager, got = (torch.autograd.grad(f(x, KEY.clone()), x)[0] for f in (step, compiled))
        torch.testing.assert_close(got, eager)
        x = images((batch, 4, 5))
        torch.testing.assert_close(compiled(x, KEY.clone()), step(x, KEY.clone()))


def test_func_transforms_and_forward_mode():
    x = images((3, 4, 2), dtype=torch.float64, levels=16)

    def f(x):
        y, logdet = dequantize(x, KEY, levels=16, alpha=0.1)
        return y.square().sum() + 0.3 * logdet.sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(x), want)
    _, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, want.sum())
    keys = torch.tensor([[1, 0], [1, 1], [9, 0]])
    mapped = torch.func.vmap(lambda a, k: dequantize(a[None], k, levels=16)[0][0])(x, keys)
    each = torch.stack([dequantize(x[i : i + 1], keys[i], levels=16)[0][0] for i in range(3)])
    assert torch.equal(mapped, each)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, _ = dequantize(dual, KEY, levels=16)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, torch.full_like(x, 1 / 16))


def test_autocast_leaves_data_alone():
    x = images((2, 4, 8, 8))
    outside = dequantize(x, KEY, alpha=0.05)
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            inside = dequantize(x, KEY, alpha=0.05)
        for a, b in zip(inside, outside, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_comes_through(backend):
    x = torch.ones(2, 20)
    x[1, 3] = math.nan
    with use_backend(backend):
        for alpha in (None, 0.1):
            y, logdet = dequantize(x, KEY, alpha=alpha)
            assert torch.isnan(y).nonzero().tolist() == [[1, 3]]
            assert torch.isnan(logdet).tolist() == [False, alpha is not None]


def test_fake_tensors_on_a_device_that_is_not_here():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 4, 8, 8, device="cuda", dtype=torch.uint8).to(memory_format=torch.channels_last)
        y, logdet = dequantize(x, random_key(0, device="cuda"), dtype=torch.float64)
        assert (y.device.type, y.dtype, y.stride()) == ("cuda", torch.float64, x.stride())
        assert (logdet.device.type, logdet.dtype) == ("cuda", torch.float64)


def test_saved_for_backward_is_the_output():
    x = images((8, 6, 4, 4), dtype=torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = dequantize(x, KEY, alpha=0.05)
    assert [t.untyped_storage().data_ptr() for t in saved] == [y.untyped_storage().data_ptr()]


def test_raw_ops_refuse_what_their_kernels_cannot_read():
    forward, x = torch.ops.nfkernels._dequantize_forward, images((2, 3))
    for args in [
        (x.int(), KEY, None, 256.0, -1.0, 0),
        (x.double(), KEY, None, 256.0, -1.0, 0),
        (x, KEY.int(), None, 256.0, -1.0, 0),
        (x, KEY, torch.zeros(3), 256.0, -1.0, 0),
        (x, KEY, None, 256.0, 0.5, 0),
        (x, KEY, None, 256.0, -1.0, 4),
    ]:
        with pytest.raises(RuntimeError, match="nfkernels"):
            forward(*args)
    assert _library.serving("_dequantize_forward", "cpu")[0] == "native"


X = torch.zeros(2, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("images must be", lambda: dequantize(X[0, 0], KEY)),
        ("uint8 or floating", lambda: dequantize(X.long(), KEY)),
        ("dtype must be floating", lambda: dequantize(X, KEY, dtype=torch.int32)),
        ("levels must be a whole number", lambda: dequantize(X, KEY, levels=1)),
        ("levels must be a whole number", lambda: dequantize(X, KEY, levels=2.5)),
        ("alpha must be between", lambda: dequantize(X, KEY, alpha=0.0)),
        ("alpha must be between", lambda: dequantize(X, KEY, alpha=0.5)),
        ("alpha must be between", lambda: dequantize(X, KEY, alpha=math.nan)),
        ("a key is int64", lambda: dequantize(X, torch.zeros(2))),
        ("key is on meta", lambda: dequantize(X, KEY.to("meta"))),
        (r"logdet must be torch.float32 \[2\]", lambda: dequantize(X, KEY, logdet=torch.zeros(3))),
        ("logdet must be torch.float64", lambda: dequantize(X, KEY, logdet=torch.zeros(2), dtype=torch.float64)),
        ("logdet is on meta", lambda: dequantize(X, KEY, logdet=torch.zeros(2, device="meta"))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
