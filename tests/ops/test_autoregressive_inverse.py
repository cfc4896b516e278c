"""Autoregressive inverse: kernels against the reference in float64 and against the definition, gradients, errors."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import MAPS, ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import Degrees, ScaleMap, Spline, autoregressive_inverse, use_backend
from nfkernels.ops import _library, rational_quadratic_spline
from nfkernels.reference import autoregressive_inverse as reference

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7}
ACTIVATIONS = ["relu", "leaky_relu", "elu", "silu", "tanh"]
NAN = float("nan")


def spread(count, passes, first=1):
    """Rising degrees of a hidden layer, as a MADE has them; ``first=0``: some units see the context alone."""
    if passes <= first:
        return (0,) * count
    return tuple(first + i * (passes - first) // max(count, 1) for i in range(count))


def network(degrees, per_feature=2, *, dtype=torch.float32, scale=0.7, bias=True):
    """Weights whose masked entries are not numbers (they must never be read), and biases."""
    weights = []
    for mask in degrees.masks(per_feature):
        w = scale * torch.randn(mask.shape, dtype=dtype) / max(mask.shape[1], 1) ** 0.5
        weights.append(torch.where(mask, w, torch.full_like(w, NAN)))
    return weights, [0.3 * torch.randn(len(w), dtype=dtype) if bias else None for w in weights]


def contexts(degrees, batch, dtype=torch.float32):
    return [0.5 * torch.randn(batch, len(layer), dtype=dtype) for layer in degrees.hidden]


def wide(v):
    if isinstance(v, (list, tuple)):
        return [wide(t) for t in v]
    return v.double() if isinstance(v, torch.Tensor) else v


def against_reference(z, weights, biases, degrees, terms=40, **options):
    """Errors at most four times those of plain PyTorch, and ``terms`` roundings (steep splines multiply them)."""
    with use_backend("native"):
        got = autoregressive_inverse(z, weights, biases, degrees, **options)
    with use_backend("reference"):
        plain = autoregressive_inverse(z, weights, biases, degrees, **options)
        options["context"] = wide(options.get("context"))
        exact = autoregressive_inverse(wide(z), wide(weights), wide(biases), degrees, **options)
    assert got[0].stride() == plain[0].stride()
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype == z.dtype
        assert a.shape == b.shape
        if a.numel():
            assert c.isfinite().all()
            slack = terms * EPS[a.dtype] * c.abs().max().clamp(min=1)
            assert (a.double() - c).abs().max() <= 4 * (b.double() - c).abs().max() + slack
    return got


def params_of(x, weights, biases, degrees, per_feature, *, context=None, act=torch.relu, residual=None, final=True):
    """The definition, in one evaluation of the masked network."""
    masks, sums = degrees.masks(per_feature), []
    for i, (w, b, mask) in enumerate(zip(weights, biases, masks, strict=True)):
        x = x @ torch.where(mask, w, 0.0).t() + (0 if b is None else b)
        if i + 1 == len(weights):
            return x
        x = x + (0 if context is None or context[i] is None else context[i])
        x = x + (sums[residual[i]] if residual is not None and residual[i] >= 0 else 0)
        sums.append(x)
        x = act(x) if final or i + 2 < len(weights) else x
    return None


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_it_undoes_a_masked_autoregressive_layer(backend):
    """A layer written out: z from x, its log-determinant from the dense Jacobian."""
    degrees = Degrees((2, 0, 3, 1), (spread(9, 4), spread(6, 4)))
    weights, biases = wide(network(degrees))
    context = wide(contexts(degrees, 5))
    x = torch.randn(5, 4, dtype=torch.float64)

    def layer(x):
        p = params_of(x, weights, biases, degrees, 2, context=context[: len(x)], act=torch.tanh).unflatten(1, (4, 2))
        return x * p[..., 0].exp() + p[..., 1]

    with use_backend(backend):
        back, logdet = autoregressive_inverse(
            layer(x), weights, biases, degrees, context=context, activation="tanh", transform="exp"
        )
    torch.testing.assert_close(back, x)
    for i in range(5):
        context_of = [c[i : i + 1] for c in context]
        p = torch.func.jacrev(
            lambda v, c=context_of: (
                lambda q: v * q[:, 0].exp() + q[:, 1]
            )(params_of(v[None], weights, biases, degrees, 2, context=c, act=torch.tanh).reshape(4, 2))
        )(x[i])  # fmt: skip
        torch.testing.assert_close(logdet[i], -torch.linalg.slogdet(p)[1])


@pytest.mark.covering
@pytest.mark.parametrize("features", [1, 2, 3, 7, 20, 33])
@pytest.mark.parametrize("widths", [(5,), (16, 16), (64, 31, 7), (8, 3, 3, 3, 3, 3, 3, 3)])
def test_native_matches_on_widths(features, widths):
    for i, (batch, dtype) in enumerate(
        itertools.product((1, 3, 16, 17, 40, 130), (torch.float32, torch.float64)),
    ):
        order = torch.randperm(features).tolist() if i % 3 else range(features)
        degrees = Degrees(order, [spread(w, features, i % 2) for w in widths])
        weights, biases = network(degrees, dtype=dtype, bias=i % 4 > 0)
        against_reference(
            torch.randn(batch, features, dtype=dtype), weights, biases, degrees,
            context=contexts(degrees, batch, dtype)[0] if i % 2 else None, activation=ACTIVATIONS[i % 5],
            transform="glow",
        )  # fmt: skip


@pytest.mark.parametrize("which", range(len(MAPS)))
def test_native_matches_on_every_map(which):
    scale_map = MAPS[which]
    degrees = Degrees((0, 1, 2, 3, 4), (spread(12, 5), spread(12, 5)))
    for order, layout, inverse in itertools.product(ORDERS, ("scale_shift", "shift_scale"), (True, False)):
        for dtype in (torch.float32, torch.float64):
            weights, biases = network(degrees, 2 if scale_map.has_scale else 1, dtype=dtype, scale=0.4)
            z = torch.randn(21, 5, dtype=dtype)
            against_reference(z, weights, biases, degrees, transform=scale_map, order=order, layout=layout,
                              inverse=inverse)  # fmt: skip


SPLINES = [
    Spline(),
    Spline.nflows(5, 2.0),
    Spline.zuko(8, 5.0),
    Spline.zuko_circular(4),
    Spline.circular(7, -2.0, 2.0),
    Spline.unit(2),
    Spline(12, derivatives="all", bottom=-2.0, top=4.0, tails="none"),
]


@pytest.mark.parametrize("which", range(len(SPLINES)))
def test_native_matches_on_splines(which):
    spline = SPLINES[which]
    degrees = Degrees((1, 2, 0, 2), (spread(12, 3), spread(9, 3)))
    for inverse, dtype, batch in itertools.product((True, False), (torch.float32, torch.float64), (5, 70)):
        weights, biases = network(degrees, spline.params_per_element, dtype=dtype)
        z = torch.randn(batch, 4, dtype=dtype).clamp(-3, 3)  # half a turn on, what is outside comes inside
        context = contexts(degrees, batch, dtype)[0]
        x, _ = against_reference(
            z, weights, biases, degrees, 1000, context=context, transform=spline, inverse=inverse, activation="elu"
        )
        if inverse:
            act = torch.nn.functional.elu
            p = params_of(x, weights, biases, degrees, spline.params_per_element, context=[context, None], act=act)
            made, _ = rational_quadratic_spline(x, p, spline=spline)
            off, turn = made - z, spline.high - spline.low
            off = torch.remainder(off + turn / 2, turn) - turn / 2 if spline.half_turn else off
            torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-3)


RESIDUALS = {
    "none": ((-1, -1, -1), True),
    "a block": ((-1, -1, 0), False),
    "two blocks": ((-1, -1, 0, -1, 2), False),
    "one source of many": ((-1, 0, 0, 0), True),
    "no last activation": ((-1, -1), False),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_matches_on_residuals(name, activation):
    residual, final = RESIDUALS[name]
    for batch, features, width in ((5, 4, 11), (70, 6, 16), (9, 1, 4)):
        degrees = Degrees(range(features), [spread(width, features)] * len(residual))
        weights, biases = network(degrees)
        z, context = torch.randn(batch, features), contexts(degrees, batch)
        context[1] = None
        options = {"context": context, "residual": residual, "final_activation": final, "activation": activation}
        x, _ = against_reference(z, weights, biases, degrees, transform="glow", **options)
        act = getattr(torch.nn.functional, activation)
        p = params_of(x, weights, biases, degrees, 2, context=context, act=act, residual=residual, final=final)
        p = p.unflatten(1, (features, 2))
        torch.testing.assert_close(x * torch.sigmoid(p[..., 0] + 2) + p[..., 1], z, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [40, 300])
def test_orderings_of_few_passes(width):
    """A coupling's two, one, and several features to a degree; units that nothing sees."""
    for i, features in enumerate(([0, 1] * 5, [0] * 7, [0, 0, 1, 2, 2, 2, 3], [3, 1, 0, 2, 3, 0])):
        passes = max(features) + 1
        hidden = [spread(width, passes, 0), spread(width - 3, passes, i % 2)]
        degrees = Degrees(features, [hidden[0], hidden[1][:-5] + (passes,) * 5])
        weights, biases = network(degrees)
        against_reference(
            torch.randn(37, len(features)), weights, biases, degrees, context=contexts(degrees, 37), transform="freia"
        )


