"""LU linear: kernels and routes against the reference in float64, round trips, gradients, transforms, errors."""

import itertools

import pytest
import torch
from cases import all_traced, opcheck, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import lu_linear, use_backend
from nfkernels.ops import _library
from nfkernels.ops._layout import canonical

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
NAMES = ("lower", "upper", "log_s", "bias")
WIDTHS = [1, 2, 3, 5, 12, 31, 32, 33, 48, 64, 67, 100, 128, 129, 200]
COLUMNS = {
    "rows cross samples": (3, (151,), "contiguous"),
    "wide rows": (2, (16, 16), "contiguous"),
    "channels last": (2, (10, 14), "channels_last"),
    "sliced": (2, (7, 13), "sliced"),
    "table": (301, (), "contiguous"),
    "sliced table": (37, (), "sliced"),
    "one column": (1, (1,), "contiguous"),
}


def compute_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def factors(width, dtype=torch.float32, *, diagonal="exp", spread=0.3, bias=True, permuted=True):
    """Well-conditioned factors whose unread halves are not numbers, and the options that go with them."""
    scale = 0.5 / max(width, 1) ** 0.5
    strict = torch.ones(width, width, dtype=torch.bool).tril(-1)
    nan = torch.full((width, width), float("nan"), dtype=dtype)
    lower = torch.where(strict, scale * torch.randn(width, width, dtype=dtype), nan)
    upper = torch.where(strict.t(), scale * torch.randn(width, width, dtype=dtype), nan).contiguous()
    values = {"lower": lower, "upper": upper, "log_s": spread * torch.randn(width, dtype=dtype)}
    values["bias"] = torch.randn(width, dtype=dtype) if bias else None
    options = {"diagonal": diagonal}
    if permuted:
        options["permutation"] = torch.randperm(width)
        if diagonal == "exp":
            options["sign"] = torch.randint(0, 2, (width,)).to(dtype) * 2 - 1
    return values, options


def run(x, values, options, dy, upcast=False):
    wide = (lambda t: t.double()) if upcast else (lambda t: t)
    leaves = {k: wide(v).detach().requires_grad_() for k, v in {"x": x, **values}.items() if v is not None}
    options = {k: wide(v) if k == "sign" else v for k, v in options.items()}
    y = lu_linear(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


def check(got, plain, exact, terms):
    """Errors at most twice those of plain PyTorch; ``terms`` are those of the longest sum."""
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == c.shape
        if a.numel():
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * (terms**0.5 if a.dtype.itemsize >= 4 else 1)
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


def against_reference(x, values, options, dy):
    """What serves by default and the fused kernels."""
    chosen = run(x, values, options, dy)
    with use_backend("native"):
        got = run(x, values, options, dy)
    with use_backend("reference"):
        plain, exact = run(x, values, options, dy), run(x, values, options, dy, upcast=True)
    assert got[0].stride() == chosen[0].stride() == torch.empty_like(canonical(x)).stride()
    terms = max(x.shape[1], x.numel() // max(x.shape[1], 1))
    check(got, plain, exact, terms)
    check(chosen, plain, exact, terms)
    return got


def test_it_is_the_matrix_of_its_factors():
    """Against the dense matrix, written as the documentation has it, and torch's own factorisation."""
    a = torch.randn(6, 6, dtype=torch.float64)
    p, low, up = torch.linalg.lu(a)
    s, bias, x = up.diagonal(), torch.randn(6).double(), torch.randn(5, 6, 3).double()
    options = {"sign": s.sign(), "permutation": p.argmax(-1)}
    for backend in ("native", "reference"):
        with use_backend(backend):
            y = lu_linear(x, low, up, s.abs().log(), bias, **options)
            torch.testing.assert_close(y, torch.einsum("oc,bcp->bop", a, x) + bias[:, None])
            back = lu_linear(y, low, up, s.abs().log(), bias, **options, inverse=True)
            torch.testing.assert_close(back, x)
            raw = torch.randn(6).double()
            y = lu_linear(x, low, up, raw, diagonal="softplus", eps=0.25)
            dense = low @ (up.triu(1) + torch.diag(torch.nn.functional.softplus(raw) + 0.25))
            torch.testing.assert_close(y, torch.einsum("oc,bcp->bop", dense, x))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width, inverse):
    for i, (batch, spatial, fmt) in enumerate(COLUMNS.values()):
        dtype = [torch.float32, torch.bfloat16, torch.float64][(i + width) % 3] if width < 100 else torch.float32
        values, options = factors(width, compute_of(dtype), diagonal=("exp", "softplus")[i % 2], bias=i % 3 > 0)
        x, dy = tensor(batch, width, spatial, dtype, fmt), tensor(batch, width, spatial, dtype, fmt)
        against_reference(x, values, {**options, "inverse": inverse}, dy)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype, inverse):
    for i, (width, (spatial, fmt)) in enumerate(
        itertools.product(
            [1, 4, 13, 40],
            [((), "contiguous"), ((), "sliced"), ((5, 4), "channels_last"), ((32,), "contiguous"), ((0,), "contiguous"),
             ((2, 2, 2), "sliced"), ((1, 1), "contiguous")],
        )
    ):  # fmt: skip
        batch = (3, 0, 9)[i % 3]
        values, options = factors(width, compute_of(dtype), permuted=i % 2 == 0, bias=i % 4 < 2)
        x, dy = tensor(batch, width, spatial, dtype, fmt), tensor(batch, width, spatial, dtype, "contiguous")
        against_reference(x, values, {**options, "inverse": inverse}, dy)


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [8, 16, 48, 96, 112, 128])
def test_tables_of_many_rows(width, inverse):
    """Enough for the dense matrix to be worth its making; rows side by side and apart, in one chunk and several."""
    for rows, dtype, fmt in (
        (4 * width + 13, torch.float32, "contiguous"),
        (4 * width, torch.float64, "sliced"),
        (2500, torch.float32, "sliced"),
    ):
        values, options = factors(width, dtype, bias=rows != 4 * width)
        x, dy = tensor(rows, width, (), dtype, fmt), tensor(rows, width, (), dtype, "contiguous")
        against_reference(x, values, {**options, "inverse": inverse}, dy)
        against_reference(x, values, {"inverse": inverse}, torch.ones(()).expand(x.shape))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
