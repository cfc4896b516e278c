"""Elementwise flows: exact in the tails, their domains, and one-dimensional changes of variables."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D

from nfkernels import nn as N

F64 = torch.float64


# --- against sixty digits ---------------------------------------------------------------------------------------------


def _ln(v: Decimal) -> Decimal:
    return v.ln()


def _log_sigmoid(v: Decimal) -> Decimal:
    return -(1 + (-v).exp()).ln()


# layer: y, log|dy/dx|
EXACT = {
    "exp": (N.Exp(), lambda x: x.exp(), lambda x: x, "real"),
    "log": (N.Log(), _ln, lambda x: -_ln(x), "positive"),
    "softplus": (N.Softplus(), lambda x: (1 + x.exp()).ln(), _log_sigmoid, "real"),
    "softplus-inverse": (
        N.Softplus().inv, lambda x: (x.exp() - 1).ln(), lambda x: -(1 - (-x).exp()).ln(), "positive",
    ),
    "sigmoid": (N.Sigmoid(), lambda x: 1 / (1 + (-x).exp()), lambda x: _log_sigmoid(x) + _log_sigmoid(-x), "real"),
    "logit": (N.Logit(), lambda x: _ln(x) - _ln(1 - x), lambda x: -_ln(x) - _ln(1 - x), "unit"),
    "logit-alpha": (
        N.Logit(0.25),
        lambda x: _ln(1 + 2 * x) - _ln(3 - 2 * x),
        lambda x: _ln(Decimal(1) / 2) - _ln((1 + 2 * x) / 4) - _ln((3 - 2 * x) / 4),
        "closed unit",
    ),
    "tanh": (N.Tanh(), lambda x: 1 - 2 / ((2 * x).exp() + 1), lambda x: _ln(4 / (x.exp() + (-x).exp()) ** 2), "real"),
    "arctanh": (N.Arctanh(), lambda x: (_ln(1 + x) - _ln(1 - x)) / 2, lambda x: -_ln(1 - x * x), "symmetric"),
}  # fmt: skip
SMALL = [1e-30, 1e-8, 1e-3]
POINTS = {
    "real": [*(-v for v in SMALL), 0.0, *SMALL, -80.0, -20.5, -3.0, -0.7, 0.3, 1.0, 2.5, 16.0, 17.5, 21.0, 80.0],
    "positive": [*SMALL, 0.1, 0.69, 0.7, 1.0, 5.0, 16.7, 25.0, 200.0],
    "unit": [*SMALL, 0.1, 0.5, 0.7, 0.999, 1 - 2.0**-24],
    "symmetric": [*(-v for v in SMALL), 0.0, *SMALL, -0.99, 0.5, 0.7, 1 - 2.0**-24, 2.0**-24 - 1],
    "closed unit": [0.0, 1e-8, 0.3, 0.5, 0.9, 1.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", EXACT)
def test_value_and_log_slope_in_every_tail(name, dtype):
    layer, value, log_slope, where = EXACT[name]
    x = torch.tensor(POINTS[where], dtype=dtype)[:, None]
    y, logdet = layer(x)
    with localcontext() as context:
        context.prec = 100
        points = [Decimal(v) for v in x[:, 0].tolist()]
        true = [(float(value(v)), float(log_slope(v))) for v in points]
    eps = torch.finfo(dtype).eps
    for v, got, slope, (exact, exact_slope) in zip(points, y[:, 0].tolist(), logdet.tolist(), true):
        assert got == pytest.approx(exact, rel=4 * eps, abs=4 * eps), v
        assert slope == pytest.approx(exact_slope, rel=4 * eps, abs=4 * eps), v


def test_small_values_of_softplus_keep_their_digits():
    """exp(-30) is far below the rounding of 1 + exp(-30)."""
    x = torch.tensor([[-30.0], [-80.0]])
    y, _ = N.Softplus()(x)
    torch.testing.assert_close(y, x.exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(N.Softplus().inverse(y)[0], x)


@pytest.mark.parametrize("layer", [N.Softplus(), N.Sigmoid(), N.Tanh(), N.Sigmoid(0.1)], ids=lambda v: v.extra_repr())
def test_gradients_stay_finite_in_the_tails(layer):
    x = torch.tensor([[-300.0, -30.0, 0.0, 30.0, 300.0]], requires_grad=True)
    y, logdet = layer(x)
    (first,) = torch.autograd.grad(y.sum() + logdet.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


# --- change of variables ----------------------------------------------------------------------------------------------


def one(value):
    return torch.tensor([value])


X = torch.linspace(-3, 3, 13)[:, None]
LOGISTIC = D.TransformedDistribution(D.Uniform(one(0.0), one(1.0)), [D.SigmoidTransform().inv])
DENSITIES = {
    # Layers from base to data, swapped; or from data to base, as a flow takes them.
    "log-normal": (
        N.Chain(N.Affine(0.3, 0.7), N.Exp()).inv, N.StandardNormal(1), D.LogNormal(one(0.3), one(0.7)), X.exp(),
    ),
    "log-normal by log": (
        N.Chain(N.Log(), N.Affine(0.3, 0.7).inv), N.StandardNormal(1), D.LogNormal(one(0.3), one(0.7)), X.exp(),
    ),
    "logistic": (N.Sigmoid(), N.Uniform(1), LOGISTIC, X),
    "logistic by logit": (N.Logit().inv, N.Uniform(1), LOGISTIC, 4 * X),
    "logit-normal": (
        N.Chain(N.Logit(), N.Affine(-0.5, 2.0).inv),
        N.StandardNormal(1),
        D.TransformedDistribution(D.Normal(one(-0.5), one(2.0)), [D.SigmoidTransform()]),
        X.sigmoid(),
    ),
    "squashed normal": (
        N.Chain(N.Affine(0.2, 0.5), N.Tanh()).inv,
        N.StandardNormal(1),
        D.TransformedDistribution(D.Normal(one(0.2), one(0.5)), [D.TanhTransform()]),
        (0.5 * X).tanh(),
    ),
    "squashed normal by arctanh": (
        N.Arctanh(), N.StandardNormal(1), D.TransformedDistribution(D.Normal(one(0.0), one(1.0)), [D.TanhTransform()]),
        (0.5 * X).tanh(),
    ),
    "softplus of a normal": (
        N.Softplus().inv,
        N.StandardNormal(1),
        D.TransformedDistribution(D.Normal(one(0.0), one(1.0)), [D.SoftplusTransform()]),
        F.softplus(X),
    ),
    # -log of a uniform number
    "exponential": (
        N.Chain(N.Affine(0.0, -2.0), N.Exp()), N.Uniform(1), D.Exponential(one(2.0)), X.exp(),
    ),
    "uniform": (N.Affine(-1.0, 0.5), N.Uniform(1), D.Uniform(one(2.0), one(4.0)), X * 0.3 + 3),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_of_torch_distributions(name):
    bijection, base, truth, x = DENSITIES[name]
    flow = N.Flow(bijection, base)
    torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x)[:, 0], rtol=2e-6, atol=2e-6)
    samples = flow.sample(20000, generator=torch.Generator().manual_seed(0)).sort(0).values
    if name != "squashed normal by arctanh":  # whose inverse transform torch clamps
        expected = torch.linspace(0, 1, 20001)[1:, None]
        assert (truth.cdf(samples) - expected).abs().max() < 0.015


# --- domains ----------------------------------------------------------------------------------------------------------


OUTSIDE = {
    "log": (N.Log(), [1.0, -0.3], r"Log needs positive data, got a minimum of -0\.3: shift it, or keep it away from 0"),
    "log of zero": (N.Log(), [1.0, 0.0], "Log needs positive data, got a minimum of 0: "),
    "exp": (N.Exp().inv, [-2.0, 1.0], "the inverse of Exp needs positive data, got a minimum of -2: "),
    "softplus": (N.Softplus().inv, [0.0, 1.0], "the inverse of Softplus needs positive data, got a minimum of 0: "),
    "tanh": (
        N.Tanh().inv,
        [0.0, 1.0],
        r"the inverse of Tanh needs data inside \(-1, 1\), got a maximum of 1: ",
    ),
    "arctanh": (N.Arctanh(), [-1.5, 0.0], r"Arctanh needs data inside \(-1, 1\), got a minimum of -1\.5: "),
    "logit": (N.Logit(), [0.0, 0.5], r"Logit needs data inside \(0, 1\), got a minimum of 0: .* give a larger alpha"),
    "sigmoid": (
        N.Sigmoid().inv,
        [0.5, 1.0],
        r"inverse of Sigmoid needs data inside \(0, 1\), got a maximum of 1: ",
    ),
    "alpha": (N.Logit(0.25), [0.0, 1.6], r"Logit needs data inside \(-0\.5, 1\.5\), got a maximum of 1\.6: "),
}


@pytest.mark.parametrize(("layer", "data", "message"), OUTSIDE.values(), ids=list(OUTSIDE))
def test_data_outside_are_told_and_nan_where_no_value_is_looked_at(layer, data, message):
    x = torch.tensor([data])
    with pytest.raises(ValueError, match=message):
        layer(x)
    torch._dynamo.reset()
    y, logdet = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert not torch.isfinite(y).all()
    assert not torch.isfinite(logdet).all()


def test_nan_passes():
    for layer in (N.Log(), N.Logit(), N.Arctanh(), N.Exp()):
        y, logdet = layer(torch.tensor([[float("nan"), 0.5]]))
        assert torch.isnan(y[0, 0])
        assert torch.isfinite(y[0, 1])
        assert torch.isnan(logdet).all()


def test_padding_is_inside_every_domain_and_gets_no_gradient():
    x = torch.tensor([[[0.5, 0.25, 0.0]]], requires_grad=True)
    for layer in (N.Log(), N.Logit(), N.Arctanh(), N.Softplus().inv):
        y, logdet = layer(x, lengths=torch.tensor([2]))
        alone, total = layer(x[..., :2])
        assert y[0, 0, 2] == 0
        torch.testing.assert_close(y[..., :2], alone)
        torch.testing.assert_close(logdet, total)
        (grad,) = torch.autograd.grad(y.sum() + logdet.sum(), x)
        assert torch.isfinite(grad).all()
        assert grad[0, 0, 2] == 0


# --- single layers ----------------------------------------------------------------------------------------------------


def test_leaky_relu_is_torchs():
    x = torch.randn(5, 7)
    y, logdet = N.LeakyReLU(0.3)(x)
    torch.testing.assert_close(y, F.leaky_relu(x, 0.3))
    torch.testing.assert_close(logdet, math.log(0.3) * (x < 0).sum(1))


def test_logit_with_alpha_takes_the_ends():
    x = torch.tensor([[0.0, 1.0]])
    y, _ = N.Logit(0.05)(x)
    torch.testing.assert_close(y, torch.logit(torch.tensor([[0.05, 0.95]])))
    torch.testing.assert_close(N.Sigmoid(0.05)(y)[0], x, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", [N.Logit, N.Sigmoid, N.LeakyReLU])
def test_one_after_another_compiles_with_a_number_of_its_own(kind):
    torch._dynamo.reset()
    x = 0.1 + 0.8 * torch.rand(4, 3)
    for number in (0.05, 0.01):  # the compiler takes the second for a variable
        layer = kind(number)
        for plain in (layer, layer.inv):
            made = torch.compile(plain, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(made, plain(x))


def test_affine_by_channel_by_sample_and_by_number():
    x = torch.randn(2, 3, 4)
    shift, scale = torch.randn(3), torch.tensor([1.0, -2.0, 0.5])
    expected = x * scale[:, None] + shift[:, None]
    for learned in (False, True):
        for fit in ((shift, scale), (shift[:, None], scale[:, None].expand(3, 4))):
            y, logdet = N.Affine(*fit, learned=learned)(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(N.Affine(1.0, 2.0)(x)[1], torch.full((2,), 12 * math.log(2)))
    assert not list(N.Affine(1.0, 2.0).parameters())
    assert [n for n, _ in N.Affine(1.0, 2.0, learned=True).named_parameters()] == ["shift", "log_scale"]
    for learned in (False, True):
        assert N.Affine(shift, scale, learned).condition_number() == pytest.approx(4.0)
        assert N.Affine(1.0, -3.0, learned).condition_number() == 1.0
    standardize, affine = N.Standardize(shift, scale), N.Affine(shift, scale)
    torch.testing.assert_close(standardize.inverse(x), affine(x))


def test_a_learned_affine_finds_mean_and_deviation():
    x = 3 + 0.5 * torch.randn(4000, 2)
    flow = N.Flow(N.Affine(torch.zeros(2), torch.tensor([1.0, -1.0]), learned=True).inv, N.StandardNormal(2))
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        flow.nll(x).backward()
        optimizer.step()
    layer = flow.bijection.inv
    torch.testing.assert_close(layer.shift, x.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(layer.log_scale.exp(), x.std(0), atol=0.05, rtol=0)
    assert layer.sign.tolist() == [1.0, -1.0]


def drifted(log_scale: float) -> N.Affine:
    layer = N.Affine(torch.zeros(2), torch.ones(2), learned=True)
    with torch.no_grad():
        layer.log_scale[1] = log_scale
    return layer


MISTAKES = {
    "overflow": (
        lambda: drifted(200.0)(torch.zeros(1, 2)),
        r"^a scale of this Affine is zero or infinite: \|log_scale\| reached 200$",
    ),
    "underflow": (lambda: drifted(-200.0).inverse(torch.zeros(1, 2)), "a scale of this Affine is zero or infinite"),
    "nan": (lambda: drifted(math.nan)(torch.zeros(1, 2)), "a scale of this Affine .* reached nan"),
    "slope": (lambda: N.LeakyReLU(0.0), "LeakyReLU has an inverse for positive finite slopes only, got 0.0"),
    "negative slope": (lambda: N.LeakyReLU(-0.1), "positive finite slopes only, got -0.1"),
    "alpha": (lambda: N.Logit(0.5), "Logit needs an alpha of at least 0 and below 0.5, got 0.5"),
    "negative alpha": (lambda: N.Sigmoid(-0.1), "Sigmoid needs an alpha of at least 0 and below 0.5, got -0.1"),
    "scale": (lambda: N.Affine(0.0, torch.tensor([1.0, 0.0])), "Affine needs scales that are finite and not zero"),
    "shift": (lambda: N.Affine(torch.zeros(3))(torch.zeros(2, 4)), r"Affine has a shift \(3,\), which does not fit"),
    "log_scale": (
        lambda: N.Affine(0.0, torch.ones(2, 2, 2), learned=True)(torch.zeros(2, 2, 2)),
        r"Affine has a log_scale \(2, 2, 2\), which does not fit data \(2, 2, 2\)",
    ),
    "rank": (lambda: N.Exp()(torch.zeros(3)), r"Exp takes data \[B, \.\.\.\], got a tensor of shape \(3,\)"),
    "lengths": (lambda: N.Exp()(torch.zeros(2, 3), lengths=torch.tensor([1, 2])), r"lengths \[B\] go with data"),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
