"""Every mistake gets one sentence that names what is wrong."""

from __future__ import annotations

import pytest
import torch

from nfkernels import nn as N

X = torch.zeros


def conditioned():
    return N.AffineCoupling(N.ConvConditioner(2, 4, 4, context_channels=3))


def spread(log_s: float) -> N.InvertibleConv1x1:
    layer = N.InvertibleConv1x1(2)
    with torch.no_grad():
        layer.log_s.fill_(log_s)
    return layer


def singular() -> N.InvertibleConv1x1:
    layer = N.InvertibleConv1x1(2, "full")
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


def burst(log_s: float) -> N.GlowSteps:
    layer = N.GlowSteps(2, 1, 4).eval()
    with torch.no_grad():
        layer.log_s[0, 1] = log_s
    return layer


MISTAKES = {
    "actnorm channels": (lambda: N.ActNorm(3)(X(2, 4)), r"ActNorm was built for 3 channels on axis 1, got .*\(2, 4\)"),
    "actnorm rank": (lambda: N.ActNorm(3).inverse(X(3)), r"ActNorm was built for 3 channels on axis 1, got .*\(3,\)"),
    "conv channels": (lambda: N.InvertibleConv1x1(3)(X(2, 1, 2)), "InvertibleConv1x1 was built for 3 channels"),
    "glow steps rank": (lambda: N.GlowSteps(4, 1, 2)(X(2, 4)), "GlowSteps was built for 4 channels"),
    "split channels": (lambda: N.SplitPrior(4)(X(2, 6, 2, 2)), "SplitPrior was built for 4 channels"),
    "prior channels": (lambda: N.DiagonalPrior(4).inverse(X(2, 6)), "DiagonalPrior was built for 4 channels"),
    "parametrization": (lambda: N.InvertibleConv1x1(3, "lu"), "unknown parametrization 'lu': expected 'plu', 'full'"),
    "singular": (lambda: singular()(X(1, 2)), "a matrix of this InvertibleConv1x1 is singular"),
    "singular inverse": (lambda: singular().inverse(X(1, 2)), "a matrix of this InvertibleConv1x1 is singular"),
    "log_s": (lambda: spread(-200.0)(X(1, 2)), "a matrix of this InvertibleConv1x1 is singular: log_s reached 200"),
    "log_s nan": (lambda: burst(float("nan"))(X(1, 2, 1, 1)), "this GlowSteps is singular: log_s reached nan"),
    "odd size": (lambda: N.Squeeze()(X(1, 1, 4, 5)), "size 4 x 5 cannot be squeezed by 2: every side"),
    "squeeze rank": (lambda: N.Squeeze()(X(2, 3)), r"Squeeze takes \[B, C, T\] or \[B, C, H, W\]"),
    "unsqueeze": (lambda: N.Squeeze().inverse(X(1, 3, 2, 2)), "undoing a squeeze by 2 takes"),
    "squeeze factor": (lambda: N.Squeeze(0), "Squeeze needs a factor of at least 1, got 0"),
    "squeeze lengths": (lambda: N.Squeeze()(X(1, 1, 4), lengths=torch.tensor([3])), "each must be a multiple of 2"),
    "image lengths": (lambda: N.Squeeze()(X(1, 1, 4, 4), lengths=torch.tensor([3])), "it takes no lengths"),
    "lengths shape": (lambda: N.ActNorm(1)(X(2, 1, 4), lengths=torch.tensor([3])), r"lengths \[B\] go with data"),
    "lengths rank": (lambda: N.ActNorm(1)(X(2, 1), lengths=torch.tensor([3, 1])), r"lengths \[B\] go with data"),
    "one channel": (lambda: N.AffineCoupling(N.MLP(1, 2, 2))(X(3, 1)), "needs data .* of at least 2 channels"),
    "identity": (lambda: N.AffineCoupling(N.MLP(1, 2, 2), identity="none"), "needs a half that passes through"),
    "order": (lambda: N.AffineCoupling(N.MLP(1, 2, 2), order="first"), "unknown order 'first'"),
    "scale map": (lambda: N.AffineCoupling(N.MLP(1, 2, 2), scale_map="sigmoidal"), "unknown scale map 'sigmoidal'"),
    "gain": (lambda: N.AffineCoupling(torch.nn.Tanh(), learned_gain=True), "learned_gain=True needs conditioner.out"),
    "params": (lambda: N.AffineCoupling(N.MLP(2, 4, 3))(X(2, 4)), "params have 3 channels"),
    "no context": (lambda: conditioned()(X(1, 4, 2, 2)), "built with context_channels=3: give it a context"),
    "context width": (lambda: conditioned()(X(1, 4, 2, 2), X(1, 2)), r"takes a context \[B, 3\], got shape \(1, 2\)"),
    "steps context": (lambda: N.GlowSteps(2, 1, 2, context_channels=3)(X(1, 2, 1, 1)), "this GlowSteps was built with"),
    "kernel": (lambda: N.ConvConditioner(1, 2, 3, kernel=2), "a conditioner's kernel must be odd, got 2"),
    "dropout": (lambda: N.GlowSteps(2, 1, 2, dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
    "dropout of": (lambda: N.GlowSteps(2, 1, 2, dropout_of="pixel"), "unknown dropout_of 'pixel'"),
    "few channels": (lambda: N.GlowSteps(1, 1, 2), r"needs at least 2 channels \(squeeze images first\), got 1"),
    "no steps": (lambda: N.GlowSteps(2, 0, 2), "GlowSteps needs at least 1 step and 1 hidden channel, got 0 and 2"),
    "mask dtype": (lambda: N.Coupling(N.AffineTransform(), N.MLP(1, 2, 2), X(2)), "mask must be bool"),
    "mask trivial": (lambda: N.Coupling(N.AffineTransform(), N.MLP(1, 2, 2), X(2) == 0), "all of it is one value"),
    "mask channels": (
        lambda: N.Coupling(N.AffineTransform(), N.MLP(1, 2, 2), torch.tensor([True, False]))(X(1, 3)),
        r"mask chooses among 2 channels, got data \(1, 3\)",
    ),
    "mask size": (
        lambda: N.Coupling(N.AffineTransform(), N.MLP(1, 2, 2), torch.eye(2).bool()[None])(X(1, 3, 2, 3)),
        r"mask \(1, 2, 2\) does not fit data of shape \(1, 3, 2, 3\)",
    ),
    "scale zero": (lambda: N.Standardize(0.0, 0.0), "scales that are finite and not zero"),
    "scale shape": (lambda: N.Standardize(X(3))(X(2, 4)), r"a shift \(3,\), which does not fit data \(2, 4\)"),
    "multi-scale latents": (lambda: N.MultiScale([N.Squeeze()], [(4, 1, 1)]).inverse(X(1, 3)), r"latents \[B, 4\]"),
    "multi-scale shapes": (lambda: N.MultiScale([N.Squeeze()], []), "one output shape per level: 1 levels, 0 shapes"),
    "base shape": (lambda: N.StandardNormal(3).log_prob(X(2, 4)), r"this base is over \(3,\), got .*\(2, 4\)"),
    "temperature": (lambda: N.StandardNormal(3).sample(1, temperature=-1.0), "temperature must be a finite number"),
    "uniform temperature": (lambda: N.Uniform(3).sample(1, temperature=0.5), "no standard deviation that temperature"),
    "uniform bounds": (lambda: N.Uniform(3, 1.0, 1.0), "Uniform needs low < high"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_layers(name):
    act, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)


ELSEWHERE = {
    "ActNorm": (lambda: N.ActNorm(4).eval(), (2, 4)),
    "Affine": (lambda: N.Affine(1.0, 2.0), (2, 4)),
    "BlockDiagonalLinear": (lambda: N.BlockDiagonalLinear(4, 2), (2, 4)),
    "DiagonalLinear": (lambda: N.DiagonalLinear(4), (2, 4)),
    "HouseholderOrthogonal": (lambda: N.HouseholderOrthogonal(4), (2, 4)),
    "InvertibleConv1x1": (lambda: N.InvertibleConv1x1(4), (2, 4, 3)),
    "LULinear": (lambda: N.LULinear(4), (2, 4)),
    "DiagonalPrior": (lambda: N.DiagonalPrior(4), (2, 4)),
    "EmergingConv2d": (lambda: N.EmergingConv2d(4), (2, 4, 3, 3)),
    "GlowSteps": (lambda: N.GlowSteps(4, 1, 4).eval(), (2, 4, 2, 2)),
    "PeriodicConv1d": (lambda: N.PeriodicConv1d(4), (2, 4, 3)),
    "PeriodicConv2d": (lambda: N.PeriodicConv2d(4), (2, 4, 3, 3)),
    "Permutation": (lambda: N.Permutation(4), (2, 4)),
    "Standardize": (lambda: N.Standardize(1.0, 2.0), (2, 4)),
    "SymmetricConv": (lambda: N.SymmetricConv(4), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_layer_and_data_on_different_devices(name):
    make, shape = ELSEWHERE[name]
    layer = make()
    for act in (layer, layer.inverse):
        with pytest.raises(ValueError, match=f"^{name} is on cpu but its data is on meta: move one of them$"):
            act(torch.empty(shape, device="meta"))


def test_chain_members():
    with pytest.raises(TypeError, match="a Chain is made of Bijections, got Linear"):
        N.Chain(torch.nn.Linear(1, 1))


def test_non_finite_data_is_counted_and_named():
    flow = N.Flow(N.ActNorm(48), N.StandardNormal(48)).eval()
    x = torch.randn(4, 48)
    x[2, [0, 5]], x[2, 7] = float("nan"), float("inf")
    for act in (flow.log_prob, flow.encode, flow.initialize):
        with pytest.raises(ValueError, match=r"^3 of 48 values are NaN or infinite in sample 2$"):
            act(x)
    x[3, 0] = float("-inf")
    with pytest.raises(ValueError, match=r"in sample 2 \(and some in 1 more samples\)$"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match=r"^1 of 48 values is NaN or infinite in sample 1$"):
        flow.log_prob(torch.where(torch.arange(96).reshape(2, 48) == 50, float("nan"), 0.0))
    assert flow.log_prob(torch.randn(0, 48)).shape == (0,)


def test_flow_arguments():
    flow = N.Flow(N.ActNorm(2), N.StandardNormal(2)).eval()
    with pytest.raises(ValueError, match=r"data must be a floating point tensor, got torch\.int64"):
        flow.log_prob(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        flow.sample(-1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        flow.log_prob(torch.zeros(2, 2), batch_size=0)
    with pytest.raises(ValueError, match=r"values must end in \(2,\), got shape \(4, 3\)"):
        flow.to_distribution().log_prob(torch.zeros(4, 3))
