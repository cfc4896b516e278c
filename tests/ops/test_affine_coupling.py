"""Affine coupling: every kernel against the reference in float64, invariants, gradients, transforms and errors."""

import math

import pytest
import torch
from cases import (
    IDENTITIES,
    LAYOUTS,
    MAPS,
    ORDERS,
    CouplingCase,
    all_traced,
    coupling_case,
    coupling_options,
    opcheck,
)
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from nfkernels import ScaleMap, affine_coupling, channel_mix, use_backend
from nfkernels.ops.affine_coupling import _make_form as make_form
from nfkernels.reference import affine_coupling as reference
from nfkernels.reference.affine_coupling import Form, Identity, Order

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}


def run(case, upcast=False):
    """Outputs and gradients of a fixed random loss, in the case's dtypes or all in float64."""

    def leaf(t):
        return None if t is None else (t.double() if upcast else t).detach().requires_grad_()

    torch.manual_seed(1)
    x, params, gain, logdet = (leaf(t) for t in (case.x, case.params, case.gain, case.logdet))
    y, total = affine_coupling(x, params, gain=gain, logdet=logdet, **case.options)
    gy, gl = torch.randn(y.shape).to(case.x.dtype), torch.randn(total.shape).to(logdet_dtype(case))
    inputs = [t for t in (x, params, gain, logdet) if t is not None]
    grads = torch.autograd.grad([y, total], inputs, [gy.to(y.dtype), gl.to(total.dtype)])
    return [y.detach(), total.detach(), *grads]


def logdet_dtype(case):
    return torch.float64 if case.x.dtype == torch.float64 else torch.float32


def assert_as_good_as_reference(got, plain, exact, case):
    """Error at most twice plain PyTorch's in the same dtypes, plus a few units in the last place."""
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        if not a.numel():
            continue
        assert torch.isfinite(a).all()
        scale = c.abs().max().clamp(min=1).item()
        slack = 4 * EPS[a.dtype] * scale * (1 if a.dim() > 1 else math.sqrt(case.x[0].numel() if len(case.x) else 1))
        if a.dtype in (torch.float32, torch.float64):
            slack *= 2
        worst, allowed = (a.double() - c).abs().max().item(), 2 * (b.double() - c).abs().max().item() + slack
        assert worst <= allowed, (worst, allowed, case.options)


@pytest.mark.parametrize("block", range(8))
def test_native_matches_reference(block):
    """320 points of the product of all options, forward and all gradients, against float64."""
    for point in coupling_options(320)[block::8]:
        case = coupling_case(point)
        got = run(case)
        with use_backend("reference"):
            plain, exact = run(case), run(case, upcast=True)
        assert_as_good_as_reference(got, plain, exact, case)
        assert got[0].stride() == torch.empty_like(case.x).stride()


@pytest.mark.parametrize("block", range(4))
def test_native_backward_rebuilds_the_input(block):
    """Asked for its input, the backward gives the other direction's output beside the very same gradients."""
    for point in coupling_options(160, seed=2)[block::4]:
        case = coupling_case(point)
        options = dict(case.options)
        mask, channel_map = options.pop("mask"), options.pop("channel_map")
        form, packed = make_form(**options)
        if mask is not None:
            mask = mask.expand(-1, -1, *case.x.shape[2:])
        with torch.no_grad():
            y, _ = affine_coupling(case.x, case.params, gain=case.gain, **case.options)
        dy, dlogdet = torch.randn_like(y), torch.randn(len(y), dtype=logdet_dtype(case))
        inputs = (y, case.params, dy, dlogdet, channel_map, mask, case.gain, *packed)
        *grads, x = torch.ops.nfkernels._affine_coupling_backward(*inputs, True)
        *without, nothing = torch.ops.nfkernels._affine_coupling_backward(*inputs, False)
        assert nothing.shape == (0,)
        assert all(torch.equal(a, b) for a, b in zip(grads, without, strict=True))
        assert x.stride() == torch.empty_like(y).stride()
        plain = reference.rebuild(y, case.params, channel_map, mask, case.gain, form)
        gain = None if case.gain is None else case.gain.double()
        exact = reference.rebuild(y.double(), case.params.double(), channel_map, mask, gain, form)
        assert_as_good_as_reference([x], [plain], [exact], case)


