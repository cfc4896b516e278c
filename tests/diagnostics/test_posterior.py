"""Coverage and ranks of posteriors that are known: right ones, too narrow ones, and biased ones."""

from __future__ import annotations

import math

import pytest
import torch
from known_flows import gaussian, pairs, posterior

from nfkernels import nn as N
from nfkernels.diagnostics import coverage, ranks

LEVELS = (0.5, 0.8, 0.95)


def generator():
    return torch.Generator().manual_seed(1)


def test_an_exact_posterior_covers_what_it_says():
    theta, x = pairs(3000)
    found = coverage(posterior(), theta, x, draws=200, generator=generator())
    assert (found.nominal, found.count) == (LEVELS, 3000)
    for level, share, error in zip(found.nominal, found.empirical, found.standard_error, strict=True):
        assert error == pytest.approx(math.sqrt(level * (1 - level) / 3000))
        assert abs(share - level) < 4 * error
    assert "50.0%" in str(found)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_a_wrong_width_gives_the_coverage_that_theory_says(width):
    """In one dimension the region of probability p is |z| < q(p), and z has standard deviation 1 / width."""
    theta, x = pairs(4000, 1)
    found = coverage(posterior(width, features=1), theta, x, draws=400, generator=generator())
    normal = torch.distributions.Normal(0.0, 1.0)
    for level, share in zip(found.nominal, found.empirical, strict=True):
        true = 2 * normal.cdf(width * normal.icdf(torch.tensor(0.5 + level / 2))).item() - 1
        assert share == pytest.approx(true, abs=0.025)


def test_chunks_and_flows_without_a_context():
    theta, x = pairs(300)
    whole = coverage(posterior(), theta, x, draws=100, generator=generator())
    parts = coverage(posterior(), theta, x, draws=100, generator=generator(), batch_size=7)
    assert all(abs(a - b) < 0.12 for a, b in zip(whole.empirical, parts.empirical, strict=True))
    found = coverage(gaussian(), torch.randn(2000, 2, generator=generator()), draws=100, generator=generator())
    assert all(abs(a - b) < 0.05 for a, b in zip(found.empirical, LEVELS, strict=True))


def test_a_flat_flow_covers_what_it_says():
    """All its samples are as dense as the truth."""
    flow = N.Flow(N.ActNorm(2), N.Uniform(2, -1.0, 1.0)).eval()
    theta = torch.rand(2000, 2, generator=generator()) * 2 - 1
    found = coverage(flow, theta, draws=100, generator=generator())
    assert all(abs(a - b) < 0.05 for a, b in zip(found.empirical, LEVELS, strict=True))


def histogram(found, draws, bins=10):
    return torch.histc(found.double() / (draws + 1), bins, 0, 1) / found.numel() * bins


def test_ranks_of_an_exact_posterior_are_uniform():
    theta, x = pairs(2000)
    found = ranks(posterior(), theta, x, draws=99, generator=generator())
    assert (found.shape, found.dtype) == (theta.shape, torch.int64)
    assert (int(found.min()), int(found.max())) == (0, 99)
    shares = histogram(found, 99)
    chi2 = float((400 * (shares - 1) ** 2).sum())  # 4000 ranks in 10 bins
    assert chi2 < 27.9, "beyond the 99.9 % point of chi^2 with 9 degrees of freedom"


def test_ranks_tell_what_is_wrong():
    theta, x = pairs(2000)

    def shares(**how):
        return histogram(ranks(posterior(**how), theta, x, draws=99, generator=generator()), 99)

    narrow, wide, low = shares(width=0.5), shares(width=2.0), shares(bias=-0.7)
    assert narrow[0] > 1.5 < narrow[-1], "overconfident: high at both ends"
    assert wide[4] > 1.3 > wide[0] < 0.5, "too wide: a hump in the middle"
    assert low[-1] > 2 > low[0], "biased low: the truth lies above"


def test_the_flow_is_left_as_it_is():
    flow = posterior().train()
    coverage(flow, *pairs(10), draws=5)
    assert flow.training
    assert flow.bijection.training


@pytest.mark.parametrize("function", [coverage, ranks])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": torch.zeros(0, 2)}, "no theta"),
        ({"theta": torch.zeros(5, 3)}, r"theta is \[N, 2\] of this flow, got \[5, 3\]"),
        ({"theta": torch.full((5, 2), math.nan)}, "theta is not finite"),
        ({"context": torch.zeros(4, 2)}, "5 theta, 4 contexts"),
        ({"context": torch.tensor(0.0)}, "5 theta, 1 contexts"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told(function, change, message):
    given = {"theta": torch.zeros(5, 2), "context": torch.zeros(5, 2), **change}
    with pytest.raises(ValueError, match=message):
        function(posterior(), **given)


def test_levels_are_probabilities():
    with pytest.raises(ValueError, match="levels are probabilities between 0 and 1"):
        coverage(posterior(), *pairs(5), levels=(0.5, 95))


def test_a_truth_of_density_0_is_not_covered():
    flow = N.Flow(N.ActNorm(2), N.Uniform(2, -1.0, 1.0)).eval()
    inside = torch.rand(1000, 2, generator=generator()) * 2 - 1
    theta = torch.cat((inside, inside + 5))
    found = coverage(flow, theta, draws=100, generator=generator())
    assert all(abs(share - level / 2) < 0.03 for share, level in zip(found.empirical, LEVELS, strict=True))


def test_a_density_that_is_not_finite_is_told():
    with pytest.raises(ValueError, match="not finite at some theta"):
        coverage(posterior(width=math.inf), *pairs(5), draws=5)
