"""Log evidences that are known, and effective sample sizes with them."""

from __future__ import annotations

import math

import pytest
import torch
from known_flows import gaussian, posterior

from nfkernels.diagnostics import log_evidence

GENERATOR = torch.Generator().manual_seed(0)


def bump(scale, features=2, height=3.0):
    """``height - |x|^2 / (2 scale^2)``, and its log Z."""
    truth = height + features * math.log(scale * math.sqrt(2 * math.pi))
    return lambda x: height - x.square().sum(-1) / (2 * scale**2), truth


def test_a_flow_that_is_the_density_gives_the_evidence_exactly():
    density, truth = bump(1.7)
    found = log_evidence(gaussian(1.7), density, count=500, generator=GENERATOR)
    assert found.value == pytest.approx(truth, abs=1e-5)
    assert found.elbo == pytest.approx(truth, abs=1e-5)
    assert found.standard_error < 1e-6
    assert found.effective_sample_size == pytest.approx(500, rel=1e-6)
    assert "log evidence" in str(found)


def test_a_wider_flow_is_right_within_its_error_and_its_size_is_what_theory_says():
    density, truth = bump(0.8)
    found = log_evidence(gaussian(1.0), density, count=100_000, generator=GENERATOR, batch_size=30_000)
    assert abs(found.value - truth) < 4 * found.standard_error
    # Of w = exp(-a x^2 / 2), a = 1 / s^2 - 1, under N(0, 1): E[w]^2 / E[w^2] = sqrt(1 + 2a) / (1 + a) per dimension.
    a = 1 / 0.8**2 - 1
    share = (math.sqrt(1 + 2 * a) / (1 + a)) ** 2
    assert found.effective_sample_size / found.count == pytest.approx(share, rel=0.02)
    assert found.standard_error == pytest.approx(math.sqrt((1 / share - 1) / found.count), rel=0.03)
    kl = 2 * (math.log(0.8) + 1 / (2 * 0.8**2) - 0.5)  # of N(0, 1) from N(0, 0.8^2)
    assert truth - found.elbo == pytest.approx(kl, rel=0.05)


def test_one_context_and_weights_of_zero():
    flow = posterior(features=1)
    half = log_evidence(
        flow,
        lambda x: torch.where(x[:, 0] > 1.0, flow.log_prob(x, torch.full_like(x, 2.0)), -math.inf),
        count=20_000,
        context=torch.tensor([[2.0]]),
        generator=GENERATOR,
    )
    assert half.value == pytest.approx(math.log(0.5), abs=0.05)


@pytest.mark.parametrize(
    ("density", "options", "message"),
    [
        (lambda x: x, {}, r"one number per sample, \[10\] for samples \[10, 2\], got \[10, 2\]"),
        (lambda x: -1.0, {}, r"one number per sample, \[10\] for samples \[10, 2\], got \[\]"),
        (lambda x: x[:, 0] * math.nan, {}, "10 of 10 weights are not finite"),
        (lambda x: x[:, 0] + math.inf, {}, "10 of 10 weights are not finite"),
        (lambda x: x[:, 0] - math.inf, {}, "-inf at all samples"),
        (lambda x: x[:, 0], {"count": 1}, "at least 2 samples"),
        (lambda x: x[:, 0], {"batch_size": 0}, "batch_size must be at least 1"),
        (lambda x: x[:, 0], {"context": torch.zeros(3, 2)}, "one context at a time, got 3"),
    ],
)
def test_mistakes_are_told(density, options, message):
    with pytest.raises(ValueError, match=message):
        log_evidence(gaussian(), density, **{"count": 10, **options})