def test_what_is_needed_of_a_table(need, inverse):
    values, options = factors(32)
    args = [torch.randn(150, 32), torch.randn(150, 32), *(values[k] for k in NAMES[:3])]
    args += [options["sign"], options["permutation"], 0, 0.0, inverse]
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    got, plain, exact = (
        raw(b, "backward", *a, *need) for b, a in (("native", args), ("reference", args), ("reference", wide))
    )
    check(got, plain, exact, 150)


@pytest.mark.parametrize("inverse", [False, True])
def test_options(inverse):
    for diagonal, permuted, bias, eps in itertools.product(("exp", "softplus"), (False, True), (False, True), (0, 0.1)):
        values, options = factors(7, diagonal=diagonal, permuted=permuted, bias=bias)
        x, dy = torch.randn(3, 7, 11), torch.randn(3, 7, 11)
        against_reference(x, values, {**options, "eps": eps, "inverse": inverse}, dy)
        # The sign and the permutation apart.
        for name in ("sign", "permutation"):
            if name in options:
                against_reference(x, values, {"diagonal": diagonal, name: options[name], "inverse": inverse}, dy)


def test_extreme_diagonals():
    """Softplus neither overflows nor loses small scales; its slope neither."""
    raw = torch.tensor([-80.0, -20.0, -1.0, 0.0, 3.0, 25.0, 90.0])
    x, eye = torch.randn(40, 7), torch.zeros(7, 7)
    for inverse in (False, True):
        values = {"lower": eye, "upper": eye, "log_s": raw, "bias": None}
        options = {"diagonal": "softplus", "eps": 1e-3, "inverse": inverse}
        with use_backend("native"):
            got = run(x, values, options, torch.ones_like(x))
        with use_backend("reference"):
            exact = run(x, values, options, torch.ones_like(x), upcast=True)
        for a, c in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-30)


