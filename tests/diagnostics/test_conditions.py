"""Condition numbers: those that are known, those of dense Jacobians, and the estimate where they are too large."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import models
from nfkernels import nn as N
from nfkernels.diagnostics import condition_numbers, conditions


def actnorm(ratio, features=3):
    layer = N.ActNorm(features)
    with torch.no_grad():
        layer.log_scale[0] = math.log(ratio)
    return layer


def test_the_worst_layer_comes_first_by_its_name():
    flow = N.Flow(N.Chain(actnorm(10.0), N.InvertibleConv1x1(3), actnorm(1000.0)), N.StandardNormal(3)).eval()
    found = condition_numbers(flow, torch.randn(4, 3))
    assert [c.layer for c in found[:2]] == ["bijection.layers.2", "bijection.layers.0"]
    assert [c.value for c in found] == pytest.approx([1000, 10, 1], rel=1e-4)
    assert all(c.exact for c in found)
    assert flow.get_submodule(found[0].layer) is flow.bijection[2]
    assert found[0].kind == "ActNorm"


def test_the_estimate_is_that_of_the_dense_jacobian(monkeypatch):
    torch.manual_seed(0)
    flow = models.Glow((1, 8, 8), levels=2, steps=3, hidden=8, grey_levels=17)
    images = torch.randint(0, 17, (16, 1, 8, 8), dtype=torch.uint8)
    flow.nll(images)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    dense = {c.layer: c for c in condition_numbers(flow, images)}
    monkeypatch.setattr(conditions, "JACOBIAN_ELEMENTS", 0)
    found = condition_numbers(flow, images, iterations=40)
    assert {c.layer for c in found} == set(dense)
    for c in found:
        assert c.exact == hasattr(flow.get_submodule(c.layer), "condition_number")
        assert c.value == pytest.approx(dense[c.layer].value, rel=0.05)
        assert c.value <= dense[c.layer].value * (1 + 1e-5)


def test_a_singular_layer_is_infinite_or_left_out():
    class Squashes(N.Bijection):
        def forward(self, x, context=None, *, lengths=None):
            return x * torch.tensor([1.0, 1.0, 0.0], dtype=x.dtype), x.new_zeros(len(x))

    flow = N.Flow(N.Chain(N.ActNorm(3), Squashes()), N.StandardNormal(3)).eval()
    found = condition_numbers(flow, torch.randn(4, 3))
    assert found[0].value > 1e15
    assert [c.layer for c in found] == ["bijection.layers.1", "bijection.layers.0"]
