"""Permutations: the order they say, its inverse, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nfkernels import nn as N


@pytest.mark.parametrize(
    ("layer", "order"),
    [
        (N.Permutation(5, "reverse"), [4, 3, 2, 1, 0]),
        (N.Permutation(5, "roll"), [2, 3, 4, 0, 1]),
        (N.Permutation(4, "roll"), [2, 3, 0, 1]),
        (N.Permutation(3, permutation=[1, 2, 0]), [1, 2, 0]),
        (N.Permutation(3, permutation=torch.tensor([2, 0, 1], dtype=torch.int32)), [2, 0, 1]),
        (N.Permutation(1), [0]),
    ],
)
def test_the_order(layer, order):
    x = torch.randn(2, len(order), 3)
    y, logdet = layer(x)
    assert torch.equal(y, x[:, order])
    assert torch.equal(layer.inverse(y)[0], x)
    assert not logdet.any()
    assert layer.condition_number() == 1.0
    assert layer.permutation.dtype == layer.inverse_permutation.dtype == torch.int64
    assert torch.equal(layer.inverse_permutation, layer.permutation.argsort())


def test_random_orders_come_from_torchs_generator_and_travel_with_the_state():
    torch.manual_seed(3)
    one = N.Permutation(32)
    torch.manual_seed(3)
    assert torch.equal(N.Permutation(32).permutation, one.permutation)
    other = N.Permutation(32)
    assert not torch.equal(other.permutation, one.permutation)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(other.inverse(one(x)[0])[0], x)


def test_it_keeps_the_order_it_was_given():
    order = torch.tensor([1, 0, 2])
    layer = N.Permutation(3, permutation=order)
    order[0] = 7
    assert layer.permutation.tolist() == [1, 0, 2]


class Twice(N.Permutation):
    def __init__(self, order):
        super().__init__(len(order), permutation=order)


N.register(Twice)


@pytest.mark.parametrize("make", [lambda order: N.Permutation(4, permutation=order), Twice])
def test_an_array_is_saved_as_numbers(make, tmp_path):
    order = np.array([2, 0, 3, 1])
    flow = N.Flow(make(order), N.StandardNormal(4))
    order[0] = 1
    flow.save(tmp_path / "flow")
    x = torch.randn(3, 4)
    assert torch.equal(N.Flow.load(tmp_path / "flow").encode(x), flow.encode(x))
    assert torch.equal(flow.encode(x), x[:, [2, 0, 3, 1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: N.Permutation(0), "^Permutation needs at least 1 feature, got 0$"),
        (lambda: N.Permutation(3, "shuffle"), "unknown kind 'shuffle': expected 'random', 'reverse' or 'roll'"),
        (lambda: N.Permutation(3, permutation=[0, 1]), r"a permutation of 3 features is 3 integers, got \[0, 1\]"),
        (lambda: N.Permutation(2, permutation=[0.0, 1.0]), "a permutation of 2 features is 2 integers"),
        (lambda: N.Permutation(3, permutation=[0, 1, 1]), "a permutation of 3 features has each of 0 to 2 once"),
        (lambda: N.Permutation(3, permutation=[1, 2, 3]), "a permutation of 3 features has each of 0 to 2 once"),
        (lambda: N.Permutation(3)(torch.zeros(2, 4)), "Permutation was built for 3 channels on axis 1"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
