"""What a flow over a table is compared with, in which units, and what the corner plot is of."""

import math

import numpy
import pytest
import torch
from torch.distributions import MultivariateNormal

from nfkernels import nn as N
from nfkernels.training.tables.columns import Column, Rows, Table
from nfkernels.training.tables.draw import corner_rows
from nfkernels.training.tables.mixture import Mixture, best_mixture, gaussian
from nfkernels.training.tables.report import nats_per_row, report


def rows(count, seed):
    """Two columns, correlated, of which the second is also the condition of a third."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    c = z[:, :1]
    return torch.cat((0.8 * c + 0.6 * z[:, 1:2], z[:, 2:] - 0.5 * c), 1), c


def test_the_gaussian_is_that_of_torch_and_conditional_by_bayes():
    x, c = rows(4000, 0)
    model = gaussian(x, c)
    joint = torch.cat((x, c), 1)
    exact = MultivariateNormal(joint.mean(0), joint.T.cov(correction=0) + 1e-6 * torch.eye(3))
    alone = MultivariateNormal(c.mean(0), c.T.cov(correction=0).reshape(1, 1) + 1e-6)
    torch.testing.assert_close(model.log_prob(x, c), exact.log_prob(joint) - alone.log_prob(c))
    # What it has been made of: x given c has covariance diag(0.36, 1).
    expected = -(0.5 * math.log(0.36) + math.log(2 * math.pi) + 1)
    assert float(model.log_prob(*rows(20_000, 1)).mean()) == pytest.approx(expected, abs=0.02)


def test_a_mixture_sums_its_parts_and_its_conditional_integrates_to_one():
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]).double()
    covariances = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[0.5, -0.2], [-0.2, 0.8]]]).double()
    weights = torch.tensor([0.3, 0.7]).double()
    model = Mixture(weights.log(), means, torch.linalg.cholesky(covariances))
    x = torch.randn(5, 2, dtype=torch.float64)
    parts = [w * MultivariateNormal(m, s).log_prob(x).exp() for w, m, s in zip(weights, means, covariances)]
    torch.testing.assert_close(model.log_prob(x), sum(parts).log())
    grid = torch.linspace(-12, 12, 4001).double()[:, None]
    for given in (-2.0, 0.3, 2.0):
        mass = model.log_prob(grid, torch.full_like(grid, given)).exp().sum() * 24 / 4000
        assert float(mass) == pytest.approx(1, abs=1e-6)


def test_the_number_of_components_is_chosen_on_held_out_rows():
    pytest.importorskip("sklearn")
    x, _ = rows(600, 0)
    parts = torch.tensor([-4.0, 0.0, 4.0, 8.0]).double()[torch.arange(600) % 4]
    apart = x.clone()
    apart[:, 0] += 3 * parts
    mixture, components, used = best_mixture(apart[:400], None, (apart[400:], None))
    assert components >= 4
    assert used == 400
    assert len(mixture.log_weights) == components
    assert best_mixture(x[:400], None, (x[400:], None))[1] <= 2


def table(steps=(0.0, 0.0), count=300):
    """Two columns in data units: shifts 5 and -3, scales 2 and 10."""
    x = rows(count, 3)[0] * torch.tensor([2.0, 10.0]) + torch.tensor([5.0, -3.0])
    columns = []
    for at, (name, shift, scale, step) in enumerate((("a", 5.0, 2.0, steps[0]), ("b", -3.0, 10.0, steps[1]))):
        if step:
            x[:, at] = (x[:, at] / step).round() * step
            columns.append(Column(name, "integer", False, shift, scale, step, 0.0))
        else:
            columns.append(Column(name, "real", False, shift, scale))
    parts = [Rows(part.float(), None, torch.arange(len(part))) for part in x.split([count - 120, 60, 60])]
    return Table("two", tuple(columns), *parts, (), True)


def flow_over(data):
    columns = [column.facts() for column in data.columns]
    return N.TableFlow(N.Flow(N.Chain(N.LULinear(2)), N.StandardNormal(2)), columns).eval()


@pytest.mark.parametrize("steps", [(0.0, 0.0), (1.0, 0.0)])
def test_scores_in_both_units(steps):
    pytest.importorskip("sklearn")
    data = table(steps)
    flow = flow_over(data)
    found = report(flow, data, draws=3)
    assert found.draws == (3 if steps[0] else 1)
    own = -nats_per_row(flow, data.test, draws=3)
    assert found.flow.nats == pytest.approx(float(own.mean()), rel=1e-6)
    assert found.flow.error == pytest.approx(float(own.std() / math.sqrt(60)), rel=1e-6)
    assert found.flow.standardized == pytest.approx(found.flow.nats - math.log(20))
    assert found.flow.bits == pytest.approx(found.flow.nats / 2 / math.log(2))
    assert found.flow.standardized_bits == pytest.approx(found.flow.standardized / 2 / math.log(2))
    # The Gaussian in data units, by torch, on the same noise.
    if not steps[0]:
        train = data.train.values.double()
        scale = torch.tensor([2.0, 10.0]).double()
        exact = MultivariateNormal(train.mean(0), train.T.cov(correction=0) + 1e-6 * torch.diag(scale**2))
        nats = -exact.log_prob(data.test.values.double())
        assert found.gaussian.nats == pytest.approx(float(nats.mean()), rel=1e-6)
        lead, error = found.leads["Gaussian"]
        assert lead == pytest.approx(float((nats - own).mean()), rel=1e-4)
        assert error == pytest.approx(float((nats - own).std() / math.sqrt(60)), rel=1e-4)
    assert found.facts()["gaussian_nll"] == found.gaussian.nats


@pytest.mark.parametrize("steps", [(0.0, 0.0), (1.0, 0.0)])
def test_the_corner_plot_is_of_rows_and_as_many_samples(steps):
    data = table(steps)
    drawn = corner_rows(flow_over(data), data, seed=1)
    assert drawn["data"].shape == drawn["samples"].shape == (300, 2)
    assert drawn["names"] == ["a", "b"]
    assert drawn["steps"] == list(steps)
    whole = torch.cat([part.values for part in (data.train, data.validation, data.test)]).double()
    assert (numpy.sort(drawn["data"], 0) == whole.sort(0).values.numpy()).all()
    if steps[0]:
        assert (drawn["samples"][:, 0] == drawn["samples"][:, 0].round()).all()
