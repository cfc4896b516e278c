"""Layers that mix positions."""

from __future__ import annotations

from nfkernels import nn as N

from .case import Case

EMERGING = [
    Case("emerging-square", lambda: N.EmergingConv2d(3), (2, 3, 4, 3)),
    Case("emerging-raster", lambda: N.EmergingConv2d(2, mask="raster"), (2, 2, 3, 4)),
    Case("emerging-wide-kernel", lambda: N.EmergingConv2d(2, 5, bias=False), (2, 2, 3, 2)),
    Case("emerging-one-channel", lambda: N.EmergingConv2d(1), (2, 1, 2, 3)),
    Case("emerging-one-pixel", lambda: N.EmergingConv2d(3, mask="raster"), (3, 3, 1, 1)),
    Case("emerging-kernel-of-one", lambda: N.EmergingConv2d(4, 1), (2, 4, 2, 2)),
]

CASES = [*EMERGING]
