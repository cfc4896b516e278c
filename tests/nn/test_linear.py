"""Linear flows: their matrices, conditioning, caches and costs, beside what the registry tests of every layer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from registry import linear

from nfkernels import nn as N
from nfkernels.nn.linear_bijection import LinearBijection
from nfkernels.nn.orthogonal import reflection_factors, rotation

every_linear = pytest.mark.parametrize("case", linear.CASES, ids=lambda c: c.name)


@every_linear
def test_the_matrix_is_what_it_does(case):
    layer = case.make().double()
    assert isinstance(layer, LinearBijection)
    x, given = case.data(torch.float64)
    want = torch.einsum("oc,bc...->bo...", layer.matrix(), x)
    if layer.bias is not None:
        want = want + layer.bias.reshape(-1, *[1] * (x.dim() - 2))
        if "lengths" in given:
            want = want * (torch.arange(x.shape[2]) < given["lengths"][:, None])[:, None]
    torch.testing.assert_close(layer(x, **given)[0], want)
    torch.testing.assert_close(layer.log_abs_det_matrix(torch.float64), torch.linalg.slogdet(layer.matrix()).logabsdet)
    singular_values = torch.linalg.svdvals(layer.matrix())
    assert layer.condition_number() == pytest.approx((singular_values[0] / singular_values[-1]).item(), rel=1e-9)


@every_linear
def test_the_log_determinant_alone(case):
    layer = case.make()
    x, given = case.data()
    assert torch.equal(layer.log_abs_det(x, **given), layer(x, **given)[1])
    assert torch.equal(layer.log_abs_det(x.new_full(x.shape, torch.nan), **given), layer(x, **given)[1])


def test_reflections_are_a_product():
    vectors = torch.randn(4, 6, dtype=torch.float64)
    want = torch.eye(6, dtype=torch.float64)
    for v in vectors:
        want = want @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v))
    torch.testing.assert_close(rotation(*reflection_factors(vectors, "")), want)
    both = torch.stack([vectors, vectors.flip(0)])
    torch.testing.assert_close(rotation(*reflection_factors(both, ""))[1], want.mT)


def test_an_orthogonal_layer_keeps_lengths():
    layer, x = N.HouseholderOrthogonal(64), torch.randn(100, 64)
    torch.testing.assert_close(layer(x)[0].norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, atol=3e-6, rtol=0)


SIZES = {
    "full": lambda d: N.FullLinear(d),
    "triangular": lambda d: N.TriangularLinear(d),
    "block": lambda d: N.BlockDiagonalLinear(d, 4),
    "lu": lambda d: N.LULinear(d, permutation="random"),
    "lu softplus": lambda d: N.LULinear(d, diagonal="softplus", permutation="random"),
    "qr": lambda d: N.QRLinear(d),
    "1x1 plu": lambda d: N.InvertibleConv1x1(d),
    "1x1 full": lambda d: N.InvertibleConv1x1(d, "full"),
    "1x1 qr": lambda d: N.InvertibleConv1x1(d, "qr"),
    "1x1 grouped": lambda d: N.InvertibleConv1x1(d, groups=2),
}


@pytest.mark.parametrize(("name", "d", "spread"), list(itertools.product(SIZES, [4, 32, 128], [0.0, 0.1, 1.0])))
def test_round_trips_lose_what_the_condition_number_says(name, d, spread):
    """In float32: below 4e-7 of the condition number, relative."""
    torch.manual_seed(d)
    layer = SIZES[name](d)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p) / d**0.5)
    x = torch.randn(200, d)
    back = layer.inverse(layer(x)[0])[0]
    error = ((back - x).double().norm() / x.double().norm()).item()
    assert error < 4e-7 * layer.condition_number()


@pytest.mark.parametrize("d", [4, 32, 64, 128])
def test_substitution_loses_what_the_factors_grow(d):
    """A rotation's factors are not as well conditioned as the rotation: float32 solves see their growth."""
    layer = N.LULinear(d, start="rotation")
    lower, s = layer.lower.double().tril(-1) + torch.eye(d), layer.sign_s * layer.log_s.double().exp()
    upper = layer.upper.double().triu(1) + torch.diag(s)
    growth = torch.linalg.matrix_norm(
        torch.linalg.inv(upper).abs() @ torch.linalg.inv(lower).abs() @ lower.abs() @ upper.abs(), 2
    )
    x = torch.randn(200, d)
    back = layer.inverse(layer(x)[0])[0]
    error = (back - x).double().norm() / x.double().norm()
    assert error < 4e-7 * growth
    assert error < 2e-6