@pytest.mark.parametrize("which", range(len(MAPS)))
def test_inverse_undoes_forward(which):
    for layout, order, identity in [(a, b, c) for a in LAYOUTS[::3] for b in ORDERS for c in IDENTITIES]:
        case = coupling_case((which, layout, order, identity, False, (3, 6, 5), "contiguous", (torch.float64,) * 2))
        options = case.options | {"inverse": False}
        y, forward = affine_coupling(case.x, case.params, gain=case.gain, **options)
        x, inverse = affine_coupling(y, case.params, gain=case.gain, **(options | {"inverse": True}))
        torch.testing.assert_close(x, case.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse, -forward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", range(len(MAPS)))
def test_logdet_is_that_of_the_dense_jacobian(which):
    case = coupling_case(
        (
            which,
            "shift_scale_interleaved",
            "shift_first",
            "second",
            False,
            (1, 6, 2),
            "contiguous",
            (torch.float64,) * 2,
        )
    )

    def flat(v):
        return affine_coupling(v.view(1, 6, 2), case.params, gain=case.gain, **case.options)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, case.x.flatten())
    _, logdet = affine_coupling(case.x, case.params, gain=case.gain, **case.options)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[0], rtol=1e-9, atol=1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("which", range(len(MAPS)))
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(which, inverse):
    identity = IDENTITIES[which % 3]
    point = (
        which,
        LAYOUTS[which % 4],
        ORDERS[which % 2],
        identity,
        inverse,
        (2, 4, 1),
        "contiguous",
        (torch.float64,) * 2,
    )
    case = coupling_case(point)
    inputs = tuple(t.requires_grad_() for t in (case.x, case.params, case.gain) if t is not None)

    def f(x, params, gain=None):
        return affine_coupling(x, params, gain=gain, **case.options)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_at_scales_of_1e_9(order, backend):
    """Recovering x by a division would be off by 4 here; the gradient from the output is not."""
    raw = math.log(1e-9)
    x = torch.randn(4, 8, 16)
    params = torch.randn(4, 16, 16)
    params[:, 8:] = raw + 0.1 * torch.randn(4, 8, 16)
    inputs = [x.requires_grad_(), params.requires_grad_()]
    with use_backend(backend):
        y, logdet = affine_coupling(*inputs, scale_map="exp", order=order)
        grads = torch.autograd.grad((y.square().sum() + logdet.sum()), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    with use_backend("reference"):
        y64, l64 = affine_coupling(*wide, scale_map="exp", order=order)
        exact = torch.autograd.grad((y64.square().sum() + l64.sum()), wide)
    for got, want in zip(grads, exact, strict=True):
        bound = 4 * 1.2e-7 * (2 * y64.abs() * (y64.abs() + wide[1][:, :8].abs())).max() + 1e-6 * want.abs().max()
        assert (got.double() - want).abs().max() <= bound


def test_saved_for_backward_is_output_and_params_only():
    x, params = torch.randn(8, 6, 4, 4, requires_grad=True), torch.randn(8, 6, 4, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = affine_coupling(x, params, identity="first")
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert storages == {y.untyped_storage().data_ptr(), params.untyped_storage().data_ptr()}
    assert sum(t.nbytes for t in saved) <= y.nbytes + params.nbytes


@pytest.mark.parametrize("shape", [(70, 8), (3, 8, 5, 5), (2, 4, 200, 100)])
def test_same_bits_for_any_number_of_threads(shape):
    x, params = torch.randn(shape), torch.randn(shape)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            a, b = x.clone().requires_grad_(), params.clone().requires_grad_()
            gain = torch.ones(shape[1] // 2, requires_grad=True)
            for g in (None, gain):
                y, logdet = affine_coupling(a, b, identity="first", gain=g)
                inputs = [a, b] if g is None else [a, b, g]
                grads = torch.autograd.grad(y.square().sum() + logdet.sum(), inputs)
                outcomes.append((threads, g is None, [y, logdet, *grads]))
        finally:
            torch.set_num_threads(1)
    for _, plain, values in outcomes:
        first = next(v for _, p, v in outcomes if p == plain)
        assert all(torch.equal(a, b) for a, b in zip(first, values, strict=True))


def test_expanded_gradients_are_read_through_their_strides():
    x, params = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 5, 5, requires_grad=True)
    y, logdet = affine_coupling(x, params, identity="first")
    expanded = torch.autograd.grad(y.sum() + logdet.sum(), [x, params], retain_graph=True)
    dense = torch.autograd.grad([y, logdet], [x, params], [torch.ones_like(y), torch.ones_like(logdet)])
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_one_transformed_channel_beside_several():
    """Rows that lie end to end for the one transformed channel need not for those that pass through."""
    x, params = torch.randn(2, 3, 32, requires_grad=True), torch.randn(2, 2, 32, requires_grad=True)
    weights = torch.randn(2, 32)
    y, _ = affine_coupling(x, params, identity="first")
    dx, _ = torch.autograd.grad((y.sum(1) * weights).sum(), [x, params], retain_graph=True)
    torch.testing.assert_close(dx[:, :2], weights[:, None].expand(2, 2, 32))
    sliced = torch.randn(2, 3, 64)[..., :32]
    y, _ = affine_coupling(sliced, params, identity="first")
    torch.testing.assert_close(y[:, :2], sliced[:, :2])


def test_strided_gain_and_channel_map():
    x, params = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    channel_map = torch.tensor([2, 9, 0, 9, 1, 9])[::2]
    got = affine_coupling(x, params, gain=torch.ones(1).expand(3), channel_map=channel_map)
    want = affine_coupling(x, params, channel_map=torch.tensor([2, 0, 1]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_channels_mapped_outside_pass_through(backend):
    x, params = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    with use_backend(backend):
        y, logdet = affine_coupling(x, params, channel_map=torch.tensor([0, 7, 1]))
        assert torch.equal(y[:, 1], x[:, 1])
        torch.testing.assert_close(logdet, affine_coupling(x[:, ::2], params)[1])
        y, logdet = affine_coupling(x, params[:, :0], channel_map=torch.tensor([-1, -1, -1]))
        assert torch.equal(y, x)
        assert torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize(
    "strides", [(6, 0, 6, 2), (0, 9, 3, 1), (2, 1, 0, 0), (0, 0, 0, 0), (9, 0, 3, 1), (6, 3, 1, 0)]
)
def test_expanded_data(strides):
    x = torch.randn(64).as_strided((2, 4, 3, 3), strides).requires_grad_()
    params = torch.randn(64).as_strided((2, 4, 3, 3), strides).requires_grad_()
    y, logdet = affine_coupling(x, params, identity="first")
    grads = torch.autograd.grad(y.sin().sum() + logdet.sum(), [x, params])
    with use_backend("reference"):
        want, want_logdet = affine_coupling(x, params, identity="first")
        want_grads = torch.autograd.grad(want.sin().sum() + want_logdet.sum(), [x, params])
    for a, b in zip([y, logdet, *grads], [want, want_logdet, *want_grads], strict=True):
        torch.testing.assert_close(a, b)
    mixed = channel_mix(x, torch.eye(4))
    torch.testing.assert_close(mixed, x)


def test_only_one_output_used():
    x, params = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 8, 5, requires_grad=True)
    for pick in (0, 1):
        grads = torch.autograd.grad(affine_coupling(x, params)[pick].sum(), [x, params])
        with use_backend("reference"):
            want = torch.autograd.grad(affine_coupling(x, params)[pick].sum(), [x, params])
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b)


SPATIAL = st.one_of(
    st.lists(st.integers(1, 5), max_size=3).map(tuple), st.sampled_from([(20,), (33,), (1, 40), (17, 1)])
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
    """Hypothesis draws shapes and strides, of the gradient too."""
    spatial = data.draw(SPATIAL)
    batch, channels = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 7))
    count = data.draw(st.integers(0, channels))
    identity = data.draw(st.sampled_from(["first", "second"]))
    x, params = (draw_strided(data, (batch, c, *spatial)).requires_grad_() for c in (channels, 2 * count))
    dy = draw_strided(data, (batch, channels, *spatial))
    y, logdet = affine_coupling(x, params, identity=identity)
    grads = torch.autograd.grad([y, logdet], [x, params], [dy, torch.ones(1).expand(batch)])
    with use_backend("reference"):
        y2, logdet2 = affine_coupling(x, params, identity=identity)
        grads2 = torch.autograd.grad([y2, logdet2], [x, params], [dy, torch.ones(batch)])
    for a, b in zip([y, logdet, *grads], [y2, logdet2, *grads2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Shapes on both sides of what kernels are cut by: vectors, warps, blocks, pieces of a sample, stretches of positions.
# (shape, format of x, format of params, dtype of params, identity)
LAST, SLICED, SHIFTED = "channels_last", "sliced", "shifted"
CUTS = [
    *[((300, d), "contiguous", "contiguous", torch.float32, "first") for d in (2, 3, 7, 8, 31, 63, 64)],
    ((3000, 5), "contiguous", "contiguous", torch.float32, "second"),
    ((5, 1100), "contiguous", "contiguous", torch.float32, "first"),  # a sample takes a block
    ((4200, 600), "contiguous", "contiguous", torch.float32, "none"),  # a warp each: there are many
    ((2, 8, 64, 64), "contiguous", "contiguous", torch.float32, "first"),
    ((1, 6, 100, 96), "contiguous", "contiguous", torch.float32, "none"),  # a sample takes several blocks
    ((1, 3, 77, 79), "contiguous", "contiguous", torch.float32, "first"),  # odd in every size
    ((2, 8, 16, 16), SHIFTED, "contiguous", torch.float32, "first"),  # not at 16 bytes
    ((2, 8, 16, 16), "contiguous", SHIFTED, torch.bfloat16, "first"),
    ((2, 9, 16, 16), SLICED, SLICED, torch.float32, "second"),
    ((3, 6, 12, 12), LAST, LAST, torch.float32, "first"),  # three channels: no vectors
    ((3, 16, 12, 12), LAST, LAST, torch.float32, "second"),
    ((2, 16, 12, 12), LAST, LAST, torch.bfloat16, "none"),
    ((3, 12, 16, 16), "contiguous", LAST, torch.bfloat16, "first"),  # params across the data
    ((2, 48, 8, 8), "contiguous", LAST, torch.float32, "second"),
    ((1, 4, 40, 52), "contiguous", LAST, torch.bfloat16, "none"),  # the last stretch is short
    ((2, 12, 7, 7), "contiguous", LAST, torch.bfloat16, "first"),
    ((2, 16, 20, 20), LAST, "contiguous", torch.bfloat16, "first"),  # and the reverse
    ((2, 8, 36, 40), LAST, "contiguous", torch.float32, "none"),
    ((2, 600, 4, 4), "contiguous", LAST, torch.float32, "first"),
    ((0, 8, 64, 64), "contiguous", "contiguous", torch.float32, "none"),  # large samples, but none
    ((0, 8, 64, 64), "contiguous", LAST, torch.bfloat16, "none"),
]


def laid_out(t, fmt):
    """``t`` in another memory layout; ``shifted`` starts 4 or 2 bytes past an aligned address."""
    if fmt == LAST:
        return t.contiguous(memory_format=torch.channels_last)
    if fmt == SLICED:
        wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), float("nan"), dtype=t.dtype)
        wide[:, 2:-1] = t
        return wide[:, 2:-1]
    if fmt == SHIFTED:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


@pytest.mark.covering
@pytest.mark.parametrize("extra", ["plain", "gain", "mask"])
@pytest.mark.parametrize(("shape", "x_format", "params_format", "raw", "identity"), CUTS)
def test_sizes_on_both_sides_of_what_kernels_are_cut_by(shape, x_format, params_format, raw, identity, extra):
    batch, channels, *spatial = shape
    which = CUTS.index((shape, x_format, params_format, raw, identity))
    if extra != "plain" and shape[0] > 1000:
        batch = 70
    count = channels if identity == "none" else channels // 2
    options = {
        "scale_map": MAPS[which % len(MAPS)],
        "layout": LAYOUTS[which % 4],
        "order": ORDERS[which // 4 % 2],
        "identity": identity,
        "inverse": which % 3 == 0,
        "mask": torch.rand(batch, 1, *spatial) > 0.3 if extra == "mask" else None,
    }
    has_scale = options["scale_map"].has_scale
    x = laid_out(torch.randn(batch, channels, *spatial), x_format)
    params = laid_out(torch.randn(batch, count * (2 if has_scale else 1), *spatial).to(raw), params_format)
    gain = torch.rand(count) + 0.5 if extra == "gain" and has_scale else None
    case = CouplingCase(x, params, gain, torch.randn(batch) if which % 2 else None, options)
    got = run(case)
    with use_backend("reference"):
        plain, exact = run(case), run(case, upcast=True)
    assert_as_good_as_reference(got, plain, exact, case)


@pytest.mark.parametrize("shape", [(70, 6), (2, 8, 16, 16), (2, 6, 7, 9)])
def test_gradients_that_are_not_given_are_zero(shape):
    """The raw op takes None for a gradient that nothing asked for."""
    y, params = torch.randn(shape), torch.randn(shape)
    form = Form(ScaleMap.glow(), identity=Identity.first).pack()
    backward = torch.ops.nfkernels._affine_coupling_backward
    zero = torch.zeros(shape), torch.zeros(shape[0])
    for grads in ((None, torch.randn(shape[0])), (torch.randn(shape), None), (None, None)):
        filled = [z if g is None else g for g, z in zip(grads, zero, strict=True)]
        for a, b in zip(
            backward(y, params, *grads, None, None, None, *form, False),
            backward(y, params, *filled, None, None, None, *form, False),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


# --- PyTorch's machinery --------------------------------------------------------------------------------------------


@all_traced
@pytest.mark.parametrize("gain", [False, True])
def test_opcheck(gain, everything):
    form = Form(ScaleMap.glow(), order=Order.shift_first, identity=Identity.first).pack()
    for x, params in [
        (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)),
        (torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(2, 4, 3, 3).bfloat16()),
        (torch.randn(2, 6, 3, 3)[:, 1:5], torch.randn(2, 4, 3, 3)),
        (torch.randn(0, 4), torch.randn(0, 4)),
    ]:
        g = torch.rand(2) + 0.5 if gain else None
        traced = everything or (x.is_contiguous() and len(x) > 0)
        args = (x, params, None, None, g, torch.zeros(len(x)), *form)
        opcheck(torch.ops.nfkernels._affine_coupling_forward, args, traced=traced)
        args = (x, params, torch.randn_like(x), torch.ones(1).expand(len(x)), None, None, g, *form, False)
        opcheck(torch.ops.nfkernels._affine_coupling_backward, args, traced=traced)


def test_compile_fullgraph_keeps_the_fused_ops():
    graphs = []

    def record(graph, inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)

    def step(x, params):
        y, logdet = affine_coupling(x, params, identity="first", order="shift_first")
        return y.square().sum() - logdet.sum()

    inputs = [torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)]
    eager = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert any("_affine_coupling_forward" in g for g in graphs)
    assert any("_affine_coupling_backward" in g for g in graphs)


def test_func_transforms_and_forward_mode():
    x, params = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 8, 2, dtype=torch.float64)
    whole, _ = affine_coupling(x, params)
    mapped = torch.func.vmap(lambda a, b: affine_coupling(a[None], b[None])[0][0])(x, params)
    torch.testing.assert_close(mapped, whole)
    grad = torch.func.grad(lambda a: affine_coupling(a, params)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(affine_coupling(leaf, params)[0].square().sum(), leaf)[0])
    _, tangent = torch.func.jvp(lambda a: affine_coupling(a, params)[0], (x,), (torch.ones_like(x),))
    scale = torch.sigmoid(params[:, 4:] + 2)
    torch.testing.assert_close(tangent, scale)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, _ = affine_coupling(dual, params)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, scale)


