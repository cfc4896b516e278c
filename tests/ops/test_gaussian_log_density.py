"""Gaussian log-density: kernels against the reference in float64, gradients, transforms, errors."""

import itertools
import math

import pytest
import torch
from cases import DTYPES as COMMON_DTYPES
from cases import LAYOUTS, all_traced, opcheck, tensor
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from nfkernels import gaussian_log_density, use_backend

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
SHAPES = [
    (3, 5, 7, 11), (2, 8, 16, 16), (70, 5), (9, 64), (4, 16), (3, 4, 13), (0, 4, 3), (2, 4, 0), (2, 0, 3),
    (1, 1, 1, 1), (5, 1), (2, 3072), (1, 6, 80, 90), (2, 12, 8, 8), (3, 2, 3, 2, 5), (1, 4, 1, 20_000), (2, 48, 1, 5),
]  # fmt: skip
DTYPES = [*COMMON_DTYPES, (torch.float16, torch.float16), (torch.float64, torch.bfloat16)]
# Memory format of x and of params.
FORMATS = list(itertools.product(["contiguous", "channels_last", "sliced"], repeat=2))


def run(tensors, layout, upcast=False):
    """The density and the gradients of all tensors, in their dtypes or all in float64."""
    leaves = [None if t is None else (t.double() if upcast else t).detach().requires_grad_() for t in tensors]
    x, params, logdet, dout = leaves
    out = gaussian_log_density(x, params, layout=layout, logdet=logdet)
    inputs = [t for t in (x, params, logdet) if t is not None]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.detach().to(out.dtype))]


def case(shape, formats, dtypes, learned=True, running=True):
    batch, channels, *spatial = shape
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    x = tensor(batch, channels, tuple(spatial), dtypes[0], formats[0])
    params = tensor(batch, 2 * channels, tuple(spatial), dtypes[1], formats[1]).mul_(0.5) if learned else None
    return x, params, torch.randn(batch, dtype=compute) if running else None, torch.randn(batch, dtype=compute)


def compare(tensors, layout="shift_scale"):
    got = run(tensors, layout)
    with use_backend("reference"):
        plain, exact = run(tensors, layout), run(tensors, layout, upcast=True)
    for a, b, c, like in zip(got, plain, exact, [None, *(t for t in tensors[:2] if t is not None), None], strict=False):
        assert (a.dtype, a.shape) == (b.dtype, c.shape)
        if like is not None:
            assert a.dtype == like.dtype
            assert a.stride() == torch.empty_like(like).stride()
        if a.numel():
            assert torch.isfinite(a).all()
            terms = tensors[0][0].numel() if a.dim() == 1 else 1
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * math.sqrt(max(terms, 1))
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_matches_reference(shape):
    """Every dtype with every pair of memory formats, and the standard normal."""
    for i, (dtypes, formats) in enumerate(itertools.product(DTYPES, FORMATS)):
        compare(case(shape, formats, dtypes, running=i % 2 == 0), LAYOUTS[i % 4])
        compare(case(shape, formats, dtypes, learned=False, running=i % 2 == 1))


@pytest.mark.covering
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 32), (2, 16, 4, 4), (2, 3, 7, 5)], ids=str)
def test_layouts(layout, shape):
    for formats, dtypes in itertools.product(FORMATS, DTYPES[:2]):
        compare(case(shape, formats, dtypes), layout)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_density_of_torch(layout, backend):
    x, mean, log_scale = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    halves, interleaved = torch.cat([mean, log_scale], 1), torch.stack([mean, log_scale], 2).flatten(1, 2)
    params = {
        "shift_scale": halves,
        "scale_shift": halves.roll(4, 1),
        "shift_scale_interleaved": interleaved,
        "scale_shift_interleaved": interleaved.unflatten(1, (4, 2)).flip(2).flatten(1, 2),
    }[layout]
    with use_backend(backend):
        torch.testing.assert_close(
            gaussian_log_density(x, params, layout=layout),
            torch.distributions.Normal(mean, log_scale.exp()).log_prob(x).sum((1, 2)),
        )
        torch.testing.assert_close(
            gaussian_log_density(x, logdet=x[:, 0, 0]),
            torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2)) + x[:, 0, 0],
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)], ids=str)
def test_gradcheck(shape, layout):
    x, params, logdet, _ = case(shape, ("contiguous", "contiguous"), (torch.float64, torch.float64))
    x, params, logdet = (t.requires_grad_() for t in (x, params, logdet))

    def f(x, params=None, logdet=None):
        return gaussian_log_density(x, params, layout=layout, logdet=logdet)

    for inputs in ((x,), (x, params), (x, params, logdet), (x.detach(), params), (x, params.detach())):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
