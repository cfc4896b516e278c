"""Linear flows."""

from __future__ import annotations

import torch

from nfkernels import nn as N

from .case import Case

CASES = [
    Case("full", lambda: N.FullLinear(5), (3, 5)),
    Case("full-image", lambda: N.FullLinear(3, bias=False), (2, 3, 2, 3)),
    Case("full-lengths", lambda: N.FullLinear(3), (3, 3, 4), lengths=(4, 1, 0)),
    Case("diagonal", lambda: N.DiagonalLinear(5), (3, 5)),
    Case("diagonal-lengths", lambda: N.DiagonalLinear(2), (3, 2, 4), lengths=(4, 1, 0)),
    Case("triangular", lambda: N.TriangularLinear(5), (3, 5)),
    Case("triangular-upper", lambda: N.TriangularLinear(3, lower=False), (2, 3, 2, 2)),
    Case("triangular-lengths", lambda: N.TriangularLinear(3), (2, 3, 4), lengths=(2, 4)),
    Case("block-diagonal", lambda: N.BlockDiagonalLinear(6, 2), (3, 6)),
    Case("block-diagonal-image", lambda: N.BlockDiagonalLinear(6, 3, bias=False), (2, 6, 2, 3)),
    Case("block-diagonal-lengths", lambda: N.BlockDiagonalLinear(4, 2), (2, 4, 3), lengths=(2, 0)),
    Case("lu", lambda: N.LULinear(5), (3, 5)),
    Case("lu-rotation-image", lambda: N.LULinear(4, start="rotation"), (2, 4, 2, 3)),
    Case("lu-softplus", lambda: N.LULinear(4, permutation="reverse", diagonal="softplus", bias=False), (9, 4)),
    Case("lu-lengths", lambda: N.LULinear(3, permutation=torch.tensor([2, 0, 1])), (2, 3, 4), lengths=(2, 4)),
    Case("householder", lambda: N.HouseholderOrthogonal(5), (3, 5)),
    Case("householder-few", lambda: N.HouseholderOrthogonal(4, 2, bias=True), (2, 4, 2, 3)),
    Case("qr", lambda: N.QRLinear(4), (3, 4)),
    Case("qr-image", lambda: N.QRLinear(3, 2, bias=False), (2, 3, 2, 2)),
    Case("conv1x1-plu", lambda: N.InvertibleConv1x1(5), (2, 5, 2, 3)),
    Case("conv1x1-full", lambda: N.InvertibleConv1x1(4, "full"), (2, 4, 3)),
    Case("conv1x1-qr", lambda: N.InvertibleConv1x1(3, "qr"), (2, 3, 2, 3)),
    Case("conv1x1-grouped", lambda: N.InvertibleConv1x1(6, groups=2), (2, 6, 2, 3)),
    Case("conv1x1-grouped-qr", lambda: N.InvertibleConv1x1(4, "qr", groups=2), (2, 4, 3)),
    Case("conv1x1-shared", lambda: N.InvertibleConv1x1(6, "full", groups=3, shared=True), (2, 6, 2, 2)),
    Case("conv1x1-tabular", lambda: N.InvertibleConv1x1(3), (4, 3)),
    Case("conv1x1-one-channel", lambda: N.InvertibleConv1x1(1), (2, 1, 2, 2)),
    Case("conv1x1-one-pixel-full", lambda: N.InvertibleConv1x1(3, "full"), (2, 3, 1, 1)),
    Case("conv1x1-lengths", lambda: N.InvertibleConv1x1(3), (3, 3, 4), lengths=(1, 4, 3)),
]