@pytest.mark.parametrize("which", [i for i, m in enumerate(MAPS) if m.kind != "softclip"])
def test_transforms_agree_with_eager_at_zero(which):
    """Where every zero-initialised conditioner starts. (softclip has a true kink there in its second derivative.)"""
    scale_map = MAPS[which]
    x = torch.tensor([[0.7]], dtype=torch.float64)
    params = torch.zeros(1, 2 if scale_map.has_scale else 1, dtype=torch.float64)

    def loss(p):
        y, logdet = affine_coupling(x, p, scale_map=scale_map)
        return (y.square() + 0.3 * logdet[:, None]).sum()

    def slope(p):
        leaf = p.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    leaf = params.clone().requires_grad_()
    (eager,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(slope(params), eager.detach())
    torch.testing.assert_close(torch.func.grad(loss)(params), eager.detach())
    _, tangent = torch.func.jvp(loss, (params,), (torch.ones_like(params),))
    torch.testing.assert_close(tangent, eager.detach().sum())
    (second,) = torch.autograd.grad(eager.sum(), leaf)
    numeric = (slope(params + 1e-4) - slope(params - 1e-4)) / 2e-4
    torch.testing.assert_close(second, numeric, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.hessian(loss)(params).sum((0, 1)), numeric, rtol=1e-4, atol=1e-5)


def test_a_dual_cotangent_keeps_its_tangent():
    x, params = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    y, _ = affine_coupling(x, params, identity="first")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        (dx,) = torch.autograd.grad(y, x, dual)
        primal, tangent = torch.autograd.forward_ad.unpack_dual(dx)
        assert tangent is not None
        torch.testing.assert_close(tangent, primal)


@pytest.mark.parametrize("scale_map", ["glow", "realnvp", "freia", ScaleMap("tanh", clamp=1.5)])
def test_compile_with_dynamic_shapes(scale_map):
    def run(x, params):
        return affine_coupling(x, params, scale_map=scale_map, identity="first")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        x, params = torch.randn(batch, 4, 6, requires_grad=True), torch.randn(batch, 4, 6)
        for got, want in zip(compiled(x, params), run(x, params), strict=True):
            torch.testing.assert_close(got, want)
        compiled(x, params)[0].sum().backward()


def test_autocast_leaves_data_alone():
    x, params = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8).bfloat16()
    outside = affine_coupling(x, params, identity="first")
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y, logdet = affine_coupling(x, params, identity="first")
        assert y.dtype == logdet.dtype == torch.float32
        torch.testing.assert_close(y, outside[0])
        torch.testing.assert_close(logdet, outside[1])


