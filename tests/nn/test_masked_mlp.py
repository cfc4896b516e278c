"""Who sees whom in a MADE, and what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfkernels import nn as N


def moved(network: N.MaskedMLP, seed: int = 0) -> N.MaskedMLP:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    return network.double()


def sees(network: N.MaskedMLP, context: Tensor | None = None) -> Tensor:
    """bool ``[D, D]``: whether any parameter of feature i changes with feature j."""
    return sees_of(network, network.features, network.params_per_feature, context)


def sees_of(network: torch.nn.Module, features: int, params: int, context: Tensor | None = None) -> Tensor:
    x = torch.randn(1, features, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: network(v, context)[0], x)[:, 0]
    return jacobian.reshape(features, params, -1).abs().sum(1) > 0


FORMS = {
    "natural": {},
    "reversed": {"order": "reversed"},
    "random": {"order": "random", "seed": 4},
    "own order with ties": {"order": torch.tensor([7, 0, 3, 3, -2, 7])},
    "two passes": {"passes": 2},
    "four passes of a reversed order": {"order": "reversed", "passes": 4},
    "one pass": {"passes": 1},
    "one layer": {"layers": 1},
    "residual": {"residual": True, "layers": 2},
    "context": {"context_channels": 2},
    "residual with context": {"residual": True, "context_channels": 2, "order": "random", "seed": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_feature_depends_on_all_features_before_it_and_on_no_other(form):
    network = moved(N.MaskedMLP(6, 20, 3, activation="tanh", **FORMS[form]))
    context = torch.randn(1, 2).double() if network.context_channels else None
    assert torch.equal(sees(network, context), network.degrees[:, None] > network.degrees)
    assert network.passes == len(network.degrees.unique())
    assert torch.equal(network.hidden_degrees, network.hidden_degrees.sort().values)


def test_orders_give_these_degrees():
    assert N.MaskedMLP(4, 8, 1).degrees.tolist() == [0, 1, 2, 3]
    assert N.MaskedMLP(4, 8, 1, order="reversed").degrees.tolist() == [3, 2, 1, 0]
    assert N.MaskedMLP(5, 8, 1, passes=2).degrees.tolist() == [0, 0, 0, 1, 1]
    assert N.MaskedMLP(3, 8, 1, order=torch.tensor([9, -1, 9])).degrees.tolist() == [1, 0, 1]
    drawn = [N.MaskedMLP(9, 8, 1, order="random", seed=3).degrees for _ in range(2)]
    assert torch.equal(*drawn)
    assert sorted(drawn[0].tolist()) == list(range(9))
    torch.manual_seed(0)
    first, second = (N.MaskedMLP(30, 8, 1, order="random").degrees for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("hidden", [1, 2, 3, 5])
def test_with_few_units_the_last_feature_still_sees_all_others(hidden):
    seen = sees(moved(N.MaskedMLP(8, hidden, 2, activation="tanh")))
    before = torch.ones(8, 8).tril(-1).bool()
    assert not (seen & ~before).any()
    assert seen[7, :7].all()
    assert seen.any(1).sum() >= hidden


def test_with_angles_it_is_periodic_and_sees_no_more():
    network = moved(N.PeriodicMaskedMLP(4, 20, 2, [1, 3], low=-1.0, high=1.0, activation="tanh"))
    assert torch.equal(sees_of(network, 4, 2), network.degrees[:, None] > network.degrees)
    assert network.degrees.tolist() == [0, 1, 2, 3]
    assert network.passes == 4
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(network(x + torch.tensor([0.0, 2.0, 0.0, -4.0])), network(x))
    assert not torch.allclose(network(x + torch.tensor([0.0, 1.0, 0.0, 0.0])), network(x))


def test_the_first_feature_depends_on_the_context_too():
    for features in (1, 4):
        network = moved(N.MaskedMLP(features, 9, 2, context_channels=3, activation="tanh"))
        x = torch.randn(2, features).double()
        difference = network(x, torch.zeros(2, 3).double()) - network(x, torch.ones(2, 3).double())
        assert (difference.abs() > 0).all()


def test_one_feature_without_a_context_is_constant():
    network = moved(N.MaskedMLP(1, 4, 2))
    out = network(torch.randn(5, 1).double())
    assert out.shape == (5, 2)
    assert torch.equal(out, out[:1].expand(5, 2))


def test_parameters_of_a_feature_are_side_by_side():
    network = moved(N.MaskedMLP(3, 8, 4, activation="tanh"))
    x = torch.randn(1, 3).double()
    y = x.clone()
    y[0, 1] += 1  # seen by feature 2 alone
    changed = (network(x) != network(y))[0]
    assert changed.tolist() == [False] * 8 + [True] * 4


def test_it_is_zero_at_the_start():
    for residual in (False, True):
        assert N.MaskedMLP(4, 8, 2, residual=residual)(torch.randn(3, 4)).abs().max() == 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "elu"])
def test_against_the_formulas(activation):
    """Both forms by hand, with masks from their definition."""
    act = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu, "elu": F.elu}[activation]
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    for residual in (False, True):
        network = moved(N.MaskedMLP(3, 6, 2, layers=2, residual=residual, activation=activation, context_channels=2))
        hidden = torch.tensor([0, 0, 1, 1, 2, 2])
        assert torch.equal(network.hidden_degrees, hidden)
        one = (hidden[:, None] > torch.arange(3)).double() * network.first.weight
        between = [(hidden[:, None] >= hidden).double() * layer.weight for layer in network.hidden]
        biases = [layer.bias for layer in network.hidden]
        last = (torch.tensor([0, 0, 1, 1, 2, 2])[:, None] >= hidden).double() * network.last.weight
        extra = [context @ layer.weight.T for layer in network.context]
        h = x @ one.T + network.first.bias + extra[0]
        if residual:
            for i in (0, 1):
                t = act(h) @ between[2 * i].T + biases[2 * i] + extra[1 + i]
                h = h + act(t) @ between[2 * i + 1].T + biases[2 * i + 1]
        else:
            h = act(act(h) @ between[0].T + biases[0])
        torch.testing.assert_close(network(x, context), h @ last.T + network.last.bias)


def test_against_nflows_blocks():
    """nflows' MADE, rewritten: degrees that go round, residual blocks, weights times masks."""
    features, hidden, params = 4, 9, 2
    inputs = torch.arange(1, features + 1)
    units = torch.arange(hidden) % (features - 1) + 1  # nflows: not sorted
    outputs = inputs.repeat_interleave(params)
    torch.manual_seed(0)
    w0, w1, w2, w3 = (torch.randn(a, b).double() for a, b in ((9, 4), (9, 9), (9, 9), (8, 9)))
    x = torch.randn(5, features).double()
    h = x @ (w0 * (units[:, None] >= inputs)).T
    square = units[:, None] >= units
    h = h + F.relu(F.relu(h) @ (w1 * square).T) @ (w2 * square).T
    expected = h @ (w3 * (outputs[:, None] > units)).T

    network = N.MaskedMLP(features, hidden, params, residual=True, layers=1).double()
    order = units.argsort(stable=True)
    assert torch.equal(network.hidden_degrees, units[order])
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.first.weight.copy_(w0[order])
        network.hidden[0].weight.copy_(w1[order][:, order])
        network.hidden[1].weight.copy_(w2[order][:, order])
        network.last.weight.copy_(w3[:, order])
    torch.testing.assert_close(network(x), expected)


