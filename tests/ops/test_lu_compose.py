"""LU composition: kernels against the reference in float64, gradients, transforms, errors."""

import itertools

import pytest
import torch

from nfkernels import lu_compose, use_backend
from nfkernels.ops import _library
from nfkernels.ops.lu_compose import LARGEST_ON_GPU, _backend

CHANNELS = [1, 2, 3, 5, 12, 24, 31, 32, 33, 48, 64, 96, 126, 200]
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
NAN = float("nan")


def factors(count, channels, dtype=torch.float32, *, permuted=True, signed=True):
    """``(lower, upper, log_s, sign, permutation)``, well conditioned; what must not be read is not a number."""
    lower, upper = torch.randn(2, count, channels, channels, dtype=dtype) * (0.5 / max(channels, 1) ** 0.5)
    strict = torch.ones(channels, channels, dtype=torch.bool).tril(-1)
    lower, upper = torch.where(strict, lower, NAN), torch.where(strict.t().contiguous(), upper, NAN)
    log_s = 0.3 * torch.randn(count, channels, dtype=dtype)
    sign = torch.randint(0, 2, (count, channels)).to(dtype) * 2 - 1 if signed else None
    permutation = torch.rand(count, channels).argsort(-1) if permuted else None
    return lower, upper, log_s, sign, permutation


def options_of(i):
    """Every combination in turn: ``(permuted, signed, diagonal)``."""
    permuted, softplus, signed = bool(i & 1), bool(i & 2), bool(i & 4)
    return permuted, signed and not softplus, "softplus" if softplus else "exp"


def raw(backend, direction, *args):
    return list(_library._state.ops[f"_lu_compose_{direction}"].on(backend, *args))