def test_non_finite_values_come_through():
    """A NaN is never swallowed by a clamp; an infinite input does not spread to its neighbours."""
    for which in range(len(MAPS)):
        params = torch.zeros(1, 4 if MAPS[which].has_scale else 2, 20)
        params[0, -1, 3] = float("nan")
        y, logdet = affine_coupling(torch.ones(1, 2, 20), params, scale_map=MAPS[which])
        assert torch.isnan(y[0, 1, 3])
        assert torch.isfinite(y).sum() == y.numel() - 1
        assert torch.isnan(logdet).all() == MAPS[which].has_scale


# --- errors ---------------------------------------------------------------------------------------------------------

X, P = torch.zeros(2, 4, 3), torch.zeros(2, 8, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: affine_coupling(torch.zeros(3), torch.zeros(3))),
        ("floating point", lambda: affine_coupling(X.long(), P)),
        ("not wider", lambda: affine_coupling(X, P.double())),
        ("do not fit", lambda: affine_coupling(X, torch.zeros(2, 8, 4))),
        ("do not fit", lambda: affine_coupling(X, torch.zeros(2, 8))),
        ("shift and a scale", lambda: affine_coupling(X, torch.zeros(2, 7, 3))),
        ("expected 4", lambda: affine_coupling(X, torch.zeros(2, 4, 3))),
        ("at most 4", lambda: affine_coupling(X, torch.zeros(2, 10, 3), identity="first")),
        ("unknown layout 'halves'", lambda: affine_coupling(X, P, layout="halves")),
        ("unknown order", lambda: affine_coupling(X, P, order="both")),
        ("unknown identity", lambda: affine_coupling(X, P, identity="third")),
        ("unknown scale map", lambda: affine_coupling(X, P, scale_map="cubic")),
        ("mask must be bool", lambda: affine_coupling(X, P, mask=torch.ones(2, 4, 3))),
        ("mask must be bool", lambda: affine_coupling(X, P, mask=torch.ones(4, 3) > 0)),
        ("channel_map must be int64", lambda: affine_coupling(X, P, channel_map=torch.zeros(3).long())),
        ("either channel_map or", lambda: affine_coupling(X, P, identity="first", channel_map=torch.arange(4))),
        ("gain must be", lambda: affine_coupling(X, P, gain=torch.ones(3))),
        ("no scale for a gain", lambda: affine_coupling(X, X, scale_map="additive", gain=torch.ones(4))),
        ("logdet must be", lambda: affine_coupling(X, P, logdet=torch.zeros(3))),
        ("params is on meta", lambda: affine_coupling(X, P.to("meta"))),
        ("finite clamp", lambda: ScaleMap("tanh")),
        ("clamp must be positive", lambda: ScaleMap("exp", clamp=0.0)),
        ("positive gain", lambda: ScaleMap("softplus", gain=-1.0)),
        ("eps must not be negative", lambda: ScaleMap("sigmoid", eps=-1.0)),
        ("offset must be finite", lambda: ScaleMap("sigmoid", offset=float("nan"))),
        ("unknown scale map", lambda: ScaleMap("cubic")),
        ("unknown backend", lambda: use_backend("cuda").__enter__()),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