def test_activations_keep_their_digits():
    """One unit for each of many inputs, at sums from tiny to where exponentials overflow."""
    v = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -0.01, 0.3, -0.34, -0.36, 1.0, -2.0, 20.0, -20.0, 90.0, -90.0, -120.0])
    degrees = Degrees((0,), [(0,)])
    weights, biases = [torch.zeros(1, 1), torch.ones(1, 1)], [torch.zeros(1), None]
    for activation, dtype in itertools.product(ACTIVATIONS, (torch.float32, torch.float64)):
        z = torch.zeros(len(v), 1, dtype=dtype)
        with use_backend("native"):
            x, _ = autoregressive_inverse(
                z, weights, biases, degrees, context=v[:, None].to(dtype), activation=activation, transform="additive"
            )
        want = -getattr(torch.nn.functional, activation)(v.double())
        torch.testing.assert_close(
            x[:, 0].double(), want, rtol=4 * EPS[dtype], atol=1e-30 if dtype.itemsize > 4 else 1e-37
        )


def test_networks_wider_than_a_block_holds():
    degrees = Degrees((0, 1, 2), (spread(1500, 3), spread(1500, 3)))
    weights, biases = network(degrees)
    against_reference(torch.randn(9, 3), weights, biases, degrees, transform="glow")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_network(data):
    passes = data.draw(st.integers(1, 6))
    features = data.draw(
        st.permutations([*range(passes), *data.draw(st.lists(st.integers(0, passes - 1), max_size=4))])
    )
    layers = data.draw(st.lists(st.lists(st.integers(0, passes), max_size=9).map(sorted), min_size=1, max_size=4))
    degrees = Degrees(features, layers)
    batch, dtype = data.draw(st.integers(0, 70)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    weights, biases = network(degrees, dtype=dtype)
    biases = [b if data.draw(st.booleans()) else None for b in biases]
    context = [c if data.draw(st.booleans()) else None for c in contexts(degrees, batch, dtype)]
    step = data.draw(st.integers(1, 3))
    z = torch.randn(batch, len(features) * step, dtype=dtype)[:, ::step]
    if data.draw(st.booleans()):
        z = z.t().contiguous().t()
    against_reference(
        z, weights, biases, degrees, context=context, activation=data.draw(st.sampled_from(ACTIVATIONS)),
        transform="glow", final_activation=data.draw(st.booleans()), inverse=data.draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 15, 50, 257, 1000])