CACHED = {
    "full": lambda: N.FullLinear(5),
    "block": lambda: N.BlockDiagonalLinear(6, 3),
    "householder": lambda: N.HouseholderOrthogonal(5),
    "qr": lambda: N.QRLinear(5),
    "plu": lambda: N.InvertibleConv1x1(5),
    "1x1 full": lambda: N.InvertibleConv1x1(5, "full"),
    "1x1 qr": lambda: N.InvertibleConv1x1(5, "qr"),
}


def optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    layer(torch.randn(3, layer.features))[0].sin().sum().backward()
    optimizer.step()


def in_place(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))


def through_data(layer):  # moves no version counter
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))


def loading(layer):
    layer.load_state_dict({**layer.state_dict(), **{k: v + 0.1 for k, v in layer.named_parameters()}})


def converting(layer):
    layer.double().float()
    in_place(layer)


@pytest.mark.parametrize("change", [optimizer_step, in_place, through_data, loading, converting])
@pytest.mark.parametrize("name", CACHED)
def test_a_kept_inverse_is_never_stale(name, change):
    layer = CACHED[name]().eval()
    z = torch.randn(4, layer.features)
    with torch.no_grad():
        before = layer.inverse(z)[0]
        assert torch.equal(layer.inverse(z)[0], before)
        assert "_inverse_cache" in layer.__dict__
    change(layer)
    with torch.no_grad():
        x = layer.inverse(z)[0]
        assert not torch.allclose(x, before, atol=1e-3)
        torch.testing.assert_close(layer(x)[0], z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CACHED if name != "plu"])
def test_what_is_kept_saves_the_work_and_only_without_gradients(name, monkeypatch):
    layer, z = CACHED[name](), torch.randn(4, 6 if name == "block" else 5)
    made = []
    for function in ("solve_ex", "solve_triangular"):
        original = getattr(torch.linalg, function)
        monkeypatch.setattr(torch.linalg, function, lambda *a, f=original, **k: made.append(f) or f(*a, **k))
    with torch.no_grad():
        first = layer.inverse(z)[0]
        count = len(made)
        layer.inverse(z)
    repeated = len(made) - count
    assert repeated < max(count, 1)
    x = layer.inverse(z)[0]  # gradients: made anew
    torch.testing.assert_close(x, first)
    assert x.requires_grad


def test_a_kept_inverse_is_no_part_of_the_layer():
    layer = N.FullLinear(3)
    with torch.no_grad():
        layer.inverse(torch.randn(2, 3))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_what_is_kept_is_nobody_elses():
    layer, x = N.FullLinear(3).double(), torch.randn(1, 3).double()
    with torch.no_grad():
        logdet = layer(x)[1]
        before = logdet.clone()
        logdet += 5
        assert torch.equal(layer(x)[1], before)


def test_what_inference_mode_kept_serves_gradients():
    layer = N.InvertibleConv1x1(4).requires_grad_(False)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.inference_mode():
        layer.inverse(z)
    layer.inverse(z)[0].sum().backward()
    assert torch.isfinite(z.grad).all()


def singular(layer, value=1.0):
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name in ("weight", "upper"):
                p.fill_(value)
            if name in ("log_scale", "log_s"):
                p.fill_(-100.0)
            if name == "vectors":
                p.zero_()
    return layer