def test_only_the_needed_gradients_are_made(needed):
    tensors = case((3, 5, 9), ("contiguous", "contiguous"), (torch.float32, torch.float32))
    leaves = [t.requires_grad_(n) for t, n in zip(tensors[:3], needed, strict=True)]
    weights = torch.randn(3)
    (gaussian_log_density(leaves[0], leaves[1], logdet=leaves[2]) * weights).sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needed
    wide = [t.detach().double().requires_grad_() for t in leaves]
    (gaussian_log_density(wide[0], wide[1], logdet=wide[2]) * weights).sum().backward()
    for t, w in zip(leaves, wide, strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward():
    """x and params themselves, in their own dtypes: nothing is made for it."""
    x, params = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 6, 8).bfloat16().requires_grad_()
    for tensors in ((x,), (x, params)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            gaussian_log_density(*tensors)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("shape", [(64, 12, 16, 16), (200, 8), (5, 6, 7, 7), (1, 70_000)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    tensors = case(shape, ("contiguous", "channels_last"), (torch.float32, torch.bfloat16))
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            outcomes.append(run(tensors, "shift_scale"))
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_expanded_tensors_are_read_through_their_strides():
    """One mean and scale for all samples or positions, one gradient for all samples."""
    x = torch.randn(4, 3, 5)
    for params in (torch.randn(6, 5).expand(4, 6, 5), torch.randn(1, 6, 1).expand(4, 6, 5)):
        want = gaussian_log_density(x, params.contiguous())
        torch.testing.assert_close(gaussian_log_density(x, params), want)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(gaussian_log_density(leaf, params).sum(), leaf),
            torch.autograd.grad(gaussian_log_density(leaf, params.contiguous()), leaf, torch.ones(4)),
        )
        shared = params.clone().requires_grad_()
        (dparams,) = torch.autograd.grad(gaussian_log_density(x, shared).sum(), shared)
        assert torch.isfinite(dparams).all()
    one = torch.randn(1, 3, 1).expand(4, 3, 5)
    torch.testing.assert_close(gaussian_log_density(one), gaussian_log_density(one.contiguous()))
    logdet = torch.randn(1).expand(4)
    torch.testing.assert_close(gaussian_log_density(x, logdet=logdet), gaussian_log_density(x) + logdet)


def placed(x, start, batch_gap, position_gap=0):
    """The same values (channels-last for a position gap) in a wider memory, from its element ``start`` on."""
    order = [0, *range(2, x.dim()), 1] if position_gap else list(range(x.dim()))
    strides = [0] * x.dim()
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * x.shape[axis] + (position_gap if axis == 1 else 0)
    strides[0] += batch_gap
    memory = torch.full((start + x.shape[0] * strides[0] + 1,), math.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, strides, start).copy_(x)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("raw", [torch.float32, torch.bfloat16, torch.float16])
def test_addresses_and_strides_that_no_vector_fits(raw, learned):
    """Samples that are whole vectors, at odd addresses or an odd number of elements apart."""
    for shape, gaps in itertools.product([(3, 64), (3, 8, 4, 4)], itertools.product((0, 1, 2), (0, 1, 4), (0, 1, 2))):
        if len(shape) == 2 and gaps[2]:
            continue
        x, params, logdet, dout = case(shape, ("contiguous", "contiguous"), (torch.float32, raw))
        if not learned:
            compare((placed(x, *gaps), None, logdet, dout))
            continue
        compare((placed(x, *gaps), params, logdet, dout))
        compare((x, placed(params, *gaps), logdet, dout))
        if len(shape) > 2:
            compare((x.contiguous(memory_format=torch.channels_last), placed(params, *gaps), logdet, dout))


SPATIAL = st.one_of(
    st.lists(st.integers(1, 5), max_size=3).map(tuple), st.sampled_from([(20,), (33,), (1, 40), (17, 1), (16, 16)])
)


def draw_strided(data, shape):
    """A tensor of this shape, dense or a view: axes permuted, stepped, cut out of wider ones, or expanded."""
    if data.draw(st.booleans()):
        return torch.randn(shape)
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    margins = [data.draw(st.integers(0, 1)) for _ in shape]
    expanded = [n > 1 and data.draw(st.integers(0, 5)) == 0 for n in shape]
    sizes = [1 if e else n * s + m for n, s, m, e in zip(shape, steps, margins, expanded, strict=True)]
    wide = torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    cut = [
        slice(None) if e else slice(m, m + n * s, s) for n, s, m, e in zip(shape, steps, margins, expanded, strict=True)
    ]
    return wide[tuple(cut)].expand(shape)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)), *data.draw(SPATIAL))
    layout = data.draw(st.sampled_from(LAYOUTS))
    x = draw_strided(data, shape).requires_grad_(data.draw(st.booleans()))
    params = draw_strided(data, (shape[0], 2 * shape[1], *shape[2:])) if data.draw(st.booleans()) else None
    if params is not None:
        params.requires_grad_(data.draw(st.booleans()))
    inputs = [t for t in (x, params) if t is not None and t.requires_grad]
    dout = torch.randn(1).expand(shape[0])

    def results():
        out = gaussian_log_density(x, params, layout=layout)
        return [out, *(torch.autograd.grad(out, inputs, dout) if inputs else [])]

    got = results()
    with use_backend("reference"):
        want = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- PyTorch's machinery --------------------------------------------------------------------------------------------