def test_same_bits_for_any_number_of_threads_and_any_company(batch):
    degrees = Degrees(range(6), (spread(30, 6), spread(20, 6)))
    weights, biases = network(degrees)
    z, outcomes = torch.randn(batch, 6), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with use_backend("native"):
                outcomes.append(autoregressive_inverse(z, weights, biases, degrees, transform="glow"))
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("value", [float("inf"), NAN])
def test_what_is_not_finite_stays_in_its_row_and_after_its_feature(value):
    degrees = Degrees(range(5), (spread(10, 5), spread(10, 5)))
    weights, biases = network(degrees)
    z = torch.randn(40, 5)
    bad = z.clone()
    bad[7, 2] = value
    with use_backend("native"):
        (clean, _), (got, logdet) = (
            autoregressive_inverse(v, weights, biases, degrees, transform="glow") for v in (z, bad)
        )
    assert not got[7, 2].isfinite()
    assert logdet.isfinite().sum() >= 39
    got[7, 2:] = clean[7, 2:]
    assert torch.equal(got, clean)


# --- gradients ------------------------------------------------------------------------------------------------------


def leaves_of(degrees, batch, dtype=torch.float64, per_feature=2):
    weights, biases = network(degrees, per_feature, dtype=dtype)
    context = contexts(degrees, batch, dtype)
    z = torch.randn(batch, len(degrees.features), dtype=dtype)
    values = [z, *(w.nan_to_num() for w in weights), *biases, *context]
    return [v.requires_grad_() for v in values]


