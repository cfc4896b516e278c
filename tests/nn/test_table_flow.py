"""TableFlow: densities in the table's own units, noise on whole numbers, contexts, and one file for all of it."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from nfkernels import nn as N


def column(name, shift=0.0, scale=1.0, context=False, **more):
    return {"name": name, "kind": "real", "context": context, "shift": shift, "scale": scale, **more}


def coupled(features=2, context=0, seed=0):
    torch.manual_seed(seed)
    sizes = (features - features // 2, features // 2)
    layers = []
    for side, (kept, moved) in (("first", sizes), ("second", sizes[::-1])):
        network = N.MLP(kept, 8, 2 * moved, context_channels=context)
        torch.nn.init.normal_(network.last.weight, std=0.3)
        layers.append(N.AffineCoupling(network, identity=side))
    return N.Flow(N.Chain(layers), N.StandardNormal(features))


def test_the_density_of_standardised_columns_is_a_gaussian_in_data_units():
    columns = [column("a", 5.0, 2.0), column("b", -300.0, 0.25)]
    flow = N.TableFlow(N.Flow(N.Chain(), N.StandardNormal(2)), columns)
    x = torch.tensor([[5.0, -300.0], [7.0, -299.5], [1.0, -300.6]])
    exact = MultivariateNormal(torch.tensor([5.0, -300.0]), torch.diag(torch.tensor([2.0, 0.25]) ** 2))
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-5, atol=1e-5)


def test_other_units_change_the_density_by_the_logarithm_of_the_factor():
    inner = coupled()
    metres = N.TableFlow(inner, [column("a", 1.5, 0.2), column("b", 3.0, 2.0)])
    millimetres = N.TableFlow(inner, [column("a", 1500.0, 200.0), column("b", 3.0, 2.0)])
    x = torch.randn(6, 2) * torch.tensor([0.2, 2.0]) + torch.tensor([1.5, 3.0])
    change = metres.log_prob(x) - millimetres.log_prob(x * torch.tensor([1000.0, 1.0]))
    torch.testing.assert_close(change, torch.full((6,), math.log(1000)), rtol=1e-4, atol=1e-4)


def test_the_density_in_data_units_integrates_to_one():
    flow = N.TableFlow(coupled(seed=1), [column("a", 10.0, 3.0), column("b", 0.01, 0.002)]).double()
    a, b = torch.linspace(-26, 46, 700).double(), torch.linspace(-0.014, 0.034, 700).double()
    grid = torch.cartesian_prod(a, b)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (a[1] - a[0]) * (b[1] - b[0])
    assert float(mass) == pytest.approx(1, abs=2e-3)


def test_samples_and_round_trip_are_in_data_units():
    flow = N.TableFlow(coupled(), [column("a", 1e4, 5.0), column("b", 2.0, 0.1)])
    x = flow.sample(2000, generator=torch.Generator().manual_seed(0))
    assert abs(float(x[:, 0].mean()) - 1e4) < 5
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=1e-5, atol=1e-3)
    z = flow.sample_standardized(2000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z * torch.tensor([5.0, 0.1]) + torch.tensor([1e4, 2.0]), x, rtol=1e-6, atol=1e-3)


def test_double_precision_keeps_what_float32_would_round_away():
    flow = N.TableFlow(N.Flow(N.Chain(), N.StandardNormal(1)), [column("t", float(torch.tensor(1.7e9)), 2.0)])
    x = torch.tensor([[1.7e9 + 1.0]], dtype=torch.float64)
    own = (float(x) - float(torch.tensor(1.7e9))) / 2
    assert flow.log_prob(x).dtype == torch.float64
    assert float(flow.log_prob(x)) == pytest.approx(-0.5 * own**2 - 0.5 * math.log(2 * math.pi) - math.log(2), rel=1e-9)


def test_noise_on_whole_numbers_makes_a_bound_on_their_probability():
    """Of a Gaussian: the bound is below the logarithm of the mass of each interval, and near it for wide ones."""
    columns = [column("n", 3.0, 4.0, kind="integer", step=2.0, origin=1.0)]
    flow = N.TableFlow(N.Flow(N.Chain(), N.StandardNormal(1)), columns).double()
    assert flow.dequantizes
    k = torch.tensor([[1.0], [3.0], [9.0]]).double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([flow.noise(k, generator=generator) for _ in range(4000)])
    assert draws.min() >= -1 < -0.99
    assert 0.99 < draws.max() < 1
    bound = torch.stack([flow.log_prob(k + u) for u in draws]).mean(0) + math.log(2)
    edges = torch.distributions.Normal(3.0, 4.0).cdf
    mass = (edges(k + 1) - edges(k - 1)).log()[:, 0]
    assert (bound < mass + 2e-3).all()
    torch.testing.assert_close(bound, mass, rtol=0, atol=0.04)
    whole = flow.noise(k[:1].repeat(12, 1), generator=torch.Generator().manual_seed(5))
    part = flow.noise(k[:1].repeat(4, 1), generator=torch.Generator().manual_seed(5), rows=(4, 12))
    assert torch.equal(whole[4:8], part)
    real = N.TableFlow(N.Flow(N.Chain(), N.StandardNormal(1)), [column("x")])
    assert not real.dequantizes
    assert (real.noise(k.float()) == 0).all()


def test_contexts_are_standardised_and_one_file_holds_everything(tmp_path):
    columns = [
        column("a", 5.0, 2.0),
        {"name": "year", "kind": "constant", "context": False, "value": 2020.0},
        column("given", 100.0, 10.0, context=True),
        column("b", -1.0, 3.0, kind="integer", step=1.0, origin=0.0),
    ]
    inner = coupled(context=1)
    flow = N.TableFlow(inner, columns)
    x, context = torch.tensor([[4.0, 2.0], [6.0, -3.0]]), torch.tensor([[95.0], [130.0]])
    z = (x - torch.tensor([5.0, -1.0])) / torch.tensor([2.0, 3.0])
    expected = inner.log_prob(z, (context - 100) / 10) - math.log(6)
    torch.testing.assert_close(flow.log_prob(x, context), expected)
    flow.save(tmp_path / "model.safetensors")
    again = N.Flow.load(tmp_path / "model.safetensors")
    assert isinstance(again, N.TableFlow)
    assert again.columns == columns
    assert (again.names, again.context_names) == (["a", "b"], ["given"])
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))
    assert again.sample(3, context).shape == (3, 2, 2)


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match=r"a flow over \(2,\) does not fit 1 columns of a table"):
        N.TableFlow(coupled(), [column("a")])
    flow = N.TableFlow(coupled(context=1), [column("a"), column("b"), column("c", context=True)])
    with pytest.raises(ValueError, match="this flow is conditioned on c: give them as context="):
        flow.log_prob(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"a context of this flow is \[B, 1\] \(c\), got one of shape"):
        flow.log_prob(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"a context of this flow is \[B, 1\] \(c\), got one of shape"):
        flow.sample(3, torch.tensor(5.0))
    assert flow.sample(3, torch.tensor([[5.0]])).shape == (3, 1, 2)
    with pytest.raises(ValueError, match="no layer of this flow uses a context"):
        N.TableFlow(coupled(), [column("a"), column("b")]).log_prob(torch.zeros(2, 2), torch.zeros(2, 1))