def conditioned(width, cond, seed):
    """A random matrix of a given condition number, factored by torch in float64 and rounded."""
    torch.manual_seed(seed)
    q, r = (torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0] for _ in range(2))
    a = q * torch.logspace(0, -torch.tensor(float(cond)).log10().item(), width, dtype=torch.float64) @ r
    p, low, up = torch.linalg.lu(a)
    s = up.diagonal()
    values = {"lower": low.float(), "upper": up.float(), "log_s": s.abs().log().float(), "bias": torch.randn(width)}
    # A rotation's condition number is 1, its factors' is not: a solve goes through L and comes back through U.
    bound = 4e-7 * torch.linalg.cond(a if cond > 1 else low).item()
    return bound, values, {"sign": s.sign().float(), "permutation": p.argmax(-1)}


@pytest.mark.covering
@pytest.mark.parametrize("cond", [1, 10, 100, 1e3, 1e4])
@pytest.mark.parametrize("width", [2, 8, 33, 64, 100, 128, 160])
def test_float32_round_trips(width, cond):
    for seed, shape in itertools.product(range(2), [(257, width), (3, width, 33)]):
        bound, values, options = conditioned(width, cond, seed)
        x = torch.randn(shape)
        for backend in (None, "native"):
            with use_backend(backend) if backend else torch.no_grad():
                y = lu_linear(x, **values, **options)
                back = lu_linear(y, **values, **options, inverse=True)
                again = lu_linear(back, **values, **options)
            assert (back - x).norm() < bound * x.norm()
            assert (again - y).norm() < bound * y.norm()


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=5) if any(n)])
def test_only_the_needed_gradients_are_made(needed, inverse):
    values, options = factors(5)
    for x in (torch.randn(2, 5, 9), torch.randn(30, 5)):
        leaves = {k: v.detach().requires_grad_(n) for (k, v), n in zip({"x": x, **values}.items(), needed, strict=True)}
        lu_linear(**leaves, **options, inverse=inverse).square().sum().backward()
        assert tuple(t.grad is not None for t in leaves.values()) == needed
        wide = {k: t.detach().double().requires_grad_() for k, t in leaves.items()}
        exact = {k: t.double() if k == "sign" else t for k, t in options.items()}
        lu_linear(**wide, **exact, inverse=inverse).square().sum().backward()
        for t, w in zip(leaves.values(), wide.values(), strict=True):
            if t.grad is not None:
                torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-4, atol=1e-4)


def raw(backend, direction, *args):
    out = _library._state.ops[f"_lu_linear_{direction}"].on(backend, *args)
    return [out] if direction == "forward" else list(out)


@pytest.mark.covering(2)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("width", [3, 24, 33, 67])
def test_raw_backward_makes_what_is_needed(width, need, inverse):
    for dtype in (torch.float32, torch.float64, torch.float16):
        values, options = factors(width, compute_of(dtype))
        saved, dy = tensor(2, width, (9, 16), dtype, "contiguous"), tensor(2, width, (9, 16), dtype, "channels_last")
        args = [dy, saved, *(values[k] for k in NAMES[:3]), options["sign"], options["permutation"], 0, 0.0, inverse]
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        got, plain, exact = (
            raw(b, "backward", *a, *need) for b, a in (("native", args), ("reference", args), ("reference", wide))
        )
        check(got, plain, exact, 288)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 2), (5, 3)])
def test_gradcheck(shape, permuted, inverse):
    for diagonal in ("exp", "softplus"):
        values, options = factors(3, torch.float64, permuted=permuted, diagonal=diagonal)
        leaves = [t.nan_to_num().requires_grad_() for t in (torch.randn(shape).double(), *values.values())]

        def call(*args, o=options):
            return lu_linear(*args, **o, inverse=inverse)

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("inverse", [False, True])
def test_nothing_in_an_empty_batch(inverse):
    for shape in ((0, 5), (0, 5, 4), (3, 5, 0), (0, 140)):
        values, options = factors(shape[1])
        got = against_reference(torch.zeros(shape), values, {**options, "inverse": inverse}, torch.zeros(shape))
        assert got[0].shape == shape
        assert all(torch.equal(g, torch.zeros_like(g)) for g in got[2:])


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(64, 12, 16, 16), (700, 40), (4200, 32), (5, 6, 7, 7)])
def test_same_bits_for_any_number_of_threads(shape, inverse):
    x, (values, options), outcomes = torch.randn(shape), factors(shape[1]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with use_backend("native"):
                outcomes.append(run(x, values, {**options, "inverse": inverse}, x))
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("width", [5, 33, 67])
def test_what_is_not_finite_stays_in_its_column(width, value, inverse):
    x, (values, options) = torch.randn(2, width, 90), factors(width)
    bad = x.clone()
    bad[1, -1, 40] = value
    with use_backend("native"):
        clean, got = (lu_linear(t, **values, **options, inverse=inverse) for t in (x, bad))
    assert not got[1, :, 40].isfinite().all()
    got[1, :, 40] = clean[1, :, 40]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [4, 140])
