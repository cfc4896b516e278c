"""Masked autoregressive layers, and their twins."""

from __future__ import annotations

import torch

from nfkernels import ScaleMap, Spline
from nfkernels import nn as N

from .case import Case


def _made(features: int, params: int = 2, **options) -> N.MaskedMLP:
    return N.MaskedMLP(features, 7, params, activation=options.pop("activation", "tanh"), **options)


def _layer(features: int, transform="affine", params: int = 2, **options) -> N.MaskedAutoregressive:
    network = _made(features, params, **options)
    return N.MaskedAutoregressive(features, transform=transform, conditioner=network)


CASES = [
    Case("maf", lambda: _layer(4), (3, 4)),
    Case("maf-relu", lambda: _layer(3, activation="relu", layers=3), (3, 3)),
    Case("maf-default-network", lambda: N.MaskedAutoregressive(3), (2, 3)),
    Case("maf-one-feature", lambda: _layer(1), (3, 1)),
    Case("maf-one-feature-context", lambda: _layer(1, context_channels=2), (3, 1), context=(3, 2)),
    Case("maf-additive", lambda: _layer(3, "additive", 1, order="reversed"), (3, 3)),
    Case(
        "maf-shift-first",
        lambda: _layer(
            4, N.AffineTransform("glow", order="shift_first", layout="scale_shift_interleaved"), order="random"
        ),
        (3, 4),
    ),
    Case("maf-two-passes", lambda: _layer(5, ScaleMap.realnvp(1.5), passes=2), (3, 5)),
    Case("maf-own-order", lambda: _layer(4, order=torch.tensor([1, 0, 2, 1]), activation="elu"), (3, 4)),
    Case("maf-residual", lambda: _layer(4, residual=True, context_channels=2, activation="silu"), (3, 4), (3, 2)),
    Case("maf-context", lambda: _layer(3, ScaleMap.nflows_softplus(), context_channels=2), (3, 3), (3, 2)),
    Case("maf-spline", lambda: _layer(3, Spline(4), 11, order="reversed"), (3, 3)),
    Case("maf-spline-context", lambda: _layer(2, Spline(3, "circular"), 9, context_channels=2), (3, 2), (3, 2)),
    Case("maf-spline-default-network", lambda: N.MaskedAutoregressive(2, transform=Spline.zuko(3)), (3, 2)),
    Case(
        "maf-angles",
        lambda: N.MaskedAutoregressive(
            3,
            transform=N.MixedSplineTransform(Spline(3, "circular"), torch.tensor([True, False, True])),
            conditioner=N.PeriodicMaskedMLP(3, 6, 9, [0, 2], low=-3.0, high=3.0, activation="tanh"),
        ),
        (3, 3),
    ),
    Case("iaf", lambda: N.Inverse(_layer(4, order="random")), (3, 4)),
]
