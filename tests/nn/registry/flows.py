"""Couplings, mixes, priors, reshapings, and the layers made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from nfkernels import ScaleMap
from nfkernels import nn as N

from .case import Case


def _conv(channels: int, out: int, **options) -> N.ConvConditioner:
    return N.ConvConditioner(channels, 6, out, **options)


def _small_multi_scale() -> N.Bijection:
    first = N.Chain(N.Squeeze(), N.GlowSteps(4, 1, 5), N.SplitPrior(4))
    last = N.Chain(N.Squeeze(), N.GlowSteps(8, 1, 5), N.DiagonalPrior(8))
    return N.MultiScale([first, last], [(4, 2, 2), (8, 1, 1)])


def _checkerboard(height: int, width: int) -> Tensor:
    return (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0


CHANNELS = torch.tensor([True, False, False, True, True])

CASES = [
    Case("actnorm-image", lambda: N.ActNorm(5), (3, 5, 2, 3)),
    Case("actnorm-tabular", lambda: N.ActNorm(3), (4, 3)),
    Case("actnorm-one-channel", lambda: N.ActNorm(1), (2, 1, 3)),
    Case("actnorm-lengths", lambda: N.ActNorm(3), (3, 3, 4), lengths=(4, 2, 0)),
    Case("affine-mlp", lambda: N.AffineCoupling(N.MLP(3, 6, 4)), (3, 5)),
    Case("affine-second", lambda: N.AffineCoupling(N.MLP(2, 6, 6), identity="second", order="shift_first"), (3, 5)),
    Case(
        "affine-sequential",
        lambda: N.AffineCoupling(torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))),
        (3, 2),
    ),
    Case("affine-image", lambda: N.AffineCoupling(_conv(2, 4), scale_map="exp"), (2, 4, 2, 3)),
    Case(
        "affine-image-context",
        lambda: N.AffineCoupling(_conv(2, 4, context_channels=3), layout="scale_shift_interleaved"),
        (2, 4, 5, 4),
        context=(2, 3),
    ),
    Case(
        "affine-spatial-context",
        lambda: N.AffineCoupling(_conv(2, 2, context_channels=2)),
        (2, 3, 2, 2),
        context=(2, 2, 2, 2),
    ),
    Case("affine-additive", lambda: N.AffineCoupling(_conv(2, 1), scale_map="additive"), (2, 3, 2, 2)),
    Case(
        "affine-gain",
        lambda: N.AffineCoupling(_conv(2, 4), scale_map=ScaleMap.realnvp(1.5), learned_gain=True),
        (2, 4, 2, 2),
    ),
    Case("affine-lengths", lambda: N.AffineCoupling(_conv(2, 4, dims=1)), (3, 4, 5), lengths=(5, 2, 1)),
    Case("coupling-channels", lambda: N.Coupling(N.AffineTransform("exp"), N.MLP(2, 6, 6), CHANNELS), (3, 5)),
    Case(
        "coupling-channels-image",
        lambda: N.Coupling(N.AffineTransform(order="shift_first"), _conv(2, 6), CHANNELS),
        (2, 5, 2, 2),
    ),
    Case(
        "coupling-checkerboard",
        lambda: N.Coupling(N.AffineTransform("glow"), _conv(2, 4), _checkerboard(3, 4)[None]),
        (2, 2, 3, 4),
    ),
    Case(
        "coupling-one-channel",
        lambda: N.Coupling(N.AdditiveTransform(), _conv(1, 1), _checkerboard(2, 2)[None]),
        (2, 1, 2, 2),
    ),
    Case(
        "coupling-lengths",
        lambda: N.Coupling(N.AffineTransform(), _conv(2, 6, dims=1, context_channels=2), CHANNELS),
        (2, 5, 4),
        context=(2, 2),
        lengths=(3, 4),
    ),
    Case("squeeze", lambda: N.Squeeze(), (2, 3, 4, 2)),
    Case("squeeze-by-3", lambda: N.Squeeze(3), (2, 1, 3, 6)),
    Case("squeeze-sequence", lambda: N.Squeeze(2), (2, 3, 6), lengths=(4, 6)),
    Case("split-prior", lambda: N.SplitPrior(5), (2, 5, 3, 2)),
    Case("split-prior-context", lambda: N.SplitPrior(4, context_channels=3), (2, 4, 2, 2), context=(2, 3)),
    Case("split-prior-one-pixel", lambda: N.SplitPrior(2, kernel=1), (3, 2, 1, 1)),
    Case("split-prior-lengths", lambda: N.SplitPrior(3), (2, 3, 4), lengths=(2, 4)),
    Case("diagonal-prior", lambda: N.DiagonalPrior(3), (2, 3, 2, 2)),
    Case("diagonal-prior-context", lambda: N.DiagonalPrior(3, context_channels=2), (3, 3), context=(3, 2)),
    Case("diagonal-prior-lengths", lambda: N.DiagonalPrior(2), (2, 2, 3), lengths=(1, 3)),
    Case("standardize", lambda: N.Standardize(0.5, 0.25), (2, 3, 2)),
    Case(
        "standardize-channels",
        lambda: N.Standardize(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -3.0])),
        (2, 2, 3, 2),
    ),
    Case("standardize-lengths", lambda: N.Standardize(1.0, torch.tensor([0.5, 2.0])), (2, 2, 4), lengths=(3, 0)),
    Case("glow-steps", lambda: N.GlowSteps(4, 2, 5), (2, 4, 2, 2)),
    Case("glow-steps-odd-one-pixel", lambda: N.GlowSteps(3, 2, 5, order="scale_first", scale_map="exp"), (3, 3, 1, 1)),
    Case("glow-steps-convolutions", lambda: N.GlowSteps(2, 1, 4, scale_map=ScaleMap.freia()), (2, 2, 5, 4)),
    Case(
        "glow-steps-context",
        lambda: N.GlowSteps(4, 2, 5, context_channels=3, last_kernel=1, scale_map="additive", dropout=0.2),
        (2, 4, 3, 2),
        context=(2, 3),
    ),
    Case("glow-steps-reversible", lambda: N.GlowSteps(4, 3, 5, memory="reversible"), (2, 4, 3, 2)),
    Case("glow-steps-odd-reversible", lambda: N.GlowSteps(3, 2, 5, scale_map="exp", memory="reversible"), (2, 3, 5, 4)),
    Case(
        "glow-steps-context-reversible",
        lambda: N.GlowSteps(4, 2, 5, context_channels=3, scale_map="additive", memory="reversible"),
        (2, 4, 3, 2),
        context=(2, 3),
    ),
    Case(
        "reversible",
        lambda: N.ReversibleSequential(
            N.Chain(N.ActNorm(4), N.InvertibleConv1x1(4), N.AffineCoupling(_conv(2, 4, context_channels=2))),
            N.Coupling(N.AffineTransform("exp"), _conv(2, 4), torch.tensor([True, False, True, False])),
            N.InvertibleConv1x1(4, groups=2),
            N.AffineCoupling(_conv(2, 4), scale_map=ScaleMap.realnvp(1.5), learned_gain=True, identity="second"),
        ),
        (2, 4, 3, 2),
        context=(2, 2),
    ),
    Case(
        "reversible-glow-steps",
        lambda: N.ReversibleSequential(N.GlowSteps(4, 2, 3), N.GlowSteps(4, 1, 3, context_channels=2)),
        (2, 4, 3, 2),
        context=(2, 2),
    ),
    Case(
        "reversible-lengths",
        lambda: N.ReversibleSequential(
            N.ActNorm(2), N.Squeeze(2), N.InvertibleConv1x1(4), N.AffineCoupling(_conv(2, 4, dims=1)), N.Squeeze(2).inv
        ),
        (2, 2, 6),
        lengths=(4, 6),
    ),
    Case("multi-scale", _small_multi_scale, (2, 1, 4, 4)),
    Case("chain", lambda: N.Chain(N.ActNorm(3), N.InvertibleConv1x1(3), N.AffineCoupling(N.MLP(2, 5, 2))), (3, 3)),
    Case(
        "chain-lengths",
        lambda: N.Chain(
            N.ActNorm(2), N.Squeeze(2), N.InvertibleConv1x1(4), N.AffineCoupling(_conv(2, 4, dims=1)), N.Squeeze(2).inv
        ),
        (2, 2, 6),
        lengths=(4, 6),
    ),
    Case("empty-chain", lambda: N.Chain(), (2, 3)),
    Case("inverse", lambda: N.Inverse(N.Chain(N.ActNorm(2), N.AffineCoupling(_conv(1, 2)))), (2, 2, 2, 2)),
]
