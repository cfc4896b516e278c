"""What the flows are used for: variational inference, and posteriors from simulations."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import models
from nfkernels import nn as N

LOG_Z = 3.0


def log_banana(x):
    """A banana of the plane, whose normaliser is ``exp(LOG_Z)``."""
    width = 0.5
    log_p = -0.5 * x[..., 0].square() - 0.5 * ((x[..., 1] - x[..., 0].square()) / width).square()
    return log_p - math.log(2 * math.pi * width) + LOG_Z


@pytest.mark.parametrize("path_gradient", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["score", "path"])
@pytest.mark.parametrize("kind", ["iaf", "realnvp"])
def test_variational_inference_finds_the_normaliser(kind, path_gradient):
    torch.manual_seed(0)
    if kind == "iaf":
        flow = models.IAF(2, layers=2, hidden=32, activation="silu")
    else:
        flow = models.RealNVP(2, layers=4, hidden=32, activation="silu")
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        flow.reverse_kl(log_banana, 128, path_gradient=path_gradient).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        bound = -flow.reverse_kl(log_banana, 20_000).item()
    assert LOG_Z - 0.15 < bound < LOG_Z + 0.02, bound


def test_at_the_optimum_the_path_gradient_has_no_noise():
    """q = p: every single sample gives a gradient of zero, while the score's is zero in the mean only."""
    torch.manual_seed(0)
    flow = N.Flow(N.DiagonalLinear(2), N.StandardNormal(2))
    target = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    found = {}
    for path in (False, True):
        flow.zero_grad()
        flow.reverse_kl(target.log_prob, 16, path_gradient=path).backward()
        found[path] = max(p.grad.abs().max().item() for p in flow.parameters())
    assert found[True] < 1e-6
    assert found[False] > 1e-2


def test_nor_has_that_of_the_context():
    """An encoder's output is a parameter, too."""
    flow = N.Flow(N.DiagonalPrior(2, context_channels=2), N.StandardNormal(2))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn_like(p))
    context = torch.randn(3, 2, requires_grad=True)
    optimum = flow.to_distribution(context.detach())
    for p in flow.parameters():
        p.requires_grad_(False)
    flow.reverse_kl(optimum.log_prob, 16, context, path_gradient=True).backward()
    assert context.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", [models.IAF, models.MAF, models.RealNVP])
def test_both_gradients_have_one_mean(kind):
    """Off the optimum, with many samples, in every parameter."""
    torch.manual_seed(0)
    flow = kind(2, layers=2, hidden=6, activation="tanh", context=2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    context = torch.randn(2, 2)
    found = []
    for path in (False, True):
        flow.zero_grad()
        generator = torch.Generator().manual_seed(0)
        flow.reverse_kl(
            lambda x: log_banana(0.3 * x), 20_000, context, path_gradient=path, generator=generator
        ).backward()
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    assert found[1].norm() > 0.1
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_log_densities_of_another_shape_are_told():
    flow = models.IAF(2, layers=1)
    with pytest.raises(ValueError, match=r"one number per sample, \[5\] for samples \[5, 2\], got \[5, 2\]"):
        flow.reverse_kl(lambda x: -x.square(), 5)
    with pytest.raises(ValueError, match="at least 1 sample, got n=0"):
        flow.reverse_kl(log_banana, 0)
    conditional = models.IAF(2, layers=1, context=3)
    seen = []
    loss = conditional.reverse_kl(lambda x: seen.append(x.shape) or log_banana(x), 5, torch.randn(4, 3))
    assert loss.shape == ()
    assert seen == [(5, 4, 2)]


@pytest.mark.parametrize("kind", ["maf", pytest.param("nsf", marks=pytest.mark.slow)])
def test_posteriors_from_simulations(kind):
    """theta ~ N(0, I), ten noisy linear measurements: the posterior is a known Gaussian."""
    torch.manual_seed(0)
    design, noise = torch.randn(10, 2), 1.5

    def simulate(n):
        theta = torch.randn(n, 2)
        return theta, theta @ design.T + noise * torch.randn(n, 10)

    embed = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))
    if kind == "maf":
        flow = models.MAF(2, layers=2, hidden=32, context=4, embed=embed, activation="silu")
    else:
        flow = models.NSF(2, layers=2, hidden=32, depth=1, bins=4, context=4, embed=embed, network="mlp")
    steps = 400
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow.nll(*simulate(256)).backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    covariance = torch.linalg.inv(torch.eye(2) + design.T @ design / noise**2)
    _, observed = simulate(5)
    means = observed @ design @ covariance / noise**2
    samples = flow.sample(4000, observed)
    assert samples.shape == (4000, 5, 2)
    deviation = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - means).abs() < 0.3 * deviation).all()
    torch.testing.assert_close(samples.std(0), deviation.expand(5, 2), atol=0, rtol=0.15)
    # And as a density, for one observation and many values.
    exact = torch.distributions.MultivariateNormal(means[0], covariance)
    theta = exact.sample((2000,))
    gap = exact.log_prob(theta) - flow.log_prob(theta, observed[:1])
    assert abs(gap.mean()) < 0.1  # the divergence, in nats


def test_the_page_has_its_numbers_right():
    """log Z of its banana."""
    side = torch.linspace(-8, 8, 800)
    grid = torch.cartesian_prod(side, torch.linspace(-8, 40, 2400)).double()
    log_density = -0.5 * grid[:, 0] ** 2 - 2 * (grid[:, 1] - grid[:, 0] ** 2) ** 2
    area = (side[1] - side[0]).item() * 48 / 2399
    assert abs(math.log(log_density.exp().sum().item() * area) - math.log(math.pi)) < 1e-3


@pytest.mark.parametrize("kind", ["angles", "layer-twice"])
def test_gradients_through_samples_leave_the_parameters_in_their_places(kind):
    """torch.func.functional_call alone puts its stand-ins in their places, where a module is there by two names."""
    if kind == "angles":
        flow = models.NSF(3, layers=1, hidden=8, bins=4, coupling=False, circular=[1])
    else:
        twice = N.MaskedAutoregressive(3)
        flow = N.Flow(N.Chain(twice, N.Permutation(3, "reverse"), twice), N.StandardNormal(3))
    before = dict(flow.named_parameters())
    for path_gradient in (False, True):
        flow.reverse_kl(lambda x: -x.square().sum(1), 4, path_gradient=path_gradient).backward()
    if kind == "angles":  # no module of ours has two names
        torch.func.functional_call(flow, {name: p.detach() for name, p in before.items()}, (torch.zeros(2, 3),))
    after = dict(flow.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and isinstance(p, torch.nn.Parameter) for name, p in before.items())
    assert any(p.grad.abs().max() > 0 for p in before.values() if p.grad is not None)
