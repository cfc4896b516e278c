"""RealNVP over tables and over images."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tables import banana, fitted_score, gaussian_score, moved

import nfkernels
from nfkernels import models
from nfkernels import nn as N

SMALL = {"layers": 3, "hidden": 8}
FORMS = {
    "two": (lambda: models.RealNVP(2, **SMALL), None),
    "odd": (lambda: models.RealNVP(5, **SMALL, linear="lu", actnorm=True, scale_map="exp"), None),
    "context": (lambda: models.RealNVP(3, **SMALL, context=2, network="residual", mask="random"), 2),
    "additive": (lambda: models.RealNVP(4, **SMALL, scale_map="additive", mask="halves", linear="permutation"), None),
}
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
    expected = -0.5 * z.square().sum(1) - 0.5 * flow.features * math.log(2 * math.pi) + logdet
    torch.testing.assert_close(flow.log_prob(x, context), expected)
    one = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], one)[0][0], x[0])
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet)
    assert flow.check(x, context).ok


@every_form
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    flow, x, context = make(name)
    flow.save(tmp_path / "flow")
    again = models.RealNVP.load(tmp_path / "flow")
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))
    assert torch.equal(copy.deepcopy(flow).log_prob(x, context), flow.log_prob(x, context))


@every_form
def test_samples_have_the_density_that_they_are_told(name):
    flow, _, context = make(name)
    context = None if context is None else context[:2]
    x, log_prob = flow.rsample_and_log_prob(5, context)
    torch.testing.assert_close(flow.to_distribution(context).log_prob(x), log_prob, atol=1e-3, rtol=1e-3)
    log_prob.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters() if p.grad is not None)


def test_every_column_is_transformed_by_two_layers():
    for mask in ("alternating", "halves", "random"):
        flow = models.RealNVP(5, **SMALL, mask=mask)
        moving = [layer.channel_map >= 0 for layer in flow.bijection]
        assert torch.equal(moving[0], ~moving[1])


def test_a_short_training_beats_a_gaussian():
    torch.manual_seed(0)
    score = fitted_score(models.RealNVP(2, layers=6, hidden=16), 200)
    assert score > gaussian_score(banana(1000, 10**6)) + 0.4


def test_one_column_is_told_where_to_go():
    with pytest.raises(ValueError, match=r"^RealNVP couples columns .* one column has no other: use NSF\(1\)"):
        models.RealNVP(1)


# --- images -----------------------------------------------------------------------------------------------------------


def image_flow(shape=(1, 8, 8), by=0.1, **options):
    torch.manual_seed(0)
    flow = models.RealNVP(shape=shape, image=True, **{"hidden": 4, "couplings": 2, "grey_levels": 17, **options})
    flow.initialize(images(flow), *([torch.zeros(6, dtype=torch.long)] if flow.embed is not None else []))
    return moved(flow, by)


def images(flow, n=6):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, flow.grey_levels, (n, *flow.event_shape), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 8, 8), {}),
        ((3, 4, 6), {"actnorm": False, "scale_map": "exp"}),
        ((1, 1, 2), {"levels": 1, "network": "residual", "depth": 1}),
        ((2, 4, 8), {"levels": 3, "scale_map": "additive"}),
    ],
    ids=["grey", "colour", "two-pixels", "three-levels"],
)
def test_images_come_back_and_have_a_density(shape, options, tmp_path):
    flow = image_flow(shape, **options)
    assert isinstance(flow, models.ImageRealNVP)
    assert isinstance(flow, N.ImageFlow)
    data = images(flow)
    z = flow.encode(data)
    assert z.shape == (6, math.prod(shape))
    assert torch.equal(flow.decode(z), data)
    assert [v.shape[1:].numel() for v in flow.split_latent(z)] == flow.bijection[1].sizes
    x = flow.dequantize(data[:1]).double()
    flow = flow.double()
    latent, logdet = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.reshape(x.shape))[0][0], x.flatten())
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet)
    bits = (-flow.base.log_prob(latent) - logdet) / (latent.shape[1] * math.log(2)) + math.log2(17)
    torch.testing.assert_close(flow.nll(x), bits.mean())
    flow = flow.float()
    assert flow.sample(2).shape == (2, *shape)
    assert flow.sample(2).dtype == torch.uint8
    assert flow.bits_per_dim(data).shape == (6,)
    flow.save(tmp_path / "flow")
    again = nfkernels.load(tmp_path / "flow")
    assert torch.equal(again.encode(data), flow.encode(data))
    report = flow.check(data)
    assert report.ok, str(report)


def test_images_of_a_class():
    flow = image_flow(context=3, embed=torch.nn.Embedding(2, 3))
    data, labels = images(flow), torch.tensor([0, 1, 0, 1, 0, 1])
    assert not torch.equal(flow.encode(data, labels), flow.encode(data, 1 - labels))
    assert flow.sample(3, labels[:2]).shape == (3, 2, 1, 8, 8)


@pytest.mark.parametrize("network", ["conv", "residual"])
def test_function_transforms_of_images(network):
    flow = moved(models.RealNVP(shape=(1, 4, 4), image=True, hidden=4, network=network))
    x = torch.rand(2, 1, 4, 4)
    each = torch.func.vmap(lambda v: flow.log_prob(v[None])[0])(x)
    torch.testing.assert_close(each, flow.log_prob(x), rtol=1e-4, atol=1e-4)


def test_a_short_training_of_images():
    """Slopes of brightness, with their neighbours' values the same to within the noise."""
    flow = models.RealNVP(shape=(1, 4, 4), image=True, hidden=8, couplings=2, grey_levels=16)
    g = torch.Generator().manual_seed(0)
    ramp = torch.arange(4).reshape(1, 1, 4, 1) + torch.arange(4)
    data = (ramp + torch.randint(0, 10, (256, 1, 1, 1), generator=g)).to(torch.uint8)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        flow.nll(data[torch.randint(0, 256, (64,), generator=g)], generator=g).backward()
        optimizer.step()
    assert flow.eval().bits_per_dim(data, draws=2).mean() < 2, "uniform: 4 bits, the truth: 0.2"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: models.RealNVP(shape=(8, 8), image=True), r"an image's shape is \(channels, height, width\), got"),
        (lambda: models.RealNVP(8, image=True), r"an image's shape is \(channels, height, width\), got 8"),
        (lambda: models.RealNVP((1, 6, 8), image=True, levels=3), "6 x 8 have no 3 levels: both sides must be multip"),
        (lambda: models.RealNVP((1, 2, 2), image=True), "2 x 2 have no 2 levels: .* at least two pixels must remain"),
        (lambda: models.RealNVP((1, 8, 8), image=True, levels=0), "needs at least 1 level, got 0"),
        (lambda: models.RealNVP((1, 8, 8), image=True, couplings=0), "needs at least 1 layer, got 0"),
        (
            lambda: models.RealNVP((1, 8, 8), image=True, network="mlp"),
            "unknown network 'mlp': expected one of 'conv', 'r",
        ),
        (lambda: models.RealNVP((1, 8, 8)), r"takes the number of features, at least 1, got \(1, 8, 8\)"),
        (lambda: models.RealNVP(shape=(1, 8, 8)), r"or shape= with image=True: got shape=\(1, 8, 8\)"),
        (lambda: models.RealNVP(3, shape=(1, 8, 8), image=True), r"takes one shape, got 3 and shape=\(1, 8, 8\)"),
        (lambda: models.RealNVP(3, hidden=0), "RealNVP needs networks of hidden width at least 1, got hidden=0"),
        (lambda: models.NSF(3, hidden=0), "NSF needs networks of hidden width at least 1, got hidden=0"),
        (lambda: models.RealNVP(3, image=False).sample(2.5), "n must be a whole number, .* got 2.5"),
        (
            lambda: models.RealNVP(3, context=1, embed=torch.nn.Embedding(4, 1)).log_prob(torch.zeros(2, 3)),
            "embeds a context, by a Embedding that takes no None: give it a context",
        ),
        (
            lambda: models.RealNVP(3, context=2).log_prob(torch.zeros(2, 3), torch.zeros(2, 2, 2)),
            r"this MLP takes a context \[B, 2\], got shape \(2, 2, 2\)",
        ),
        (lambda: models.RealNVP(3, layers=0), "RealNVP needs at least 1 layer, got 0"),
        (lambda: models.RealNVP(3, scale_map="logistic"), "unknown scale map 'logistic'"),
        (
            lambda: models.RealNVP(3, context=1).log_prob(torch.zeros(2, 3)),
            "this MLP was built with context_",
        ),
        (lambda: models.RealNVP(3).log_prob(torch.zeros(2, 4)), r"mask chooses among 3 channels, got data \(2, 4\)"),
    ],
)
def test_mistakes_get_one_sentence(act, message):
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)


def test_it_stands_at_the_top_too():
    assert nfkernels.RealNVP is models.RealNVP