def test_a_singular_diagonal_gives_what_is_not_finite(width, inverse):
    values, options = factors(width, permuted=False)
    values["log_s"][2] = float("-inf")
    x = torch.randn(150, width)
    for backend in (None, "native", "reference"):
        with use_backend(backend) if backend else torch.no_grad():
            y = lu_linear(x, **values, **options, inverse=inverse)
        assert y.isfinite().all() != inverse


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    spatial = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)), *spatial)
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    wide = torch.randn([shape[i] * steps[i] for i in order])
    x = wide.permute([order.index(i) for i in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    values, options = factors(shape[1])
    options["inverse"] = data.draw(st.booleans())
    against_reference(x, values, options, torch.ones(()).expand(shape))


def test_strided_factors():
    x = torch.randn(2, 3, 16)
    lower, upper = torch.randn(6, 6)[::2, ::2], torch.randn(3, 6).t()[::2]
    log_s, bias = torch.zeros(6)[::2], torch.randn(6)[::2]
    w = (lower.tril(-1) + torch.eye(3)) @ (upper.triu(1) + torch.eye(3))
    want = torch.einsum("oc,bcp->bop", w, x) + bias[:, None]
    for backend in ("native", "reference"):
        with use_backend(backend):
            torch.testing.assert_close(lu_linear(x, lower, upper, log_s, bias), want)


def test_autocast_keeps_float32():
    values, options = factors(6)
    for backend, x in itertools.product(("native", "reference", None), (torch.randn(2, 6, 8, 8), torch.randn(50, 6))):
        with use_backend(backend) if backend else torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = lu_linear(x, **values, **options)
            back = lu_linear(y, **values, **options, inverse=True)
        assert y.dtype == torch.float32
        assert (back - x).abs().max() < 1e-5


def test_factors_of_another_type_are_cast():
    values, options = factors(6)
    narrow = {k: v.bfloat16().requires_grad_() for k, v in values.items()}
    for x, inverse in itertools.product((torch.randn(2, 6, 8), torch.randn(50, 6)), (False, True)):
        y = lu_linear(x, **narrow, **options, inverse=inverse)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, lu_linear(x, **{k: v.float() for k, v in narrow.items()}, **options,
                                                inverse=inverse))  # fmt: skip
        grads = torch.autograd.grad(y.sum(), list(narrow.values()))
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)


@pytest.mark.covering
@all_traced
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, True), (False, True, False)])
def test_opcheck(need, inverse, everything):
    values, options = factors(4)
    args = [*(values[k].nan_to_num() for k in NAMES[:3]), options["sign"], options["permutation"]]
    for x in (
        torch.randn(2, 4, 3, 3),
        torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4),
    ):
        forward = (x, *args, values["bias"], 0, 0.0, inverse)
        traced = everything or (x.is_contiguous() and inverse == need[0])
        opcheck(torch.ops.nfkernels._lu_linear_forward, forward, traced=traced)
        backward = (torch.randn_like(x), x, *args, 0, 0.0, inverse, *need)
        opcheck(torch.ops.nfkernels._lu_linear_backward, backward, traced=traced)


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5), (30, 4), (3, 40), (200, 140)])
def test_compile_fullgraph_equals_eager(shape, inverse):
    values, options = factors(shape[1])

    def step(x, lower, upper, log_s, bias):
        return lu_linear(x, lower, upper, log_s, bias, **options, inverse=inverse).sin().sum()

    inputs = [t.requires_grad_() for t in (torch.randn(shape), *values.values())]
    eager = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_func_transforms_and_forward_mode(inverse):
    values, options = factors(4, torch.float64)
    values = {k: v.nan_to_num() for k, v in values.items()}
    options["inverse"] = inverse
    for x in (torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)):
        y = lu_linear(x, **values, **options)
        mapped = torch.func.vmap(lambda a: lu_linear(a[None], **values, **options)[0])(x)
        torch.testing.assert_close(mapped, y)
        origin = lu_linear(torch.zeros_like(x), **values, **options)
        _, tangent = torch.func.jvp(lambda a: lu_linear(a, **values, **options), (x,), (x,))
        torch.testing.assert_close(tangent, y - origin)
        jacobian = torch.func.jacrev(lambda w, x=x: lu_linear(x, **{**values, "lower": w}, **options))(values["lower"])
        assert jacobian.shape == (*x.shape, 4, 4)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(5, 200), (5, 3, 2)])
