"""``flow.check``: clean on sound flows, and it names the layer that is not."""

from __future__ import annotations

import pytest
import torch

from nfkernels import models
from nfkernels import nn as N


class WrongInverse(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        x, logdet = super().inverse(z, context, lengths=lengths)
        return x + 0.01, logdet


class WrongLogdet(N.ActNorm):
    """Off by a hundredth in both directions, so that only the Jacobian can tell."""

    def _logdet(self, x, lengths):
        return super()._logdet(x, lengths) + 0.01


class WrongSign(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        x, logdet = super().inverse(z, context, lengths=lengths)
        return x, -logdet


class Raises(N.ActNorm):
    def inverse(self, z, context=None, *, lengths=None):
        raise RuntimeError("no inverse today\nand more")


class NotFinite(N.ActNorm):
    def _logdet(self, x, lengths):
        return super()._logdet(x, lengths) + float("nan")


def flow_with(layer):
    chain = N.Chain(N.InvertibleConv1x1(3), layer, N.AffineCoupling(N.MLP(2, 4, 2)))
    with torch.no_grad():
        for p in chain.parameters():
            p.add_(0.2)
    return N.Flow(chain, N.StandardNormal(3))


def test_a_sound_flow():
    flow, x = flow_with(N.ActNorm(3)), torch.randn(5, 3)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    report = flow.check(x)
    assert report.ok
    assert [row.kind for row in report.layers] == ["InvertibleConv1x1", "ActNorm", "AffineCoupling"]
    for row in (*report.layers, report.whole):
        assert row.round_trip < 1e-4
        assert row.logdet_jacobian < 1e-9
        assert 1 <= row.condition < 1e4
    assert "all 3 layers are well" in str(report)
    assert flow.training
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items()), "check leaves the flow as it is"


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (WrongInverse, "its inverse does not undo it"),
        (WrongLogdet, "its log-determinant is not that of its Jacobian"),
        (WrongSign, "forward and inverse disagree on the log-determinant"),
        (Raises, "raised: no inverse today"),
        (NotFinite, "its log-determinant is not finite"),
    ],
)
def test_the_layer_at_fault_is_named(layer, problem):
    report = flow_with(layer(3)).check(torch.randn(5, 3))
    assert not report.ok
    assert report.faults[0].name == "layers.1"
    assert report.faults[0].kind == layer.__name__
    assert report.faults[0].problem.startswith(problem)
    assert f"at fault first: layers.1 ({layer.__name__}): {problem}" in str(report)
    assert [row.ok for row in report.layers] == [True, False, True]


def test_a_glow_with_classes_on_images():
    flow = models.Glow((1, 4, 4), levels=2, steps=1, hidden=4, classes=3, grey_levels=5, dropout=0.5)
    images, labels = torch.randint(0, 5, (4, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    flow.nll(images, labels)
    report = flow.check(images, labels)
    assert report.ok, str(report)
    assert [row.kind for row in report.layers] == [
        "Standardize", "Squeeze", "GlowSteps", "SplitPrior", "Squeeze", "GlowSteps", "DiagonalPrior",
    ]  # fmt: skip
    state = torch.random.get_rng_state()
    flow.check(images, labels)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_big_layers_skip_the_jacobian():
    flow = N.Flow(N.Chain(N.ActNorm(600), N.ActNorm(600)), N.StandardNormal(600))
    report = flow.check(torch.randn(2, 600))
    assert report.ok
    assert report.layers[0].condition != report.layers[0].condition
    assert " -  " in str(report)


def test_a_flow_of_one_layer_and_an_inverse():
    report = N.Flow(N.ActNorm(2), N.StandardNormal(2)).check(torch.randn(3, 2))
    assert report.ok
    assert len(report.layers) == 1
    assert N.Flow(N.Inverse(N.Chain(N.ActNorm(2))), N.StandardNormal(2)).check(torch.randn(3, 2)).ok
