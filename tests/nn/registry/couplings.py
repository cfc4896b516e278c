"""Couplings by any mask, their networks, and splines."""

from __future__ import annotations

import torch

from nfkernels import Spline
from nfkernels import nn as N

from .case import Case

SPLINE = Spline(5, low=-1.5, high=1.5)  # so that some of the data lie outside
CIRCLE = Spline.circular(4, -1.0, 1.0)
CHANNELS = torch.tensor([True, False, False, True, True])


def _mlp(inputs: int, transformed: int, spline: Spline, **options) -> N.MLP:
    return N.MLP(inputs, 6, transformed * spline.params_per_element, **options)


def _angles(inputs: int, circular: list[int], outputs: int, **options) -> N.PeriodicFeatures:
    net = N.MLP(inputs + len(circular), 6, outputs, **options)
    return N.PeriodicFeatures(net, inputs, circular, low=-1.0, high=1.0)


CASES = [
    Case("affine-mask", lambda: N.AffineCoupling(N.MLP(2, 6, 6), mask=CHANNELS, learned_gain=True), (3, 5)),
    Case("affine-mask-sliced", lambda: N.AffineCoupling(N.MLP(2, 6, 6), mask=N.masks.alternating(5)), (3, 5)),
    Case(
        "affine-mask-checkerboard",
        lambda: N.AffineCoupling(
            N.ConvConditioner(2, 5, 4), scale_map="realnvp", learned_gain=True, mask=N.masks.checkerboard(2, 3)
        ),
        (2, 2, 2, 3),
    ),
    Case("additive", lambda: N.AdditiveCoupling(N.MLP(2, 5, 3), identity="second"), (3, 5)),
    Case("additive-mask", lambda: N.AdditiveCoupling(N.MLP(2, 5, 3), mask=CHANNELS), (3, 5)),
    Case(
        "additive-mask-lengths",
        lambda: N.AdditiveCoupling(N.ConvConditioner(2, 5, 2, dims=1), mask=N.masks.checkerboard(4)),
        (3, 2, 4),
        lengths=(4, 1, 0),
    ),
    Case("residual-net", lambda: N.AffineCoupling(N.ResidualNet(3, 6, 4, activation="elu")), (3, 5)),
    Case(
        "residual-net-glu",
        lambda: N.AffineCoupling(N.ResidualNet(3, 6, 4, context_channels=2, activation="silu", dropout=0.3)),
        (3, 5),
        context=(3, 2),
    ),
    Case(
        "residual-net-add",
        lambda: N.AffineCoupling(N.ResidualNet(3, 6, 4, blocks=1, context_channels=2, context_by="add")),
        (3, 5),
        context=(3, 2),
    ),
    Case(
        "conv-residual-net",
        lambda: N.AffineCoupling(N.ConvResidualNet(1, 4, 2, context_channels=2), scale_map="realnvp"),
        (2, 2, 3, 2),
        context=(2, 2),
    ),
    Case(
        "conv-residual-net-spatial",
        lambda: N.AdditiveCoupling(N.ConvResidualNet(2, 4, 1, blocks=1, context_channels=2, kernel=1)),
        (2, 3, 2, 2),
        context=(2, 2, 2, 2),
    ),
    Case("mlp-tanh", lambda: N.AffineCoupling(N.MLP(2, 6, 4, activation="tanh", dropout=0.2)), (3, 4)),
    Case("spline-coupling", lambda: N.SplineCoupling(_mlp(2, 3, SPLINE), CHANNELS, spline=SPLINE), (4, 5)),
    Case(
        "spline-coupling-unit",
        lambda: N.SplineCoupling(_mlp(1, 1, Spline.unit(3)), N.masks.halves(2), spline=Spline.unit(3)),
        (3, 2),
        domain="unit",
        latent="unit",
    ),
    Case(
        "spline-coupling-zuko",
        lambda: N.SplineCoupling(_mlp(2, 2, Spline.zuko(4)), N.masks.alternating(4), spline=Spline.zuko(4)),
        (3, 4),
    ),
    Case(
        "spline-coupling-context",
        lambda: N.SplineCoupling(
            N.ResidualNet(2, 6, 2 * SPLINE.params_per_element, context_channels=3),
            N.masks.halves(4, "second"),
            spline=SPLINE,
        ),
        (3, 4),
        context=(3, 3),
    ),
    Case(
        "spline-coupling-image",
        lambda: N.SplineCoupling(N.ConvConditioner(1, 4, SPLINE.params_per_element), N.masks.halves(2), spline=SPLINE),
        (2, 2, 2, 3),
    ),
    Case(
        "spline-coupling-checkerboard",
        lambda: N.SplineCoupling(
            N.ConvConditioner(1, 4, SPLINE.params_per_element), N.masks.checkerboard(2, 3), spline=SPLINE
        ),
        (2, 1, 2, 3),
    ),
    Case(
        "spline-coupling-lengths",
        lambda: N.SplineCoupling(
            N.ConvConditioner(1, 4, SPLINE.params_per_element, dims=1), N.masks.halves(2), spline=SPLINE
        ),
        (3, 2, 4),
        lengths=(4, 2, 0),
    ),
    Case(
        "spline-coupling-circular",
        lambda: N.SplineCoupling(
            _angles(1, [0], 2 * CIRCLE.params_per_element, context_channels=2),
            N.masks.channels(3, [0, 2]),
            spline=CIRCLE,
        ),
        (3, 3),
        context=(3, 2),
        domain="symmetric",
        latent="symmetric",
    ),
    Case(
        "spline-coupling-mixed",
        lambda: N.Coupling(
            N.MixedSplineTransform(CIRCLE, torch.tensor([True, False])),
            _angles(2, [1], 2 * CIRCLE.params_per_element),
            N.masks.channels(4, [0, 1]),
        ),
        (3, 4),
        domain="symmetric",
        latent="symmetric",
    ),
    Case("elementwise-spline", lambda: N.ElementwiseSpline(3, spline=SPLINE), (4, 3)),
    Case("elementwise-spline-lengths", lambda: N.ElementwiseSpline(2, spline=SPLINE), (3, 2, 4), lengths=(3, 0, 4)),
    Case(
        "elementwise-spline-context",
        lambda: N.ElementwiseSpline(1, spline=SPLINE, conditioner=_mlp(2, 1, SPLINE)),
        (4, 1),
        context=(4, 2),
    ),
    Case(
        "circular-spline",
        lambda: N.CircularSpline(3, bins=4, low=-1.0, high=1.0),
        (4, 3),
        domain="symmetric",
        latent="symmetric",
    ),
    Case(
        "circular-spline-context-lengths",
        lambda: N.CircularSpline(2, bins=4, low=-1.0, high=1.0, conditioner=_mlp(2, 2, CIRCLE)),
        (2, 2, 3),
        context=(2, 2),
        lengths=(3, 1),
        domain="symmetric",
        latent="symmetric",
    ),
    Case("phase-shift", lambda: N.PhaseShift(3, [0, 2], low=-1.0, high=1.0), (4, 3), domain="symmetric"),
    Case(
        "phase-shift-lengths",
        lambda: N.PhaseShift(2, low=-1.0, high=1.0),
        (2, 2, 3),
        lengths=(3, 1),
        domain="symmetric",
        latent="symmetric",
    ),
    Case(
        "reversible-splines",
        lambda: N.ReversibleSequential(
            N.SplineCoupling(_mlp(2, 2, SPLINE), N.masks.alternating(4), spline=SPLINE),
            N.LULinear(4),
            N.AffineCoupling(N.MLP(2, 5, 4), mask=N.masks.halves(4), scale_map="realnvp", learned_gain=True),
            N.AdditiveCoupling(N.MLP(2, 5, 2)),
        ),
        (3, 4),
    ),
    Case("columns", lambda: N.Columns(N.LULinear(2), [3, 1]), (3, 4)),
    Case("columns-coupling", lambda: N.Columns(N.AffineCoupling(N.MLP(2, 5, 2)), [0, 1, 3]), (3, 4)),
    Case("columns-lengths", lambda: N.Columns(N.DiagonalLinear(1), [1]), (2, 2, 3), lengths=(3, 1)),
]