def caller(degrees, **options):
    n = len(degrees.hidden) + 1

    def call(z, *rest):
        return autoregressive_inverse(
            z, rest[:n], rest[n : 2 * n], degrees, context=rest[2 * n :], activation="tanh", **options
        )

    return call


GRADIENTS = [
    (Degrees((1, 0, 2), (spread(5, 3, 0), spread(4, 3))), {"transform": "glow"}),
    (Degrees((0, 1, 0), (spread(3, 2), spread(3, 2), spread(3, 2))),
     {"transform": "freia", "order": "shift_first", "residual": (-1, -1, 0), "final_activation": False}),
    (Degrees((0, 0), (spread(3, 1),)), {"transform": "exp", "inverse": False, "layout": "shift_scale"}),
    (Degrees((0, 1), (spread(3, 2),)), {"transform": ScaleMap("softplus", eps=1e-3)}),
    (Degrees((0, 1, 2), (spread(3, 3),)), {"transform": Spline(3)}),
]  # fmt: skip


@pytest.mark.parametrize("which", range(len(GRADIENTS)))
def test_gradcheck(which):
    degrees, options = GRADIENTS[which]
    leaves = leaves_of(degrees, 2, per_feature=getattr(options["transform"], "params_per_element", 2))
    assert torch.autograd.gradcheck(caller(degrees, **options), leaves)
    assert torch.autograd.gradgradcheck(caller(degrees, **options), leaves, fast_mode=True)


def test_gradients_match_the_passes():
    """The implicit gradient against autograd through every pass, both in float32, for what is needed alone."""
    degrees = Degrees((3, 0, 1, 2, 4, 5), (spread(16, 6), spread(16, 6)))
    call = caller(degrees, transform="glow")
    for seed in range(12):
        torch.manual_seed(seed)
        leaves = [v.detach().requires_grad_(bool(torch.rand(()) < 0.6)) for v in leaves_of(degrees, 30, torch.float32)]
        if not any(v.requires_grad for v in leaves):
            continue
        pick = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)][seed % 3]
        exact = [v.detach().double().requires_grad_(v.requires_grad) for v in leaves]
        for values in (leaves, exact):
            with use_backend("native" if values is leaves else "reference"):
                x, logdet = call(*values)
            used = [t for t, p in zip((x.sin().sum(), logdet.square().sum()), pick, strict=True) if p]
            sum(used).backward()
        for v, e in zip(leaves, exact, strict=True):
            assert (v.grad is None) == (not v.requires_grad)
            if v.grad is not None:
                torch.testing.assert_close(v.grad.double(), e.grad, rtol=1e-4, atol=1e-4)


