"""Neural spline flows: density, round trips, conditions, angles, one column, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tables import banana, fitted_score, gaussian_score, moved

import nfkernels
from nfkernels import models
from nfkernels import nn as N

SMALL = {"layers": 2, "hidden": 8, "bins": 4}
FORMS = {
    "two": (lambda: models.NSF(2, **SMALL), None),
    "odd": (lambda: models.NSF(5, **SMALL, network="mlp", activation="silu", actnorm=True), None),
    "one": (lambda: models.NSF(1, **SMALL), None),
    "one-context": (lambda: models.NSF(1, **SMALL, context=2), 2),
    "one-angle": (lambda: models.NSF(1, **SMALL, circular=[0]), None),
    "context": (lambda: models.NSF(3, **SMALL, context=2, mask="random", linear="permutation"), 2),
    "halves": (lambda: models.NSF(4, **SMALL, mask="halves", linear="none", base=N.DiagonalNormal(4)), None),
    "angles": (lambda: models.NSF(3, **SMALL, circular=range(3)), None),
    "mixed": (lambda: models.NSF(5, **{**SMALL, "layers": 3}, circular=(1, 3), actnorm=True), None),
    "mixed-two": (lambda: models.NSF(2, **SMALL, circular=(1,), context=3, mask="alternating"), 3),
}
AUTOREGRESSIVE = {
    "ar-one": (lambda: models.NSF(1, **SMALL, coupling=False), None),
    "ar-odd": (lambda: models.NSF(5, **SMALL, coupling=False, network="mlp", activation="silu", actnorm=True), None),
    "ar-context": (lambda: models.NSF(3, **SMALL, coupling=False, context=2, linear="permutation"), 2),
    "ar-angles": (lambda: models.NSF(3, **SMALL, coupling=False, circular=range(3)), None),
    "ar-mixed": (lambda: models.NSF(4, **SMALL, coupling=False, circular=(1, 3), context=3), 3),
}
FORMS |= AUTOREGRESSIVE
every_form = pytest.mark.parametrize("name", FORMS)


def make(name: str, n: int = 6):
    torch.manual_seed(0)
    build, width = FORMS[name]
    flow = moved(build())
    x = torch.randn(n, flow.features)
    return flow, x, None if width is None else torch.randn(n, width)


@every_form
def test_density_by_hand_and_round_trip(name):
    flow, x, context = make(name)
    flow, x = flow.double(), x.double()
    context = None if context is None else context.double()
    z, logdet = flow(x, context)
    torch.testing.assert_close(flow.decode(z, context), x, atol=1e-8, rtol=0)
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
    again = models.NSF.load(tmp_path / "flow")
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))


@every_form
def test_it_starts_as_the_identity_up_to_an_order(name):
    """And then turns no angle: what a spline leaves alone outside its interval stays too."""
    torch.manual_seed(0)
    flow = FORMS[name][0]().eval()
    _, x, context = make(name)
    z, _ = flow(x, context)
    scale = torch.ones(flow.features)
    if isinstance(flow.base, N.CircularNormal):
        scale[flow.base.circular] = 3 / math.pi
        x = torch.where(flow.base.circular, torch.remainder(x + math.pi, 2 * math.pi) - math.pi, x)
    torch.testing.assert_close(z.sort(1).values, (x * scale).sort(1).values, atol=1e-5, rtol=1e-5)


@every_form
def test_samples_have_the_density_that_they_are_told(name):
    flow, _, context = make(name)
    context = None if context is None else context[:2]
    x, log_prob = flow.sample_and_log_prob(5, context)
    shape = (5,) if context is None else (5, 2)
    assert x.shape == (*shape, flow.features)
    again = flow.to_distribution(context).log_prob(x)
    torch.testing.assert_close(again, log_prob, atol=1e-3, rtol=1e-3)
    flow.rsample(3, context).square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in flow.parameters())


@every_form
def test_under_autocast_the_data_stays_exact(name):
    flow, x, context = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = flow(x, context)
        back = flow.decode(z, context)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["odd", "mixed", "context"])
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    flow, x, context = make(name)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, context), flow(x, context)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_short_training_beats_a_gaussian():
    torch.manual_seed(0)
    score = fitted_score(models.NSF(2, layers=3, hidden=16, network="mlp"), 120)
    assert score > gaussian_score(banana(1000, 10**6)) + 0.4


def test_reverse_kl_learns_a_target_without_data():
    """A normal of mean 1 and deviation 1/2, correlated."""
    torch.manual_seed(0)
    factor = torch.tensor([[0.5, 0.0], [0.4, 0.3]])
    target = torch.distributions.MultivariateNormal(torch.ones(2), scale_tril=factor)
    flow = models.NSF(2, layers=2, hidden=8, bins=4)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    losses = []
    for _ in range(80):
        x, log_q = flow.rsample_and_log_prob(128)
        loss = (log_q - target.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert sum(losses[-10:]) / 10 < 0.1


def test_labels_and_an_embedding_of_observations():
    labelled = models.NSF(2, **SMALL, context=4, embed=torch.nn.Embedding(3, 4))
    moved(labelled)
    x, labels = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    assert labelled.sample(7, labels).shape == (7, 5, 2)
    assert not torch.equal(labelled.log_prob(x, labels), labelled.log_prob(x, 2 - labels))
    summary = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.Tanh())
    observed = moved(models.NSF(2, **SMALL, context=4, embed=summary))
    observed.nll(x, torch.randn(5, 2, 3)).backward()
    assert summary[1].weight.grad.abs().sum() > 0, "the summary network learns with the flow"


def test_angles_are_periodic_in_data_networks_and_density():
    flow, x, _ = make("mixed")
    flow = flow.double()
    x = x.double()
    turned = x.clone()
    turned[:, [1, 3]] += torch.tensor([2, -4]) * math.pi
    torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(x))
    moved_on = x.clone()
    moved_on[:, 0] += 2 * math.pi
    assert not torch.allclose(flow.log_prob(moved_on), flow.log_prob(x))
    samples = flow.sample(2000)[:, [1, 3]]
    assert samples.min() >= -math.pi
    assert samples.max() <= math.pi
    edge = torch.zeros(3, 5, dtype=torch.float64)  # the density has no seam where angles end
    edge[:, 1] = torch.tensor([math.pi - 1e-9, -math.pi, math.pi])
    density = flow.log_prob(edge)
    torch.testing.assert_close(density, density[:1].expand(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", [N.CircularNormal(1, low=-3.0, high=3.0), N.Uniform(1, -3.0, 3.0)])
def test_bases_of_angles_of_ones_own(base):
    flow = moved(models.NSF(1, **SMALL, circular=[0], base=base))
    x = torch.linspace(-math.pi, math.pi, 501)[:, None]
    with torch.no_grad():
        assert abs(torch.trapezoid(flow.log_prob(x[1:-1]).exp(), x[1:-1, 0]).item() - 1) < 0.02


def test_every_angle_has_its_own_interval():
    flow = moved(models.NSF(3, **SMALL, circular=(2, 0), interval=((0, 24), (-180, 180))))
    x = flow.sample(500)
    for column, low, high in ((0, -180, 180), (2, 0, 24)):
        assert low <= x[:, column].min() < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < x[:, column].max() <= high + 1e-3
    turned = x + torch.tensor([360.0, 0.0, -24.0])
    torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(x), atol=1e-3, rtol=0)


def test_one_angle_integrates_to_one():
    flow, _, _ = make("one-angle")
    grid = torch.linspace(-math.pi, math.pi, 2001)[:-1, None]
    total = flow.log_prob(grid).exp().mean() * 2 * math.pi
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-4, rtol=0)


MISTAKES = {
    "features": (lambda: models.NSF(0), "NSF takes the number of features, at least 1, got 0"),
    "shape": (lambda: models.NSF((3,)), r"NSF takes the number of features, at least 1, got \(3,\)"),
    "layers": (lambda: models.NSF(2, layers=0), "NSF needs at least 1 layer, got 0"),
    "bound": (lambda: models.NSF(2, bound=0.0), "bound must be positive, got 0.0"),
    "bins": (lambda: models.NSF(2, bins=1), "Spline.bins must be a whole number from 2 to 64, got 1"),
    "linear": (lambda: models.NSF(2, linear="qr"), "unknown linear 'qr': expected one of 'lu', 'permutation', 'none'"),
    "mask": (lambda: models.NSF(2, mask="odd"), "unknown mask 'odd': expected one of 'alternating', 'halves', 'random"),
    "network": (lambda: models.NSF(2, network="conv"), "unknown network 'conv': expected one of 'mlp', 'residual'"),
    "activation": (lambda: models.NSF(2, activation="sin"), "unknown activation 'sin': expected one of 'relu'"),
    "embed": (lambda: models.NSF(2, embed=torch.nn.Linear(2, 2)), "an embed= network but context=0: give the width"),
    "context": (lambda: models.NSF(2, context=-1), "context is the width of what the networks are given.*got -1"),
    "base": (lambda: models.NSF(2, base=N.StandardNormal(3)), r"base of a flow over 2 features .* got \(3,\)"),
    "base of angles": (
        lambda: models.NSF(2, circular=[1], base=N.StudentT(2)),
        r"columns \[1\] are angles, .* leave base out, or give CircularNormal\(2, \[1\], low=-3.0, high=3.0\)",
    ),
    "base's period": (
        lambda: models.NSF(2, circular=[1], base=N.CircularNormal(2, [1])),
        r"must be periodic on \[-3.0, 3.0\), got CircularNormal",
    ),
    "circular": (lambda: models.NSF(2, circular=[2]), "circular names columns 0 to 1, got 2"),
    "interval": (lambda: models.NSF(2, circular=[1], interval=(1, 1)), "NSF needs a period from low to a higher high"),
    "intervals": (
        lambda: models.NSF(3, circular=[1, 2], interval=((0, 1),) * 3),
        "interval is one pair, or one for each of 2 circular columns: got 3",
    ),
    "columns": (lambda: models.NSF(3).log_prob(torch.zeros(2, 4)), r"LULinear was built for 3 channels .*\(2, 4\)"),
    "no context": (
        lambda: models.NSF(3, context=2).log_prob(torch.zeros(2, 3)),
        "this ResidualNet was built with context_channels=2: give it a context",
    ),
    "one without context": (
        lambda: models.NSF(1, context=2).log_prob(torch.zeros(2, 1)),
        "ElementwiseSpline is made by a network of the context: give it a context",
    ),
    "unasked context": (
        lambda: models.NSF(3).log_prob(torch.zeros(2, 3), torch.zeros(2, 1)),
        "no layer of this flow uses a context",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence(name):
    act, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)


def test_it_stands_at_the_top_too():
    assert nfkernels.NSF is models.NSF
