"""Mixtures, heavy tails, boxes: densities, samples, gradients through samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

from nfkernels import Spline
from nfkernels import nn as N


def moved(base, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return base


def mixture(shape=(3,), components=4) -> N.MixtureNormal:
    return moved(N.MixtureNormal(shape, components))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_densities_against_torch_distributions(shape, dtype):
    base = mixture(shape)
    reference = D.MixtureSameFamily(
        D.Categorical(logits=base.logits), D.Independent(D.Normal(base.loc, base.log_scale.exp()), len(shape))
    )
    z = (2 * torch.randn(5, *shape)).to(dtype)
    found = base.log_prob(z)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, reference.log_prob(z.to(found.dtype)).to(found.dtype), rtol=1e-5, atol=1e-5)
    for learned in (False, True):
        base = moved(N.StudentT(shape, 2.5, learned=learned))
        each = D.StudentT(base.df).log_prob(z.to(found.dtype))
        expected = each.flatten(1).sum(1) if shape else each
        torch.testing.assert_close(base.log_prob(z), expected.to(found.dtype), rtol=1e-5, atol=1e-5)


def test_a_mixture_integrates_to_one_and_is_that_of_its_parts():
    base = mixture((2,), 3)
    side = torch.linspace(-9, 9, 300)
    total = base.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(total.item() - 1) < 1e-3


def test_samples_of_a_mixture_have_its_moments():
    base = mixture((2,), 3)
    weights = base.logits.softmax(0)
    mean = (weights[:, None] * base.loc).sum(0)
    variance = (weights[:, None] * (base.loc.square() + (2 * base.log_scale).exp())).sum(0) - mean.square()
    with torch.no_grad():
        z = base.sample(40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), variance, atol=0.05, rtol=0.05)
    assert base.sample(0).shape == (0, 2)
    assert N.MixtureNormal(2, 3).double().sample(4).dtype == torch.float64


def test_temperature_narrows_components_and_keeps_their_weights():
    base = mixture((2,), 3)
    with torch.no_grad():
        cold = base.sample(2000, torch.Generator().manual_seed(0), 0.0)
        again = base.sample(2000, torch.Generator().manual_seed(0), 0.0)
    assert torch.equal(cold, again)
    found, counts = torch.unique(cold, dim=0, return_counts=True)
    assert len(found) == 3
    expected = sorted((base.logits.softmax(0) * 2000).tolist())
    assert all(abs(a - b) < 5 * math.sqrt(b) for a, b in zip(sorted(counts.tolist()), expected))


def test_samples_of_student_t_have_its_quantiles():
    base = N.StudentT(2, torch.tensor([3.0, 30.0]))
    z = base.sample(40_000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    other = D.StudentT(torch.tensor([3.0, 30.0])).sample((40_000,))
    q = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    torch.testing.assert_close(z.quantile(q, 0), other.quantile(q, 0), atol=0.06, rtol=0.06)
    half = base.sample(100, torch.Generator().manual_seed(1), 0.5)
    torch.testing.assert_close(half, 0.5 * base.sample(100, torch.Generator().manual_seed(1)))
    assert torch.isfinite(N.StudentT(3, 0.01).sample(1000)).all()


def test_degrees_of_freedom_learn_from_data_and_through_samples():
    torch.manual_seed(0)
    data = D.StudentT(torch.tensor([2.0, 50.0])).sample((4000,))
    base = N.StudentT(2, 8.0, learned=True)
    optimizer = torch.optim.Adam(base.parameters(), 0.1)
    for _ in range(60):
        loss = -base.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 1.5 < base.df[0] < 2.6
    assert base.df[1] > 12
    # Through samples: E z^2 = df / (df - 2), whose derivative is -2 / (df - 2)^2.
    base = N.StudentT(1, 8.0, learned=True)
    (grad,) = torch.autograd.grad(base.sample(200_000).square().mean(), base.log_df)
    assert abs(grad.item() - 8 * -2 / 36) < 0.1
    assert list(N.StudentT(2, 3.0).parameters()) == []


def test_far_draws_of_student_t_have_a_density():
    base = N.StudentT(1, 0.5, learned=True)
    z = torch.tensor([[1e15], [1e30], [-3e38]], requires_grad=True)
    found = base.log_prob(z)
    exact = D.StudentT(torch.tensor(0.5, dtype=torch.float64)).log_prob(z.double()).sum(1)
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=0)
    found.sum().backward()
    torch.testing.assert_close(z.grad, (-1.5 / z).detach())
    assert torch.isfinite(base.log_df.grad).all()
    at_one = torch.tensor([[0.0], [math.sqrt(0.5)], [-0.8], [0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(base.double().log_prob, at_one)


def test_gradients_through_samples_of_a_mixture_are_refused():
    flow = N.Flow(N.DiagonalLinear(2), N.MixtureNormal(2, 3))
    for act in (flow.rsample, flow.rsample_and_log_prob, lambda n: flow.reverse_kl(lambda x: x.sum(1), n)):
        with pytest.raises(ValueError, match="samples of a MixtureNormal do not carry the gradients of all its"):
            act(4)
    assert flow.sample(4).shape == (4, 2)
    assert flow.sample_and_log_prob(4)[1].shape == (4,)
    assert not flow.to_distribution().has_rsample
    assert flow.to_distribution().sample((4,)).shape == (4, 2)
    flow.base.logits.requires_grad_(False)
    flow.rsample(4).sum().backward()
    assert flow.base.loc.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: mixture((2, 5)), lambda: moved(N.StudentT((2, 5), learned=True))])
def test_lengths_count_the_valid_positions_alone(make):
    base, lengths = make(), torch.tensor([5, 2, 0])
    z = torch.randn(3, 2, 5)
    found = base.log_prob(z, lengths=lengths)
    other = torch.where(torch.arange(5) < lengths[:, None, None], z, torch.nan)
    assert torch.equal(base.log_prob(other, lengths=lengths), found)
    torch.testing.assert_close(found[2], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(base.log_prob(z[:1, :, :5], lengths=lengths[:1]), base.log_prob(z[:1]))
    torch.testing.assert_close(base.log_prob(z[1:2, :, :2], lengths=lengths[1:2]), found[1:2])


@pytest.mark.parametrize("make", [lambda: mixture((2,), 3), lambda: moved(N.StudentT(2, 3.0, learned=True))])
def test_bases_save_differentiate_and_take_empty_batches(make, tmp_path):
    base = make()
    N.save(base, tmp_path / "base.safetensors")
    z = torch.randn(3, 2)
    assert torch.equal(N.load(tmp_path / "base.safetensors").log_prob(z), base.log_prob(z))
    assert base.log_prob(z[:0]).shape == (0,)
    base, z = base.double(), z.double().requires_grad_()
    values = list(base.parameters())

    def density(z, *values):
        named = dict(zip((n for n, _ in base.named_parameters()), values))
        return torch.func.functional_call(Density(base), {f"base.{k}": v for k, v in named.items()}, (z,))

    assert torch.autograd.gradcheck(density, (z, *values))
    assert torch.autograd.gradgradcheck(density, (z, *values))


class Density(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, z):
        return self.base.log_prob(z)


def test_uniform_is_closed_and_nothing_outside():
    base = N.Uniform(2, -1.0, 3.0)
    z = torch.tensor([[-1.0, 3.0], [0.0, 0.0], [3.0001, 0.0], [0.0, -1.0001], [math.nan, 0.0]])
    inside = [True, True, False, False, False]
    assert base.log_prob(z).isfinite().tolist() == inside
    assert base.log_prob(z)[0] == -2 * math.log(4)
    assert base.support.check(z).tolist() == inside
    assert torch.isfinite(base.log_prob(base.sample(1000))).all()


def test_splines_on_an_interval_go_with_a_uniform_base():
    torch.manual_seed(0)
    layers = [N.MaskedAutoregressive(2, transform=Spline.unit(5)) for _ in range(2)]
    flow = moved(N.Flow(N.Chain(layers), N.Uniform(2)))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(0.5)
        x, log_prob = flow.sample_and_log_prob(2000)
        assert ((x >= 0) & (x <= 1)).all()
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(flow.log_prob(x)).all()
        corners = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.1, 0.5], [0.5, -0.1]])
        assert flow.log_prob(corners).isfinite().tolist() == [True, True, False, False]
        side = (torch.arange(200) + 0.5) / 200
        assert abs(flow.log_prob(torch.cartesian_prod(side, side)).exp().mean() - 1) < 1e-2


def test_a_normal_that_depends_on_the_context():
    """What DiagonalNormal points to."""
    torch.manual_seed(0)
    last = N.DiagonalPrior(2, context_channels=3)
    flow = moved(N.Flow(last, N.StandardNormal(2)))
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    shift = context @ last.context.T
    normal = D.Normal(last.loc + shift[:, :2], (last.log_scale + shift[:, 2:]).exp())
    torch.testing.assert_close(flow.log_prob(x, context), normal.log_prob(x).sum(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: N.MixtureNormal(2, 0), "needs at least 1 component, got 0"),
        (lambda: N.MixtureNormal(2, 3).sample(2, temperature=-1.0), "temperature must be a finite number"),
        (lambda: N.MixtureNormal(2, 3).log_prob(torch.zeros(2, 3)), r"this base is over \(2,\), got"),
        (lambda: N.StudentT(2, torch.ones(3)), r"df must broadcast to its shape \(2,\), got \(3,\)"),
        (lambda: N.Uniform(2, 0.0, math.inf), "Uniform needs low < high, both finite, got 0.0 and inf"),
        (lambda: N.StandardNormal(-1), r"over a shape of numbers from 0 on, got \(-1,\)"),
        (lambda: N.StudentT(2, 0.0), "finite degrees of freedom above 0, got 0.0"),
        (lambda: N.StudentT(2, torch.tensor([1.0, math.inf])), "finite degrees of freedom above 0"),
    ],
)
def test_messages(build, message):
    with pytest.raises(ValueError, match=message):
        build()