def test_shapes_on_a_device_that_holds_none(shape, inverse):
    width = shape[1]
    with torch.device("meta"):
        x, factor, log_s = torch.empty(shape), torch.empty(width, width, requires_grad=True), torch.empty(width)
    y = lu_linear(x, factor, factor, log_s, inverse=inverse)
    y.sum().backward()
    assert (y.shape, y.device, factor.grad.shape) == (x.shape, x.device, factor.shape)
    gradient = torch.func.grad(lambda w: lu_linear(x, w, w, log_s, inverse=inverse).sum())(factor.detach())
    assert gradient.shape == factor.shape


def test_which_way_serves():
    """The matrix is composed above the kernels' widths, for no fewer than D columns, and never for an inverse."""
    from nfkernels.ops.lu_linear import COMPOSED, _way

    assert _way(torch.zeros(4096, 128), False) is None
    assert _way(torch.zeros(129, 129), False) == COMPOSED
    assert _way(torch.zeros(128, 129), False) == _way(torch.zeros(4096, 129), True) == "reference"
    with use_backend("native"):
        assert _way(torch.zeros(64, 64), False) == "native"
        assert _way(torch.zeros(640, 130), False) == "reference"


X = torch.zeros(2, 4, 3)
EYE, NIL = torch.eye(4), torch.zeros(4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: lu_linear(torch.zeros(4), EYE, EYE, NIL)),
        ("floating point", lambda: lu_linear(X.long(), EYE, EYE, NIL)),
        (r"lower must be \[4, 4\]", lambda: lu_linear(X, torch.eye(3), EYE, NIL)),
        (r"upper must be \[4, 4\]", lambda: lu_linear(X, EYE, torch.eye(3), NIL)),
        (r"log_s must be \[4\]", lambda: lu_linear(X, EYE, EYE, torch.zeros(3))),
        (r"bias must be \[4\]", lambda: lu_linear(X, EYE, EYE, NIL, torch.zeros(3))),
        (r"sign must be \[4\]", lambda: lu_linear(X, EYE, EYE, NIL, sign=torch.ones(3))),
        (r"permutation must be \[4\]", lambda: lu_linear(X, EYE, EYE, NIL, permutation=torch.arange(3))),
        ("permutation must be int64", lambda: lu_linear(X, EYE, EYE, NIL, permutation=NIL)),
        ("lower must be floating point, got torch.int64", lambda: lu_linear(X, EYE.long(), EYE, NIL)),
        ("upper must be floating point, got torch.complex64", lambda: lu_linear(X, EYE, EYE.cfloat(), NIL)),
        ("log_s must be floating point, got torch.int32", lambda: lu_linear(X, EYE, EYE, NIL.int())),
        ("bias must be floating point, got torch.complex64", lambda: lu_linear(X, EYE, EYE, NIL, NIL.cfloat())),
        (
            r"sign must be \+1 and -1 in a real type, got torch.bool",
            lambda: lu_linear(X, EYE, EYE, NIL, sign=NIL.bool()),
        ),
        ("unknown diagonal", lambda: lu_linear(X, EYE, EYE, NIL, diagonal="relu")),
        ("softplus diagonal is positive", lambda: lu_linear(X, EYE, EYE, NIL, sign=NIL, diagonal="softplus")),
        ("upper is on meta", lambda: lu_linear(X, EYE, torch.eye(4, device="meta"), NIL)),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
