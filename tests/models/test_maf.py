"""Masked and inverse autoregressive flows: densities, round trips, contexts, saving, what they learn."""

from __future__ import annotations

import math

import pytest
import torch
from tables import banana, fitted_score, gaussian_score, moved

import nfkernels
from nfkernels import ScaleMap, Spline, models
from nfkernels import nn as N

SMALL = {"layers": 2, "hidden": 8}
FORMS = {
    "maf": (lambda: models.MAF(4, **SMALL), None),
    "maf-one": (lambda: models.MAF(1, **SMALL), None),
    "maf-one-context": (lambda: models.MAF(1, **SMALL, context=2), 2),
    "maf-random-residual": (
        lambda: models.MAF(5, **SMALL, order="random", network="residual", context=2, activation="silu"), 2,
    ),
    "maf-lu": (lambda: models.MAF(3, **SMALL, linear="lu", transform=ScaleMap.nflows_softplus()), None),
    "maf-spline": (lambda: models.MAF(3, **SMALL, transform=Spline(4), linear="permutation"), None),
    "maf-passes": (lambda: models.MAF(5, **SMALL, passes=2, order="natural", base=N.StudentT(5, 4.0)), None),
    "maf-mixture": (lambda: models.MAF(3, **SMALL, base=N.MixtureNormal(3, 4)), None),
    "iaf": (lambda: models.IAF(4, **SMALL), None),
    "iaf-context": (lambda: models.IAF(3, **SMALL, order="random", context=3, dropout=0.2), 3),
    "iaf-spline": (lambda: models.IAF(2, **SMALL, transform=Spline(4)), None),
}  # fmt: skip
every_form = pytest.mark.parametrize("name", FORMS)


def make(name: str, n: int = 6):
    torch.manual_seed(0)
    build, width = FORMS[name]
    flow = moved(build())
    return flow, torch.randn(n, flow.features), None if width is None else torch.randn(n, width)


@every_form
def test_density_by_hand_and_round_trip(name):
    flow, x, context = make(name)
    for a, b in zip((flow.decode(flow.encode(x, context), context), flow(x, context)[0]), (x, flow.encode(x, context))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    flow, x = flow.double(), x.double()
    context = None if context is None else context.double()
    z, logdet = flow(x, context)
    torch.testing.assert_close(flow.decode(z, context), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(flow.log_prob(x, context), flow.base.log_prob(z) + logdet)
    for i in range(2):
        one = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, one=one: flow(v[None], one)[0][0], x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet)
    report = flow.check(x, context)
    assert report.ok, str(report)


@every_form
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    flow, x, context = make(name)
    flow.save(tmp_path / "flow")
    again = type(flow).load(tmp_path / "flow")
    assert type(again) is type(flow)
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))


@every_form
def test_samples_have_the_density_that_they_are_told(name):
    flow, _, context = make(name)
    context = None if context is None else context[:2]
    x, log_prob = flow.sample_and_log_prob(5, context)
    shape = (5,) if context is None else (5, 2)
    assert x.shape == (*shape, flow.features)
    again = flow.to_distribution(context).log_prob(x)
    torch.testing.assert_close(again, log_prob, atol=1e-3, rtol=1e-3)


@every_form
def test_every_parameter_learns_from_densities(name):
    flow, x, context = make(name)
    flow.nll(x, context).backward()
    for key, p in flow.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key


@pytest.mark.parametrize("name", ["maf", "maf-spline", pytest.param("iaf-context", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    flow, x, context = make(name)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, context), flow(x, context)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_new_flows_are_the_identity():
    x = torch.randn(5, 4)
    for flow in (models.MAF(4), models.IAF(4), models.MAF(4, transform=Spline.nflows(4, 3.0))):
        z, logdet = flow(x)
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(logdet, torch.zeros(5), atol=1e-5, rtol=0)


def test_orders_of_the_layers():
    def degrees(flow):
        return [m.degrees.tolist() for m in flow.modules() if isinstance(m, N.MaskedMLP)]

    assert degrees(models.MAF(3, layers=3)) == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    assert degrees(models.MAF(3, layers=2, order="natural")) == [[0, 1, 2]] * 2
    assert len({tuple(d) for d in degrees(models.MAF(9, layers=4, order="random"))}) == 4
    assert degrees(models.IAF(4, layers=2, passes=2)) == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_iaf_samples_by_one_call_of_each_network():
    calls = []
    for flow, expected in ((models.IAF(4, layers=3), 3), (models.MAF(4, layers=3, passes=4), 12)):
        for m in flow.modules():
            if isinstance(m, N.MaskedMLP):
                m.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        flow.sample(5)
        assert len(calls) == expected


def test_they_are_at_the_top():
    assert nfkernels.MAF is models.MAF
    assert nfkernels.IAF is models.IAF
    assert not isinstance(models.IAF(2), models.MAF)


def test_a_short_training_beats_a_gaussian():
    """Also against the truth: entropy of the banana, whose density has a closed form."""
    torch.manual_seed(0)
    score = fitted_score(models.MAF(2, layers=3, hidden=32, activation="silu"), 200, lr=1e-2)
    x = banana(1000, 10**6)
    assert score > gaussian_score(x) + 0.6
    noise = (x[:, 1] * math.sqrt(2.09) - x[:, 0].square() + 1) / 0.3
    truth = -0.5 * (x[:, 0].square() + noise.square()) - math.log(2 * math.pi) - math.log(0.3 / math.sqrt(2.09))
    assert score > truth.mean() - 0.15


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.MAF(0), "MAF takes the number of features, at least 1, got 0"),
        (lambda: models.IAF(2, layers=0), "IAF needs at least 1 layer, got 0"),
        (lambda: models.MAF(2, order="sorted"), "unknown order 'sorted': expected one of 'alternating', 'random'"),
        (lambda: models.MAF(2, network="cnn"), "unknown network 'cnn'"),
        (lambda: models.MAF(2, linear="qr"), "unknown linear 'qr'"),
        (lambda: models.MAF(2, transform="spline"), "unknown scale map 'spline'"),
        (lambda: models.MAF(2, passes=3), "passes must be from 1 to 2"),
        (lambda: models.MAF(2, embed=torch.nn.Linear(2, 2)), "MAF has an embed= network but context=0"),
        (lambda: models.MAF(2, base=N.StandardNormal(3)), r"has that shape, got \(3,\)"),
        (lambda: models.NSF(3, coupling=False, mask="halves"), "couples no columns by masks, got mask='halves'"),
        (lambda: models.NSF(3, coupling=False, network="cnn"), "unknown network 'cnn'"),
    ],
)
def test_messages(build, message):
    with pytest.raises(ValueError, match=message):
        build()