SINGULAR = {
    "FullLinear": lambda: N.FullLinear(3),
    "DiagonalLinear": lambda: N.DiagonalLinear(3),
    "TriangularLinear": lambda: N.TriangularLinear(3),
    "BlockDiagonalLinear": lambda: N.BlockDiagonalLinear(4, 2),
    "HouseholderOrthogonal": lambda: N.HouseholderOrthogonal(3),
    "LULinear": lambda: N.LULinear(3),
    "QRLinear": lambda: N.QRLinear(3),
    "InvertibleConv1x1": lambda: N.InvertibleConv1x1(3, "full"),
}


@pytest.mark.parametrize(
    "make", [lambda: N.FullLinear(3), lambda: N.BlockDiagonalLinear(3, 3), lambda: N.InvertibleConv1x1(3, "full")]
)
def test_a_pivot_of_rounding_is_a_zero(make):
    layer = make()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 10.0).reshape(layer.weight.shape))
    with pytest.raises(ValueError, match="is singular"):
        layer(torch.randn(2, 3))
    with torch.no_grad():  # small is not singular
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1e-20, 1e15])).reshape(layer.weight.shape))
    assert torch.isfinite(layer(torch.randn(2, 3))[1]).all()


def test_a_softplus_diagonal_that_float32_loses():
    layer = N.LULinear(4, diagonal="softplus", eps=0.0)
    with torch.no_grad():
        layer.log_s.fill_(-200.0)
    with pytest.raises(ValueError, match="of this LULinear is singular"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("make", "shape", "value", "want"),
    [
        (lambda: N.FullLinear(3), None, float("nan"), "nan"),
        (lambda: N.FullLinear(3), None, 0.0, "inf"),
        (lambda: N.BlockDiagonalLinear(4, 2), None, 0.0, "inf"),
        (lambda: N.InvertibleConv1x1(3, "full"), None, float("nan"), "nan"),
        (lambda: N.PeriodicConv2d(2), (2, 4, 4), 0.0, "inf"),
    ],
)
def test_condition_numbers_of_what_has_none(make, shape, value, want):
    layer = make()
    with torch.no_grad():
        layer.weight.fill_(value)
    assert str(layer.condition_number(shape)) == want


def test_condition_numbers_that_need_no_matrix():
    layer = N.DiagonalLinear(100_000)
    with torch.no_grad():
        layer.log_scale[0] = 2.0
    assert layer.condition_number() == pytest.approx(math.exp(2.0))
    assert N.HouseholderOrthogonal(100_000, 2).condition_number() == 1.0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_not_rounded_where_users_allow_it_elsewhere(precision):
    """TF32 or bfloat16 products would leave round trips of 3e-3."""
    made = [SIZES[name](64) for name in SIZES]
    torch.set_float32_matmul_precision(precision)
    try:
        for layer in made:
            for x in (torch.randn(300, 64), torch.randn(2, 64, 5, 5)):
                torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, atol=2e-5, rtol=0)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_matrix_is_named(name):
    layer = singular(SINGULAR[name]())
    x = torch.randn(2, layer.features)
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=rf"of this {name} (is singular|has no direction)"):
            function(x)