@all_traced
def test_opcheck(everything):
    for x, params in [
        (torch.randn(2, 4, 3, 3), None),
        (torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)),
        (torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(2, 8, 3, 3).bfloat16()),
        (torch.randn(2, 6, 3, 3)[:, 1:5], torch.randn(2, 8, 3, 3)),
        (torch.randn(0, 4), torch.randn(0, 8)),
    ]:
        running = torch.zeros(len(x))
        traced = everything or (x.is_contiguous() and len(x) > 0)
        opcheck(torch.ops.nfkernels._gaussian_log_density_forward, (x, params, running, 2), traced=traced)
        for need_dx, need_dparams in [(True, params is not None), (True, False), (False, params is not None)]:
            args = (x, params, torch.ones(1).expand(len(x)), 1, need_dx, need_dparams)
            opcheck(torch.ops.nfkernels._gaussian_log_density_backward, args, traced=traced)


def test_compile_fullgraph_keeps_the_fused_ops():
    graphs = []

    def record(graph, inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)

    def step(x, params):
        return gaussian_log_density(x, params, layout="scale_shift", logdet=gaussian_log_density(x)).sum()

    inputs = [torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 8, 3, requires_grad=True)]
    eager = torch.autograd.grad(step(*inputs), inputs)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=compiler)(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert any("_gaussian_log_density_forward" in g for g in graphs)
    assert any("_gaussian_log_density_backward" in g for g in graphs)


def test_compile_with_dynamic_shapes():
    def run(x, params):
        return gaussian_log_density(x, params, layout="shift_scale_interleaved")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        x, params = torch.randn(batch, 4, 6, requires_grad=True), torch.randn(batch, 8, 6)
        torch.testing.assert_close(compiled(x, params), run(x, params))
        compiled(x, params).sum().backward()


def test_func_transforms_and_forward_mode():
    x, params = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 8, 2, dtype=torch.float64)
    whole = gaussian_log_density(x, params)
    mapped = torch.func.vmap(lambda a, b: gaussian_log_density(a[None], b[None])[0])(x, params)
    torch.testing.assert_close(mapped, whole)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(gaussian_log_density(leaf, params).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda a: gaussian_log_density(a, params).sum())(x), slope)
    _, tangent = torch.func.jvp(lambda a: gaussian_log_density(a, params), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slope.sum((1, 2)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = gaussian_log_density(dual, params)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, slope.sum((1, 2)))
    hessian = torch.func.hessian(lambda a: gaussian_log_density(a[None]).sum())(x[0])
    torch.testing.assert_close(hessian.reshape(8, 8), -torch.eye(8, dtype=torch.float64))


def test_autocast_leaves_data_alone():
    x, params = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8).bfloat16()
    outside = gaussian_log_density(x, params)
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            inside = gaussian_log_density(x, params)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, outside)


@pytest.mark.covering
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 20), (4, 3, 40, 40)], ids=str)
def test_non_finite_values_come_through(shape, backend):
    """They stay in their sample; an infinite value has density 0, a NaN gives NaN."""
    x, params = torch.zeros(shape), torch.zeros(shape[0], 2 * shape[1], *shape[2:])
    x[1].view(-1)[-1], x[2].view(-1)[1] = math.inf, math.nan
    nothing, scaled = torch.zeros(shape[0]), params.clone()
    scaled[3].view(-1)[-1] = math.inf  # a scale that is infinite
    want = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(shape[1:])).sum()
    with use_backend(backend):
        for out in (gaussian_log_density(x), gaussian_log_density(x, params, logdet=nothing)):
            assert out[1] == -math.inf
            assert torch.isnan(out[2])
            torch.testing.assert_close(out[[0, 3]], want.expand(2))
        out = gaussian_log_density(x, scaled)
        assert out[3] == -math.inf
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(gaussian_log_density(leaf, params).sum(), leaf)
    assert torch.isnan(dx).sum() == 1
    assert torch.isinf(dx).sum() == 1


# --- errors ---------------------------------------------------------------------------------------------------------

X, P = torch.zeros(2, 4, 3), torch.zeros(2, 8, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: gaussian_log_density(torch.zeros(3))),
        ("x must be floating point", lambda: gaussian_log_density(X.long())),
        ("params must be floating point", lambda: gaussian_log_density(X, P.long())),
        ("not wider", lambda: gaussian_log_density(X, P.double())),
        (r"params must be \[2, 8, 3\]", lambda: gaussian_log_density(X, torch.zeros(2, 8, 4))),
        (r"params must be \[2, 8, 3\]", lambda: gaussian_log_density(X, torch.zeros(2, 4, 3))),
        (r"params must be \[2, 8, 3\]", lambda: gaussian_log_density(X, torch.zeros(8, 3))),
        ("unknown layout 'halves'", lambda: gaussian_log_density(X, P, layout="halves")),
        ("logdet must be", lambda: gaussian_log_density(X, logdet=torch.zeros(3))),
        ("logdet must be", lambda: gaussian_log_density(X, logdet=torch.zeros(2).double())),
        ("params is on meta", lambda: gaussian_log_density(X, P.to("meta"))),
        ("logdet is on meta", lambda: gaussian_log_density(X, logdet=torch.zeros(2, device="meta"))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