def widened(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(got, plain, exact, terms):
    """Errors at most twice plain PyTorch's, which are none in float64; ``terms`` are those of the longest sum."""
    for a, b, c in zip(got, plain, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.is_contiguous()
        if a.numel():
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * (terms**0.5 if a.dtype == torch.float64 else 1)
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


def against_reference(direction, *args):
    check(
        raw("native", direction, *args),
        raw("reference", direction, *args),
        raw("reference", direction, *widened(args)),
        args[2].numel(),
    )


def eager(lower, upper, log_s, sign, permutation, diagonal="exp", eps=1e-3):
    """Matrix by matrix, as it is written by hand."""
    weights, inverses, total = [], [], 0.0
    for k in range(lower.shape[0]):
        eye = torch.eye(lower.shape[1], dtype=lower.dtype)
        s = log_s[k].exp() if diagonal == "exp" else torch.nn.functional.softplus(log_s[k]) + eps
        total = total + s.log().sum()
        u = upper[k].triu(1) + torch.diag(s if sign is None else s * sign[k])
        p = eye if permutation is None else eye[permutation[k]]
        weights.append(p @ (lower[k].tril(-1) + eye) @ u)
        half = torch.linalg.solve_triangular(lower[k].tril(-1) + eye, p.t(), upper=False, unitriangular=True)
        inverses.append(torch.linalg.solve_triangular(u, half, upper=True))
    return torch.stack(weights), torch.stack(inverses), total


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(6))
def test_is_what_the_formula_says(i):
    permuted, signed, diagonal = options_of(i)
    lower, upper, log_s, sign, permutation = factors(3, 7, torch.float64, permuted=permuted, signed=signed)
    leaves = [t.requires_grad_() for t in (lower, upper, log_s)]
    want = eager(*leaves, sign, permutation, diagonal, 0.2)
    got = lu_compose(*leaves, sign=sign, permutation=permutation, diagonal=diagonal, eps=0.2)
    cotangents = [torch.randn_like(t) for t in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(t, leaves, cotangents) for t in (tuple(got), want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_permutation_is_that_of_torch_lu():
    weight = torch.linalg.qr(torch.randn(4, 9, 9, dtype=torch.float64))[0]
    p, lower, upper = torch.linalg.lu(weight)
    s = upper.diagonal(dim1=-2, dim2=-1)
    got = lu_compose(lower, upper, s.abs().log(), sign=s.sign(), permutation=p.argmax(-1))
    torch.testing.assert_close(got.weight, weight)
    torch.testing.assert_close(got.inverse, weight.mT.contiguous())
    assert abs(got.logdet) < 1e-12


def test_a_permutation_that_points_outside_is_refused():
    """Where looking is free; a GPU's kernels take such a row for the row itself."""
    zeros = torch.zeros(4, 4)
    for order in ([0, 1, 2, 50_000_000], [0, -(10**9), 2, 3]):
        given = torch.tensor(order)
        with use_backend("native"):
            if "emulated" in str(_library._module("nfkernels._C")[0]):
                assert torch.equal(lu_compose(zeros, zeros, zeros[0], permutation=given).weight, torch.eye(4))
            else:
                with pytest.raises(RuntimeError, match="an index outside"):
                    lu_compose(zeros, zeros, zeros[0], permutation=given)


@pytest.mark.parametrize("channels", CHANNELS)
def test_every_size(channels):
    for i, (count, dtype) in enumerate(itertools.product((1, 3, 32), (torch.float32, torch.float64))):
        if count == 32 and channels > 64:
            continue
        permuted, signed, diagonal = options_of(i)
        given = factors(count, channels, dtype, permuted=permuted, signed=signed)
        kind = (int(diagonal == "softplus"), 0.01)
        against_reference("forward", *given, *kind, True, True)
        weight, inverse, _ = raw("reference", "forward", *given, *kind, True, True)
        dweight, dinverse = torch.randn_like(weight), torch.randn_like(weight)
        against_reference("backward", *given, inverse, dweight, dinverse, torch.tensor(0.7, dtype=dtype), *kind)
        against_reference("backward", *given, None, dweight, None, None, *kind)


def test_up_to_the_largest_on_a_gpu():
    for channels in (385, 512):
        given = factors(1, channels)
        against_reference("forward", *given, 0, 0.0, True, True)
        inverse = raw("reference", "forward", *given, 0, 0.0, False, True)[1]
        against_reference("backward", *given, inverse, None, torch.randn_like(inverse), None, 0, 0.0)


@pytest.mark.covering
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("channels", [3, 33, 70])
def test_any_of_the_gradients_may_be_missing(channels, need):
    for i in (0, 3, 5):
        permuted, signed, diagonal = options_of(i)
        given = factors(3, channels, permuted=permuted, signed=signed)
        kind = (int(diagonal == "softplus"), 1e-3)
        inverse = raw("reference", "forward", *given, *kind, False, True)[1]
        grads = [torch.randn_like(inverse), torch.randn_like(inverse), torch.randn(())]
        grads = [g if n else None for g, n in zip(grads, need, strict=True)]
        against_reference("backward", *given, inverse if need[1] else None, *grads, *kind)


@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=2)))
def test_only_what_is_asked_for_is_made(need):
    for backend in ("native", "reference"):
        lower, upper, log_s, sign, permutation = factors(2, 5)
        leaves = [t.requires_grad_() for t in (lower, upper, log_s)]
        with use_backend(backend):
            weight, inverse, logdet = lu_compose(
                *leaves, sign=sign, permutation=permutation, weight=need[0], inverse=need[1]
            )
        assert (weight is not None, inverse is not None) == need
        torch.testing.assert_close(logdet, log_s.sum())
        total = logdet + sum(t.sin().sum() for t in (weight, inverse) if t is not None)
        got = torch.autograd.grad(total, leaves)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        made = eager(*wide, sign.double(), permutation)
        want = torch.autograd.grad(made[2] + sum(t.sin().sum() for t, n in zip(made, need, strict=False) if n), wide,
                                   allow_unused=True)  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), torch.zeros_like(a).double() if b is None else b, rtol=1e-4,
                                       atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_gradients_of_those_parameters_alone_that_need_one(needed):
    lower, upper, log_s, sign, permutation = factors(2, 5)
    leaves = [t.requires_grad_(n) for t, n in zip((lower, upper, log_s), needed, strict=True)]
    made = lu_compose(*leaves, sign=sign, permutation=permutation)
    (made.weight.sum() + made.inverse.sum()).backward()
    assert tuple(t.grad is not None for t in leaves) == needed


def test_matrix_and_inverse_fit_to_the_last_digit():
    """Each is rounded once from float64: what float32 substitution loses is not there."""
    lower, upper, log_s, sign, permutation = factors(4, 48)
    made = lu_compose(lower, upper, 3 * log_s, sign=sign, permutation=permutation)
    exact = eager(*(t.double() for t in (lower, upper, 3 * log_s, sign)), permutation)
    for a, b in zip(made, exact, strict=True):
        assert (a.double() - b).abs().max() <= 0.51 * EPS[torch.float32] * b.abs().max()
        torch.testing.assert_close(a, b.float(), rtol=1.2e-7, atol=1e-12 * b.abs().max().item())