def test_lu_starts_where_it_says():
    for diagonal in ("exp", "softplus"):
        torch.testing.assert_close(N.LULinear(4, diagonal=diagonal).matrix(), torch.eye(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(N.LULinear(3, permutation="reverse").matrix(), torch.eye(3).double().flip(0))
    rotation = N.LULinear(6, start="rotation").matrix()
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(6).double(), atol=1e-6, rtol=0)


def test_permutations_of_older_files(tmp_path):
    """Once they were float matrices."""
    from nfkernels.nn import serialize

    for make in (
        lambda: N.InvertibleConv1x1(4),
        lambda: N.InvertibleConv1x1(6, groups=2),
        lambda: N.GlowSteps(4, 3, 5),
    ):
        layer = make()
        state = {f"state.{k}": v for k, v in layer.state_dict().items()}
        matrix = torch.nn.functional.one_hot(layer.permutation).float()
        other = make()
        serialize._restore(other, state | {"state.permutation": matrix}, None)
        assert torch.equal(other.permutation, layer.permutation)


@pytest.mark.parametrize("order", [[0, 1, 2, 10**9], [0, 0, 1, 2], [-1, 0, 1, 2]])
def test_a_file_whose_permutation_is_none(order):
    from nfkernels.nn import serialize

    layer = N.InvertibleConv1x1(4)
    state = {f"state.{k}": v for k, v in layer.state_dict().items()} | {"state.permutation": torch.tensor(order)}
    with pytest.raises(N.CheckpointError, match="'permutation' that is no permutation"):
        serialize._restore(layer, state, None)
    with pytest.raises(N.CheckpointError, match="wrong shape"):
        serialize._restore(layer, state | {"state.permutation": torch.randn(4, 4)}, None)


def test_check_tells_the_condition_number():
    layer = N.FullLinear(3)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1e-7])))
    report = N.Flow(N.Chain(N.ActNorm(3), layer), N.StandardNormal(3)).check(torch.randn(4, 3))
    assert report.layers[1].condition == pytest.approx(1e7, rel=1e-3)
    report = N.Flow(N.Chain(N.ActNorm(3), singular(layer)), N.StandardNormal(3)).check(torch.randn(4, 3))
    row = report.faults[0]
    assert (row.name, row.kind) == ("bijection.layers.1", "FullLinear")
    assert "a matrix of this FullLinear is singular" in row.problem
    assert "condition number" in row.problem
    assert row.condition > 1e7


def test_check_knows_condition_numbers_where_no_jacobian_is_taken():
    layer = N.InvertibleConv1x1(3, "full")
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.1])))
    report = N.Flow(layer, N.StandardNormal((3, 20, 20))).check(torch.randn(2, 3, 20, 20))
    assert report.layers[0].condition == pytest.approx(10, rel=1e-3)


def test_an_ill_conditioned_round_trip_is_explained():
    """Found far from the origin, where the smallest direction is lost in the others' rounding."""
    layer = N.InvertibleConv1x1(3, "full")
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    with torch.no_grad():
        layer.weight.copy_(turn @ torch.diag(torch.tensor([1.0, 1.0, 1e-7]).double()) @ turn.mT)
    report = N.Flow(layer, N.StandardNormal((3, 20, 20))).check(torch.randn(2, 3, 20, 20))
    assert "does not undo it" in report.faults[0].problem
    assert "condition number" in report.faults[0].problem


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: N.FullLinear(0), "FullLinear needs at least 1 feature, got 0"),
        (
            lambda: N.BlockDiagonalLinear(6, 4),
            "BlockDiagonalLinear of 6 features needs a block that divides them, got 4",
        ),
        (lambda: N.BlockDiagonalLinear(6, 0), "needs a block that divides them, got 0"),
        (lambda: N.HouseholderOrthogonal(4, 0), "HouseholderOrthogonal needs at least 1 reflection, got 0"),
        (lambda: N.QRLinear(4, -1), "QRLinear needs at least 1 reflection, got -1"),
        (
            lambda: N.LULinear(3, permutation="shuffle"),
            "unknown permutation 'shuffle': expected 'none', 'reverse', 'random'",
        ),
        (
            lambda: N.LULinear(3, permutation=torch.tensor([0, 1])),
            r"permutation must be int64 \[3\], got .*int64 \[2\]",
        ),
        (lambda: N.LULinear(3, permutation=torch.tensor([0, 1, 1])), "permutation must hold each of 0 to 2 once"),
        (lambda: N.LULinear(3, diagonal="square"), "unknown diagonal 'square': expected one of 'exp', 'softplus'"),
        (lambda: N.LULinear(3, start="random"), "unknown start 'random'"),
        (lambda: N.LULinear(3, start="rotation", permutation="random"), "has its own signs and permutation"),
        (lambda: N.LULinear(3, eps=-1.0), "eps must be at least 0"),
        (lambda: N.InvertibleConv1x1(6, groups=4), "6 channels needs groups that divide them, got 4"),
        (lambda: N.InvertibleConv1x1(6, "svd"), "unknown parametrization 'svd'"),
        (lambda: N.FullLinear(3)(torch.zeros(2, 4)), r"FullLinear was built for 3 channels on axis 1, got .*\(2, 4\)"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