def test_what_the_mask_hides_has_no_gradient():
    degrees = Degrees(range(4), (spread(8, 4), spread(8, 4)))
    weights, biases = network(degrees)
    weights = [w.requires_grad_() for w in weights]  # NaN where masked
    x, logdet = autoregressive_inverse(torch.randn(6, 4), weights, biases, degrees, transform="glow")
    (x.square().sum() + logdet.sum()).backward()
    for w, mask in zip(weights, degrees.masks(2), strict=True):
        assert w.grad[mask].abs().sum() > 0
        assert (w.grad[~mask] == 0).all()


# --- around the op --------------------------------------------------------------------------------------------------


def test_nothing_in_an_empty_batch():
    degrees = Degrees(range(3), (spread(4, 3),))
    weights, biases = network(degrees)
    x, logdet = against_reference(torch.zeros(0, 3), weights, biases, degrees)
    assert (x.shape, logdet.shape) == ((0, 3), (0,))


def test_other_types_are_cast():
    degrees = Degrees(range(3), (spread(6, 3),))
    weights, biases = network(degrees)
    narrow = [[t.bfloat16() for t in ts] for ts in (weights, biases)]
    z = torch.randn(7, 3)
    want = autoregressive_inverse(z, *([t.float() for t in ts] for ts in narrow), degrees)
    for a, b in zip(autoregressive_inverse(z, *narrow, degrees), want, strict=True):
        assert torch.equal(a, b)
    x, logdet = autoregressive_inverse(z.bfloat16(), weights, biases, degrees)
    assert (x.dtype, logdet.dtype) == (torch.bfloat16, torch.float32)
    want = autoregressive_inverse(z.bfloat16().float(), weights, biases, degrees)
    assert torch.equal(x, want[0].bfloat16())
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            got = autoregressive_inverse(z, weights, biases, degrees)
        torch.testing.assert_close(got, autoregressive_inverse(z, weights, biases, degrees))


def raw_arguments(batch=5):
    degrees = Degrees((0, 2, 1), (spread(6, 3), spread(6, 3)))
    weights, biases = network(degrees)
    z = torch.randn(batch, 3)
    weights = [w.nan_to_num() for w in weights]
    return (z, weights, [None, *biases[1:]], [contexts(degrees, batch)[0], None], degrees.table(z), 3, 1, [-1, 0], True,
            [0, 3 << 4 | 2], [1.0, 0.0, 1.0, float("inf"), 0.0])  # fmt: skip


def test_opcheck():
    torch.library.opcheck(torch.ops.nfkernels._autoregressive_inverse_forward, raw_arguments())


def test_raw_op_refuses_a_table_that_does_not_fit():
    op, args = _library._state.ops["_autoregressive_inverse_forward"], raw_arguments()
    if "emulated" in str(_library._module("nfkernels._C")[0]):
        pytest.skip("a GPU's table is not looked at")
    for at, number in ((3, 9), (4, 3), (9, 99), (8, 5)):
        table = args[4].clone()
        table[at] = number
        with pytest.raises(RuntimeError, match="table of degrees"):
            op.on("native", *args[:4], table, *args[5:])


