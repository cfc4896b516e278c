"""Flows inside torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as D

from nfkernels import nn as N


def flow(context=0, base=None, seed=0) -> N.Flow:
    torch.manual_seed(seed)
    layers = []
    for order in ("natural", "reversed"):
        network = N.MaskedMLP(3, 8, 2, order=order, context_channels=context, activation="tanh")
        layers.append(N.MaskedAutoregressive(3, conditioner=network))
    made = N.Flow(N.Chain(layers), N.StandardNormal(3) if base is None else base).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def test_it_expands():
    made = flow()
    d = made.to_distribution().expand((4, 2))
    assert (d.batch_shape, d.event_shape) == ((4, 2), (3,))
    x = d.rsample((5,))
    assert x.shape == (5, 4, 2, 3)
    torch.testing.assert_close(d.log_prob(x), made.log_prob(x.reshape(-1, 3)).reshape(5, 4, 2))
    assert d.log_prob(x[0, 0, 0]).shape == (4, 2)
    made, context = flow(2), torch.randn(2, 2)
    d = made.to_distribution(context).expand((4, 2))
    x = d.sample((5,))
    assert x.shape == (5, 4, 2, 3)
    for i in range(2):
        expected = made.log_prob(x[:, :, i].reshape(-1, 3), context[i].expand(20, 2)).reshape(5, 4)
        torch.testing.assert_close(d.log_prob(x)[:, :, i], expected)
    one = made.to_distribution(context[:1]).expand((3,))
    assert one.sample().shape == (3, 3)
    torch.testing.assert_close(one.log_prob(x[0, 0, 0]), made.log_prob(x[0, 0, :1], context[:1]).expand(3))
    with pytest.raises(RuntimeError):
        made.to_distribution(context).expand((3,))


def test_samples_of_an_expansion_follow_their_own_contexts():
    made = flow(2)
    context = torch.tensor([[0.0, 0.0], [30.0, -30.0]])
    torch.manual_seed(1)
    x = made.to_distribution(context).expand((500, 2)).sample()
    means = made.sample(2000, context).mean(0)
    torch.testing.assert_close(x.mean(0), means, atol=0.3, rtol=0.3)


def test_values_broadcast_against_the_context():
    made, context = flow(2), torch.randn(4, 2)
    d = made.to_distribution(context)
    value = torch.randn(6, 1, 3)
    expected = torch.stack([made.log_prob(v.expand(4, 3), context) for v in value])
    torch.testing.assert_close(d.log_prob(value), expected)
    torch.testing.assert_close(d.log_prob(value[0, 0]), expected[0])
    with pytest.raises(ValueError, match=r"values must end in \(3,\), got shape \(6, 4\)"):
        d.log_prob(torch.zeros(6, 4))


def test_one_observation_is_embedded_once_for_all_values():
    made, rows = flow(2), []
    made.embed = torch.nn.Identity()
    made.embed.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    context = torch.randn(1, 2)
    d = made.to_distribution(context)
    value = torch.randn(50, 1, 3)
    rows.clear()
    found = d.log_prob(value)
    assert found.shape == (50, 1)
    assert d.sample((7,)).shape == (7, 1, 3)
    assert rows == [1, 1]
    torch.testing.assert_close(found[:, 0], made.log_prob(value[:, 0], context.expand(50, 2)))


def test_independent_and_transformed():
    made, context = flow(2), torch.randn(4, 2)
    d = made.to_distribution(context)
    both = D.Independent(d, 1)
    assert (both.batch_shape, both.event_shape) == ((), (4, 3))
    x = both.rsample((5,))
    torch.testing.assert_close(both.log_prob(x), d.log_prob(x).sum(-1))
    moved = D.TransformedDistribution(d, [D.ExpTransform()])
    y = moved.rsample((5,))
    assert (y > 0).all()
    torch.testing.assert_close(moved.log_prob(y), d.log_prob(y.log()) - y.log().sum(-1), atol=1e-4, rtol=1e-4)
    wide = D.TransformedDistribution(made.to_distribution(context), [D.AffineTransform(torch.zeros(6, 4, 3), 2.0, 1)])
    assert wide.batch_shape == (6, 4)


def test_as_components_of_a_mixture():
    made, context = flow(2), torch.randn(4, 2)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    d = D.MixtureSameFamily(D.Categorical(weights), made.to_distribution(context))
    x = d.sample((7,))
    assert x.shape == (7, 3)
    each = torch.stack([made.log_prob(x, c.expand(7, 2)) for c in context], 1)
    torch.testing.assert_close(d.log_prob(x), torch.logsumexp(each + weights.log(), 1))


def test_has_rsample_is_the_bases():
    assert flow().to_distribution().has_rsample
    d = flow(base=N.MixtureNormal(3, 2)).to_distribution()
    assert not d.has_rsample
    assert not D.Independent(d.expand((2,)), 1).has_rsample
    assert not d.sample((2,)).requires_grad
    with pytest.raises(ValueError, match="samples of a MixtureNormal"):
        d.rsample((2,))


def test_support_is_real_unless_told():
    made = N.Flow(N.Logit(), N.StandardNormal(2))
    assert made.to_distribution().support.event_dim == 1
    unit = D.constraints.independent(D.constraints.unit_interval, 1)
    d = made.to_distribution(support=unit)
    assert d.support is unit
    assert d.expand((3,)).support is unit
    assert d.support.check(d.sample((10,))).all()


def test_what_has_no_closed_form_says_so():
    d = flow().to_distribution()
    for act in (lambda: d.mean, lambda: d.variance, lambda: d.stddev, d.entropy):
        with pytest.raises(NotImplementedError, match="of a flow has no closed form: take"):
            act()
    with pytest.raises(NotImplementedError):
        D.kl_divergence(d, d)


def test_the_kl_divergence_is_estimated_from_samples():
    """The reverse KL of two flows: E_p [log p - log q], with one as the other's log density."""
    p, q = flow(), flow(seed=1)
    with torch.no_grad():
        assert p.reverse_kl(p.log_prob, 100).abs() < 1e-5
        assert p.reverse_kl(q.to_distribution().log_prob, 2000) > 0.05