def test_no_axis_of_matrices():
    lower, upper, log_s, sign, permutation = factors(1, 6)
    stacked = lu_compose(lower, upper, log_s, sign=sign, permutation=permutation)
    alone = lu_compose(lower[0], upper[0], log_s[0], sign=sign[0], permutation=permutation[0])
    assert torch.equal(alone.weight, stacked.weight[0])
    assert torch.equal(alone.inverse, stacked.inverse[0])
    assert torch.equal(alone.logdet, stacked.logdet)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_compose(shape):
    count, channels = shape
    lower, upper, log_s, sign, permutation = factors(count, channels)
    for backend in ("native", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (lower, upper, log_s)]
        with use_backend(backend):
            made = lu_compose(*leaves, sign=sign, permutation=permutation)
            made.logdet.backward()
        assert made.weight.shape == made.inverse.shape == (count, channels, channels)
        assert made.logdet == 0
        assert leaves[0].grad.shape == lower.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float64])
def test_signs_of_any_real_type(dtype):
    lower, upper, log_s = torch.randn(2, 4, 4), torch.randn(2, 4, 4), torch.randn(2, 4)
    sign = torch.tensor([[1, -1, -1, 1], [-1, 1, 1, 1]])
    made = lu_compose(lower, upper, log_s, sign=sign.to(dtype))
    for got, want in zip(made, lu_compose(lower, upper, log_s, sign=sign.float()), strict=True):
        assert torch.equal(got, want)


def test_low_precision_parameters_become_float32():
    given = [t.to(torch.bfloat16).requires_grad_() for t in factors(2, 5)[:3]]
    made = lu_compose(*given)
    assert {t.dtype for t in made} == {torch.float32}
    made.weight.sum().backward()
    assert given[0].grad.dtype == torch.bfloat16
    assert torch.equal(made.weight, lu_compose(*(t.detach().float() for t in given)).weight)


def test_strided_parameters():
    lower, upper, log_s, *_ = factors(4, 6)
    want = lu_compose(lower[::2, :5, :5].contiguous(), upper[::2, :5, :5].contiguous(), log_s[::2, :5].contiguous())
    got = lu_compose(lower[::2, :5, :5], upper[::2, :5, :5], log_s[::2, :5])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_keeps_float64_inside():
    lower, upper, log_s, *_ = factors(2, 8)
    want = lu_compose(lower, upper, log_s)
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            got = lu_compose(lower, upper, log_s)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("diagonal", ["exp", "softplus"])
def test_extreme_diagonals(diagonal):
    """A singular matrix shows as what is not finite in its inverse, and in no other matrix."""
    log_s = torch.tensor([[0.5, -2.0, 1.0], [-900.0, 0.0, 0.0], [30.0, -30.0, 0.1]], dtype=torch.float64)
    lower, upper = (t.nan_to_num(0.0) for t in factors(3, 3, torch.float64)[:2])
    args = (lower, upper, log_s, None, None, int(diagonal == "softplus"), 0.0, True, True)
    got, want = raw("native", "forward", *args), raw("reference", "forward", *args)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a.isfinite().all(-1).all(-1), torch.tensor([True, a is got[0], True]))
        torch.testing.assert_close(a[::2], b[::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], want[2], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    lower, upper, log_s, sign, permutation = factors(2, 3, torch.float64)
    lower, upper = lower.nan_to_num(0.3), upper.nan_to_num(0.3)
    leaves = [t.requires_grad_() for t in (lower, upper, log_s)]
    for options in (
        {"sign": sign, "permutation": permutation},
        {"diagonal": "softplus", "permutation": permutation, "eps": 0.1},
        {"weight": False},
        {"inverse": False, "sign": sign},
    ):

        def run(*leaves, options=options):
            return tuple(t for t in lu_compose(*leaves, **options) if t is not None)

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("shape", [(32, 48), (1, 64), (1, 200), (3, 7)])
def test_same_bits_for_any_number_of_threads(shape):
    given = factors(*shape)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            made = raw("native", "forward", *given, 0, 0.0, True, True)
            grads = raw("native", "backward", *given, made[1], made[0], made[1], made[2], 0, 0.0)
            outcomes.append(made + grads)
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [0, 3, 5])
def test_opcheck(i):
    permuted, signed, diagonal = options_of(i)
    lower, upper, *rest = factors(2, 4, permuted=permuted, signed=signed)
    given = (lower.nan_to_num(0.0), upper.nan_to_num(0.0), *rest)
    kind = (int(diagonal == "softplus"), 1e-3)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.nfkernels._lu_compose_forward, (*given, *kind, *need))
    weight, inverse, logdet = raw("reference", "forward", *given, *kind, True, True)
    for grads in ((inverse, weight, inverse, logdet), (None, weight, None, None), (None, None, None, logdet)):
        torch.library.opcheck(torch.ops.nfkernels._lu_compose_backward, (*given, *grads, *kind))