@pytest.mark.parametrize("needs", [False, True])
def test_compile_fullgraph_equals_eager(needs):
    degrees = Degrees((1, 0, 2), (spread(5, 3), spread(4, 3)))
    call = caller(degrees, transform="glow")

    def step(*leaves):
        x, logdet = call(*leaves)
        return x.sin().sum() + logdet.sum()

    leaves = [v.detach().requires_grad_(needs) for v in leaves_of(degrees, 6)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), step(*leaves))
    if needs:
        got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_func_transforms_and_forward_mode():
    degrees = Degrees((1, 0, 2), (spread(5, 3), spread(4, 3)))
    z, *rest = (v.detach() for v in leaves_of(degrees, 4))
    rest = [*rest[:6], *(c[:1] for c in rest[6:])]
    call = caller(degrees, transform="glow")
    x, logdet = call(z, *rest[:6], *(c.expand(4, -1) for c in rest[6:]))
    mapped = torch.func.vmap(lambda v: call(v[None], *rest))(z)
    torch.testing.assert_close(mapped[0][:, 0], x)
    torch.testing.assert_close(mapped[1][:, 0], logdet)
    for i in range(4):
        jacobian = torch.func.jacfwd(lambda v: call(v[None], *rest)[0][0])(z[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[i])


def test_shapes_on_a_device_that_holds_none():
    degrees = Degrees((1, 0, 2), (spread(5, 3),))
    weights, biases = network(degrees)
    with torch.device("meta"):
        z = torch.empty(6, 3)
    x, logdet = autoregressive_inverse(z, [w.to("meta") for w in weights], [b.to("meta") for b in biases], degrees)
    assert (x.shape, x.device.type, logdet.shape) == ((6, 3), "meta", (6,))


def test_degrees_are_plain_data():
    degrees = Degrees([1, 0], [[0, 1]])
    table = degrees.table(torch.zeros(1))
    assert table.tolist() == [0, 1, 2, 1, 0, 0, 1, 2]
    assert degrees.table(torch.zeros(1)) is table
    for other in (pickle.loads(pickle.dumps(degrees)), copy.deepcopy(degrees), Degrees((1, 0), ((0, 1),))):
        assert other == degrees
        assert hash(other) == hash(degrees)
        assert other.table(torch.zeros(1)).tolist() == table.tolist()
    found = reference.degrees_of(table, 2, [2], 2)
    assert [d.tolist() for d in found] == [[1, 0], [0, 1]]


D = Degrees((0, 1), ((0, 1, 1), (0, 1, 1)))
W, B = [torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(4, 3)], [torch.zeros(3), None, torch.zeros(4)]
Z = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("without a gap", lambda: Degrees((0, 2), ((0,),))),
        ("hidden layer 1 must rise", lambda: Degrees((0, 1), ((0,), (1, 0)))),
        ("1 to 8 hidden layers", lambda: Degrees((0, 1), ())),
        (r"z must be \[B, D\]", lambda: autoregressive_inverse(Z[0], W, B, D)),
        ("z must be floating point", lambda: autoregressive_inverse(Z.long(), W, B, D)),
        ("z has 3 features", lambda: autoregressive_inverse(torch.zeros(5, 3), W, B, D)),
        ("go with 3 weights", lambda: autoregressive_inverse(Z, W[:2], B, D)),
        (r"weights\[1\] must be \[3, 3\]", lambda: autoregressive_inverse(Z, [W[0], W[0], W[2]], B, D)),
        (r"weights\[2\] must be \[2, 3\]", lambda: autoregressive_inverse(Z, W, B, D, transform="additive")),
        (r"biases\[0\] must be \[3\]", lambda: autoregressive_inverse(Z, W, [B[2], None, B[2]], D)),
        (r"context\[0\] must be \[5, 3\]", lambda: autoregressive_inverse(Z, W, B, D, context=torch.zeros(4, 3))),
        ("context must have an entry", lambda: autoregressive_inverse(Z, W, B, D, context=[None])),
        ("floating point, got torch.int64", lambda: autoregressive_inverse(Z, [W[0].long(), *W[1:]], B, D)),
        ("is on meta", lambda: autoregressive_inverse(Z, [W[0].to("meta"), *W[1:]], B, D)),
        (r"residual\[1\] must be -1", lambda: autoregressive_inverse(Z, W, B, D, residual=(-1, 1))),
        (
            "must have the same degrees",
            lambda: autoregressive_inverse(Z, W, B, Degrees((0, 1), ((0, 1, 1), (0, 0, 1))), residual=(-1, 0)),
        ),
        ("unknown activation 'gelu'", lambda: autoregressive_inverse(Z, W, B, D, activation="gelu")),
        ("unknown layout 'halves'", lambda: autoregressive_inverse(Z, W, B, D, layout="halves")),
        ("unknown order", lambda: autoregressive_inverse(Z, W, B, D, order="last")),
        ("unknown scale map", lambda: autoregressive_inverse(Z, W, B, D, transform="exp2")),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
