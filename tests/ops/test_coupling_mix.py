"""Coupling mix: every backend against the reference in float64, against its two ops, invariants, transforms, errors."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, MAPS, ORDERS, all_traced, opcheck, tensor
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from nfkernels import ConditionerInput, ScaleMap, affine_coupling, channel_mix, coupling_mix, use_backend
from nfkernels.ops import _library
from nfkernels.ops.coupling_mix import LIMIT
from nfkernels.reference.affine_coupling import Form, Identity, Order

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
SHAPES = [
    (3, 5, 7, 11), (4, 6, 4, 4), (2, 8, 16, 16), (70, 5), (3, 4, 13), (0, 4, 3), (2, 4, 0), (1, 2, 1, 1), (2, 7),
    (1, 2, 160, 130), (2, 12, 16, 16), (2, 24, 8, 8), (3, 33, 5), (2, 48, 8, 8), (2, 64, 7, 3), (9, 16),
]  # fmt: skip
FORMATS = ["contiguous", "channels_last", "mixed", "sliced"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64), (BF16, BF16), (F16, F32)]  # data, params
EXTRA_DTYPES = [None, F32, F64, BF16, F16]
POINTS = list(
    itertools.product(
        range(len(MAPS)), LAYOUTS, ORDERS, ["none", "first", "second"], SHAPES, FORMATS, DTYPES, EXTRA_DTYPES,
        [False, True], [False, True],
    )
)  # fmt: skip


def well_conditioned(channels, dtype=F32):
    """An orthogonal matrix, its columns stretched by 0.7 to 1.3."""
    q = torch.linalg.qr(torch.randn(channels, channels, dtype=F64))[0]
    return (q * (0.7 + 0.6 * torch.rand(channels, dtype=F64))).to(dtype).contiguous()


def case(point):
    """Inputs by name, options, gradients of the outputs."""
    which, layout, order, identity, shape, fmt, (data, raw), extra, biased, given_inverse = point
    draw = random.Random(repr(point))
    torch.manual_seed(draw.randrange(2**31))
    batch, channels, *spatial = shape
    compute = F64 if data == F64 else F32
    scale_map = MAPS[which]
    count = channels if identity == "none" else draw.choice([channels // 2, channels // 2, draw.randint(0, channels)])
    width = count * (2 if scale_map.has_scale else 1)
    inputs = {
        "x": tensor(batch, channels, tuple(spatial), data, "contiguous" if fmt == "mixed" else fmt),
        "params": tensor(batch, width, tuple(spatial), raw, "channels_last" if fmt == "mixed" else fmt),
        "weight": well_conditioned(channels, compute),
    }
    if biased:
        inputs["bias"] = torch.randn(channels, dtype=compute)
    if scale_map.has_scale and draw.random() < 0.3:
        inputs["gain"] = torch.rand(count, dtype=compute) + 0.5
    if draw.random() < 0.5:
        inputs["logdet"] = torch.randn(batch, dtype=compute)
    options = {"scale_map": scale_map, "layout": layout, "order": order, "identity": identity}
    if extra is not None:
        start = draw.randrange(channels)
        options["extra"] = ConditionerInput(start, draw.randint(1, channels - start), extra, draw.random() < 0.5)
    if given_inverse:
        options["inverse_weight"] = torch.linalg.inv(inputs["weight"])
    gradients = [tensor(batch, channels, tuple(spatial), data, "contiguous" if fmt == "mixed" else fmt)]
    gradients.append(torch.randn(batch, dtype=compute))
    if extra is not None:
        gradients.append(torch.randn(batch, options["extra"].count, *spatial).to(extra))
    if draw.random() < 0.2:
        gradients[draw.randrange(len(gradients))] = None
    return inputs, options, gradients


def run(inputs, options, gradients, upcast=False):
    """Outputs, and the gradients that these gradients of theirs give; in the case's dtypes or all in float64."""
    if upcast:
        inputs = {k: v.double() for k, v in inputs.items()}
        gradients = [None if g is None else g.double() for g in gradients]
        if "extra" in options:
            options = options | {"extra": replace(options["extra"], dtype=F64)}
        if "inverse_weight" in options:
            options = options | {"inverse_weight": torch.linalg.inv(inputs["weight"])}
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = coupling_mix(**leaves, **options)
    used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True)
    named = dict(zip(("z", "logdet", "part"), (o.detach() for o in outputs), strict=False))
    return named | {f"d{k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}


def assert_as_good_as_reference(got, plain, exact, inputs):
    """Error at most twice plain PyTorch's in the same dtypes, plus a few units in the last place."""
    assert got.keys() == plain.keys() == exact.keys()
    x = inputs["x"]
    for name in got:
        a, b, c = got[name], plain[name], exact[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if not a.numel():
            continue
        assert torch.isfinite(a).all(), name
        # The longest sum behind an element, and cond(weight) < 2 for the data that the backward finds again.
        terms = x.shape[1] if a.dim() > 1 and name != "dweight" else max(x.numel() // x.shape[1], x[:1].numel(), 1)
        eps = max(EPS[a.dtype], EPS[x.dtype] if name == "part" else 0)  # a wider copy of z is no better than z
        slack = 8 * eps * c.abs().max().clamp(min=1).item() * terms**0.5
        worst, allowed = (a.double() - c).abs().max().item(), 2 * (b.double() - c).abs().max().item() + slack
        assert worst <= allowed, (name, worst, allowed)


@pytest.mark.parametrize("block", range(8))
def test_native_matches_reference(block):
    """240 points of the product of all options, forward and all gradients, against float64."""
    for point in random.Random(0).sample(POINTS, 240)[block::8]:
        inputs, options, gradients = case(point)
        got = run(inputs, options, gradients)
        with use_backend("reference"):
            plain, exact = run(inputs, options, gradients), run(inputs, options, gradients, upcast=True)
        assert_as_good_as_reference(got, plain, exact, inputs)
        assert got["z"].stride() == torch.empty_like(inputs["x"]).stride()
        if "extra" in options:
            e = options["extra"]
            assert torch.equal(got["part"], got["z"].narrow(1, e.start, e.count).to(e.dtype))
            rows = got["part"].movedim(1, -1) if e.channels_last else got["part"]
            assert rows.is_contiguous()


@pytest.mark.parametrize("channels", [5, 24, LIMIT, LIMIT + 1])
def test_is_the_coupling_and_then_the_mix(channels):
    """Up to the limit from one kernel, above from two."""
    x = torch.randn(3, channels, 6, requires_grad=True)
    params = torch.randn(3, 2 * (channels // 2), 6, requires_grad=True)
    weight, bias = well_conditioned(channels).requires_grad_(), torch.randn(channels, requires_grad=True)
    inputs = (x, params, weight, bias)
    wanted = ConditionerInput(1, 3, BF16, channels_last=True)
    z, logdet, part = coupling_mix(x, params, weight, bias, extra=wanted)
    y, plain_logdet = affine_coupling(x, params, identity="first")
    plain = channel_mix(y, weight, bias)
    plain_part = plain[:, 1:4].bfloat16()
    torch.testing.assert_close(z, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet, plain_logdet)
    assert part.movedim(1, -1).is_contiguous()
    torch.testing.assert_close(part, plain_part)

    def loss(z, logdet, part):
        return (z * z.detach().cos()).sum() - logdet.sum() + part.float().sum()

    got = torch.autograd.grad(loss(z, logdet, part), inputs)
    want = torch.autograd.grad(loss(plain, plain_logdet, plain_part), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", range(len(MAPS)))
def test_logdet_and_the_mixs_are_that_of_the_dense_jacobian(which):
    scale_map, order = MAPS[which], ORDERS[which % 2]
    x, weight = torch.randn(1, 4, 2, dtype=F64), well_conditioned(4, F64)
    params = torch.randn(1, 4 if scale_map.has_scale else 2, 2, dtype=F64)

    def flat(v):
        return coupling_mix(v.view(1, 4, 2), params, weight, scale_map=scale_map, order=order)[0].flatten()

    _, logdet = coupling_mix(x, params, weight, scale_map=scale_map, order=order)
    total = logdet[0] + 2 * torch.linalg.slogdet(weight)[1]
    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], total, rtol=1e-9, atol=1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("which", range(0, len(MAPS), 2))
@pytest.mark.parametrize("given_inverse", [False, True])
def test_gradcheck(which, given_inverse):
    """First and second derivatives, of the weight too: there the inverse is a function of it, given or not."""
    scale_map, identity = MAPS[which], ("first", "second")[which // 2 % 2]
    x, weight, bias = torch.randn(2, 3, 2, dtype=F64), well_conditioned(3, F64), torch.randn(3, dtype=F64)
    count = 2 if identity == "second" else 1
    params = torch.randn(2, count * (2 if scale_map.has_scale else 1), 2, dtype=F64)
    gain = (torch.rand(count, dtype=F64) + 0.5,) if scale_map.has_scale else ()

    def f(x, params, weight, bias, *gain):
        return coupling_mix(
            x, params, weight, bias, scale_map=scale_map, identity=identity, order=ORDERS[which // 2 % 2],
            gain=gain[0] if gain else None, extra=ConditionerInput(1, 2, F64),
            inverse_weight=torch.linalg.inv(weight).detach() if given_inverse else None,
        )  # fmt: skip

    inputs = tuple(t.requires_grad_() for t in (x, params, weight, bias, *gain))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4, fast_mode=True)


def test_only_the_needed_gradients_are_made():
    made = []
    op = _library._state.ops["_coupling_mix_backward"]
    original = op.reference
    op.reference = lambda *a: made.append(original(*a)) or made[-1]
    try:
        with use_backend("reference"):
            for needed in itertools.product([False, True], repeat=4):
                if not any(needed):
                    continue
                inputs = torch.randn(2, 4, 5), torch.randn(2, 4, 5), well_conditioned(4), torch.randn(4)
                leaves = [t.requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
                coupling_mix(*leaves)[0].square().sum().backward()
                assert tuple(t.grad is not None for t in leaves) == needed
                _, _, dweight, dbias, dgain, x = made[-1]
                assert (dweight.numel() > 0, dbias.numel() > 0, dgain.numel(), x.numel()) == (*needed[2:], 0, 0)
    finally:
        op.reference = original


def test_the_inverse_that_is_given_is_used_and_gets_no_gradient():
    x, params, weight = torch.randn(2, 4, 5), torch.randn(2, 4, 5, requires_grad=True), well_conditioned(4)
    inverse = torch.linalg.inv(weight)

    def gradient(inverse):
        return torch.autograd.grad(coupling_mix(x, params, weight, inverse_weight=inverse)[0].sum(), params)[0]

    torch.testing.assert_close(gradient(inverse), gradient(None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gradient(2 * inverse), gradient(None), rtol=1e-2)
    leaf = inverse.clone().requires_grad_()
    z, _ = coupling_mix(x, params, weight, inverse_weight=leaf)
    assert torch.autograd.grad(z.sum(), leaf, allow_unused=True) == (None,)


def test_the_backwards_error_is_cond_weight_times_the_roundings():
    """What the docstring promises of an ill-conditioned weight: dparams from y, found again as W^-1 z."""
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0] for _ in range(2))
    for condition in (1.0, 1e2, 1e4):
        weight = left @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), 6, dtype=F64)) @ right
        x, params = torch.randn(4, 6, 32), torch.randn(4, 6, 32)
        grads = []
        for dtype in (F32, F64):
            leaf = params.to(dtype).requires_grad_()
            z, logdet = coupling_mix(x.to(dtype), leaf, weight.to(dtype))
            grads.append(torch.autograd.grad(z.sum() + logdet.sum(), leaf)[0])
        error = (grads[0].double() - grads[1]).abs().max()
        assert error <= 32 * EPS[F32] * condition * (1 + x.abs().max()) * (1 + params.abs().max())


def test_saved_for_backward_is_output_params_and_the_small_tensors():
    x, params = torch.randn(8, 6, 4, 4, requires_grad=True), torch.randn(8, 6, 4, 4, requires_grad=True)
    weight, bias, gain = well_conditioned(6).requires_grad_(), torch.randn(6, requires_grad=True), torch.ones(3)
    inverse, saved = torch.linalg.inv(weight.detach()).contiguous(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z, _, part = coupling_mix(
            x, params, weight, bias, gain=gain, inverse_weight=inverse, extra=ConditionerInput(0, 3, BF16)
        )
    kept = {t.untyped_storage().data_ptr() for t in saved}
    assert kept == {t.untyped_storage().data_ptr() for t in (z, params, weight, inverse, bias, gain)}
    assert not kept & {t.untyped_storage().data_ptr() for t in (x, part)}


@pytest.mark.parametrize("shape", [(70, 8), (3, 8, 5, 5), (2, 4, 200, 100), (2, 48, 16, 16)])
def test_same_bits_for_any_number_of_threads(shape):
    x, params, weight = torch.randn(shape), torch.randn(shape), well_conditioned(shape[1])
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, params, weight, torch.ones(shape[1]))]
            gain = torch.ones(shape[1] // 2, requires_grad=True)
            z, logdet = coupling_mix(*leaves, gain=gain, inverse_weight=torch.eye(shape[1]))
            outcomes.append([z, logdet, *torch.autograd.grad(z.square().sum() + logdet.sum(), [*leaves, gain])])
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_raw_backward_rebuilds_the_input(channels, inverse):
    """An inverse coupling serves the raw ops too."""
    x, params = torch.randn(3, channels, 9, dtype=F64), torch.randn(3, 2 * (channels // 2), 9, dtype=F64)
    weight, bias = well_conditioned(channels, F64), torch.randn(channels, dtype=F64)
    gain = torch.rand(channels // 2, dtype=F64) + 0.5
    form = Form(ScaleMap.nflows(), order=Order.shift_first, identity=Identity.second, inverse=inverse).pack()
    ops = torch.ops.nfkernels
    z, _, _ = ops._coupling_mix_forward(x, params, weight, bias, gain, None, *form, 0, 0, 0, False)
    back = torch.linalg.inv(weight).contiguous()
    args = (z, params, weight, back, bias, torch.randn_like(z), None, None, gain, *form, 0)
    full = ops._coupling_mix_backward(*args, True, True, True)
    torch.testing.assert_close(full[5], x, rtol=1e-9, atol=1e-9)
    lean = ops._coupling_mix_backward(*args, False, False, False)
    for i, (a, b) in enumerate(zip(lean, full, strict=True)):
        if i in (2, 3, 5):
            assert a.shape == (0,)
        else:
            torch.testing.assert_close(a, b)


def draw_strided(data, shape):
    """A tensor of this shape whose axes are permuted, stepped or expanded."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    expanded = [n > 1 and data.draw(st.integers(0, 5)) == 0 for n in shape]
    sizes = [1 if e else n * s for n, s, e in zip(shape, steps, expanded, strict=True)]
    wide = torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    return wide[tuple(slice(None, None, 1 if e else s) for s, e in zip(steps, expanded, strict=True))].expand(shape)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    spatial = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
    batch, channels = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    count = data.draw(st.integers(0, channels))
    identity = data.draw(st.sampled_from(["first", "second"]))
    wanted = ConditionerInput(0, data.draw(st.integers(1, channels)), channels_last=data.draw(st.booleans()))
    x, params, dz, dpart = (
        draw_strided(data, (batch, c, *spatial)) for c in (channels, 2 * count, channels, wanted.count)
    )
    inputs = [x, params, well_conditioned(channels)]

    def results():
        leaves = [t.detach().requires_grad_() for t in inputs]
        z, logdet, part = coupling_mix(*leaves, identity=identity, extra=wanted)
        return [z, logdet, part, *torch.autograd.grad([z, part], leaves, [dz, dpart])]

    got = results()
    with use_backend("reference"):
        want = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- PyTorch's machinery --------------------------------------------------------------------------------------------


@all_traced
@pytest.mark.parametrize("extra", [(0, 0, 0, False), (1, 3, 2, True), (0, 2, 0, False), (2, 1, 1, True)])
def test_opcheck(extra, everything):
    form = Form(ScaleMap.glow(), order=Order.shift_first, identity=Identity.first).pack()
    for x, params in [
        (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)),
        (torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(2, 4, 3, 3).bfloat16()),
        (torch.randn(2, 6, 3, 3)[:, 1:5], torch.randn(2, 4, 3, 3)),
        (torch.randn(0, 4), torch.randn(0, 4)),
    ]:
        weight, bias, gain = well_conditioned(4), torch.randn(4), torch.rand(2) + 0.5
        args = (x, params, weight, bias, gain, torch.zeros(len(x)), *form, *extra)
        traced = everything or (x.is_contiguous() and len(x) > 0)
        opcheck(torch.ops.nfkernels._coupling_mix_forward, args, traced=traced)
        dextra = torch.randn(len(x), extra[1], *x.shape[2:]) if extra[1] else None
        args = (x, params, weight, weight, bias, torch.randn_like(x), torch.ones(1).expand(len(x)), dextra)
        for some_gain, flags in ((gain, (True, True, False)), (None, (False, True, True))):
            args_of_one = (*args, some_gain, *form, extra[0], *flags)
            opcheck(torch.ops.nfkernels._coupling_mix_backward, args_of_one, traced=traced)


def test_compile_fullgraph_keeps_the_fused_ops():
    graphs = []

    def record(graph, inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)

    def step(x, params, weight, bias):
        z, logdet, part = coupling_mix(x, params, weight, bias, order="shift_first", extra=ConditionerInput(0, 2, BF16))
        return z.square().sum() - logdet.sum() + part.float().sin().sum()

    inputs = [
        t.requires_grad_() for t in (torch.randn(2, 4, 3), torch.randn(2, 4, 3), well_conditioned(4), torch.randn(4))
    ]
    eager = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        torch.testing.assert_close(a, b)
    assert any("_coupling_mix_forward" in g for g in graphs)
    assert any("_coupling_mix_backward" in g for g in graphs)


@pytest.mark.parametrize("scale_map", ["glow", ScaleMap("tanh", clamp=1.5)])
def test_compile_with_dynamic_shapes(scale_map):
    wanted, weight = ConditionerInput(1, 2, BF16, channels_last=True), well_conditioned(4)

    def step(x, params, weight):
        return coupling_mix(x, params, weight, scale_map=scale_map, extra=wanted)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        x, params = torch.randn(batch, 4, 6, requires_grad=True), torch.randn(batch, 4, 6)
        for got, want in zip(compiled(x, params, weight), step(x, params, weight), strict=True):
            torch.testing.assert_close(got, want)
        compiled(x, params, weight)[0].sum().backward()
        assert x.grad.isfinite().all()


def test_func_transforms_and_forward_mode():
    x, params, weight = torch.randn(3, 4, 2, dtype=F64), torch.randn(3, 4, 2, dtype=F64), well_conditioned(4, F64)
    wanted = ConditionerInput(0, 2, F64, channels_last=True)
    whole = coupling_mix(x, params, weight, extra=wanted)
    mapped = torch.func.vmap(lambda a, b: coupling_mix(a[None], b[None], weight, extra=wanted))(x, params)
    for a, b in zip(mapped, whole, strict=True):
        torch.testing.assert_close(a.squeeze(1), b)

    def loss(w):
        z, logdet, part = coupling_mix(x, params, w, extra=wanted)
        return z.square().sum() + logdet.sum() + part.sin().sum()

    leaf = weight.clone().requires_grad_()
    (eager,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), eager)
    direction = torch.randn_like(weight)
    torch.testing.assert_close(torch.func.jvp(loss, (weight,), (direction,))[1], (eager * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(weight, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (eager * direction).sum())


def test_autocast_leaves_data_alone():
    x, params, weight = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8).bfloat16(), well_conditioned(4)
    outside = coupling_mix(x, params, weight)
    for backend in (None, "reference"):
        with use_backend(backend) if backend else torch.no_grad(), torch.autocast("cpu", BF16):
            z, logdet = coupling_mix(x, params, weight)
        assert z.dtype == logdet.dtype == F32
        torch.testing.assert_close(z, outside[0])
        torch.testing.assert_close(logdet, outside[1])


def test_non_finite_values_stay_in_their_place():
    for which, value in itertools.product(range(len(MAPS)), (float("nan"), float("inf"))):
        params = torch.zeros(2, 4 if MAPS[which].has_scale else 2, 20)
        params[0, 0, 3] = value
        z, _ = coupling_mix(torch.ones(2, 4, 20), params, torch.ones(4, 4), scale_map=MAPS[which])
        assert not torch.isfinite(z[0, :, 3]).any()
        assert torch.isfinite(z).sum() == z.numel() - 4


@pytest.mark.parametrize("singular", ["given", "made"])
def test_a_singular_weight_gives_gradients_that_are_not_finite(singular):
    """No error, and so no question to the device."""
    weight = torch.ones(4, 4)
    inverse = torch.full((4, 4), torch.inf) if singular == "given" else None
    params = torch.randn(2, 4, 3, requires_grad=True)
    z, _ = coupling_mix(torch.randn(2, 4, 3), params, weight, inverse_weight=inverse)
    assert not torch.autograd.grad(z.sum(), params)[0].isfinite().all()


# --- errors ---------------------------------------------------------------------------------------------------------

X, P, W = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), torch.eye(4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: coupling_mix(torch.zeros(3), torch.zeros(3), W)),
        ("floating point", lambda: coupling_mix(X.long(), P, W)),
        ("do not fit", lambda: coupling_mix(X, torch.zeros(2, 4, 4), W)),
        ("at most 4", lambda: coupling_mix(X, torch.zeros(2, 10, 3), W)),
        ("expected 4", lambda: coupling_mix(X, P, W, identity="none")),
        ("unknown order", lambda: coupling_mix(X, P, W, order="both")),
        ("unknown scale map", lambda: coupling_mix(X, P, W, scale_map="cubic")),
        ("gain must be", lambda: coupling_mix(X, P, W, gain=torch.ones(3))),
        ("logdet must be", lambda: coupling_mix(X, P, W, logdet=torch.zeros(3))),
        (r"weight must be \[4, 4\]", lambda: coupling_mix(X, P, torch.eye(3))),
        (r"bias must be \[4\]", lambda: coupling_mix(X, P, W, torch.zeros(3))),
        ("weight is on meta", lambda: coupling_mix(X, P, W.to("meta"))),
        (r"inverse_weight must be \[4, 4\]", lambda: coupling_mix(X, P, W, inverse_weight=torch.eye(3))),
        ("inverse_weight is on meta", lambda: coupling_mix(X, P, W, inverse_weight=W.to("meta"))),
        ("channels 3 to 5 of z, which has 4", lambda: coupling_mix(X, P, W, extra=ConditionerInput(3, 2))),
        ("channels -1 to 1", lambda: coupling_mix(X, P, W, extra=ConditionerInput(-1, 2))),
        ("channels 2 to 2", lambda: coupling_mix(X, P, W, extra=ConditionerInput(2, 0))),
        ("extra.dtype must be", lambda: coupling_mix(X, P, W, extra=ConditionerInput(0, 2, torch.int8))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