@pytest.mark.parametrize("asked", [{}, {"inverse": False}, {"weight": False}])
def test_compile_fullgraph_equals_eager(asked):
    lower, upper, log_s, sign, permutation = factors(2, 4)

    def step(lower, upper, log_s):
        made = lu_compose(lower, upper, log_s, sign=sign, permutation=permutation, **asked)
        return sum(t.sin().sum() for t in made if t is not None)

    inputs = [t.requires_grad_() for t in (lower, upper, log_s)]
    want = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_func_transforms_and_forward_mode():
    lower, upper, log_s, sign, permutation = factors(3, 4, torch.float64)
    lower, upper = lower.nan_to_num(0.0), upper.nan_to_num(0.0)
    want = lu_compose(lower, upper, log_s, sign=sign, permutation=permutation)
    got = torch.func.vmap(lambda a, b, c, s, p: lu_compose(a, b, c, sign=s, permutation=p)[:2])(
        lower, upper, log_s, sign, permutation
    )
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b)
    direction = torch.randn_like(log_s)
    _, tangent = torch.func.jvp(lambda r: lu_compose(lower, upper, r, sign=sign).logdet, (log_s,), (direction,))
    torch.testing.assert_close(tangent, direction.sum())
    jacobian = torch.func.jacrev(lambda a: lu_compose(a, upper, log_s, sign=sign).inverse)(lower)
    assert jacobian.shape == (*lower.shape, *lower.shape)


def test_wide_matrices_leave_the_gpu_kernels_alone():
    class OnGpu(torch.Tensor):
        is_cuda = True

    at = torch.zeros(1, 1, 1).expand(1, LARGEST_ON_GPU, LARGEST_ON_GPU).as_subclass(OnGpu)
    assert _backend(at) is None
    more = LARGEST_ON_GPU + 1
    assert _backend(torch.zeros(1, 1, 1).expand(1, more, more).as_subclass(OnGpu)) == "reference"


EYE, ONE = torch.eye(3), torch.zeros(3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"lower must be \[K, C, C\]", lambda: lu_compose(torch.zeros(2, 3), EYE, ONE)),
        ("floating point", lambda: lu_compose(EYE.long(), EYE, ONE)),
        (r"upper must be \[3, 3\]", lambda: lu_compose(EYE, torch.eye(4), ONE)),
        (r"log_s must be \[3\]", lambda: lu_compose(EYE, EYE, torch.zeros(4))),
        (r"log_s must be \[1, 3\]", lambda: lu_compose(EYE[None], EYE[None], ONE)),
        ("upper is torch.float64 but", lambda: lu_compose(EYE, EYE.double(), ONE)),
        (r"sign must be \[3\]", lambda: lu_compose(EYE, EYE, ONE, sign=torch.ones(2))),
        (
            r"sign must be \+1 and -1 in a real type, got torch.complex64",
            lambda: lu_compose(EYE, EYE, ONE, sign=ONE.cfloat()),
        ),
        ("permutation must be int64", lambda: lu_compose(EYE, EYE, ONE, permutation=ONE)),
        ("log_s is on meta", lambda: lu_compose(EYE, EYE, ONE.to("meta"))),
        ("unknown diagonal 'cube'", lambda: lu_compose(EYE, EYE, ONE, diagonal="cube")),
        ("softplus diagonal is positive", lambda: lu_compose(EYE, EYE, ONE, sign=ONE, diagonal="softplus")),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