def test_what_lies_beside_a_mask_is_not_looked_at():
    network = moved(N.MaskedMLP(4, 9, 2))
    x = torch.randn(3, 4).double()
    before = network(x)
    with torch.no_grad():
        for layer, cut in ((network.first, network.first_cut), (network.hidden[0], network.hidden_cut)):
            layer.weight[cut] = torch.nan
    assert torch.equal(network(x), before)
    network(x).sum().backward()
    assert network.first.weight.grad[network.first_cut].abs().max() == 0


def test_a_state_brings_its_order():
    one, two = (moved(N.MaskedMLP(7, 9, 2, order="random", seed=s)) for s in (1, 2))
    x = torch.randn(3, 7).double()
    assert not torch.equal(one.degrees, two.degrees)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    assert torch.equal(one.first_cut, two.first_cut)


def test_saved_it_holds_degrees_and_no_masks(tmp_path):
    network = N.MaskedMLP(5, 9, 2, order="random").double()
    assert {n for n, b in network.state_dict().items() if b.dtype not in (torch.float64,)} == {"degrees"}
    N.save(network, tmp_path / "made.safetensors")
    loaded = N.load(tmp_path / "made.safetensors")
    x = torch.randn(2, 5).double()
    assert torch.equal(loaded(x), network(x))
    assert torch.equal(loaded.last_cut, network.last_cut)
    assert network.first_cut.dtype == torch.bool


def test_dropout_acts_in_training_alone():
    for residual in (False, True):
        network = moved(N.MaskedMLP(4, 60, 2, dropout=0.5, residual=residual))
        x = torch.randn(3, 4).double()
        assert not torch.equal(network(x), network(x))
        assert network.network(x, None) is None
        network.eval()
        assert torch.equal(network(x), network(x))
        assert network.network(x, None) is not None


def test_on_the_meta_device():
    with torch.device("meta"):
        network = N.MaskedMLP(5, 9, 2)
    assert network(torch.randn(3, 5, device="meta")).shape == (3, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features of at least 1, got 0"),
        ({"hidden": 0}, "hidden of at least 1, got 0"),
        ({"params_per_feature": 0}, "params_per_feature of at least 1"),
        ({"layers": 0}, "layers of at least 1"),
        ({"activation": "swish"}, "unknown activation 'swish': expected one of"),
        ({"dropout": 1.0}, "dropout"),
        ({"order": "sorted"}, "unknown order 'sorted': expected 'natural', 'reversed', 'random' or an int64 tensor"),
        ({"order": torch.tensor([0, 1])}, r"order must be int64 \[3\], got torch.int64 \[2\]"),
        ({"order": torch.tensor([0.0, 1.0, 2.0])}, r"order must be int64 \[3\], got torch.float32"),
        ({"passes": 4}, "passes must be from 1 to 3"),
        ({"passes": 0}, "passes must be from 1 to 3"),
        ({"seed": 1}, 'a seed goes with order="random"'),
    ],
)
def test_messages(options, message):
    with pytest.raises(ValueError, match=message):
        N.MaskedMLP(**{"features": 3, "hidden": 4, "params_per_feature": 2, **options})


def test_contexts_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="takes no context"):
        N.MaskedMLP(2, 3, 1)(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="give it a context"):
        N.MaskedMLP(2, 3, 1, context_channels=2)(torch.zeros(2, 2))
