"""Convolutions with an inverse."""

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

SPECTRAL = [
    Case("periodic-1d-odd", lambda: N.PeriodicConv1d(3), (2, 3, 5)),
    Case("periodic-1d-even", lambda: N.PeriodicConv1d(2, 4), (2, 2, 6)),
    Case("periodic-1d-wraps-twice", lambda: N.PeriodicConv1d(2, 7, bias=False), (3, 2, 2)),
    Case("periodic-1d-depthwise", lambda: N.PeriodicConv1d(3, 2, depthwise=True), (2, 3, 4)),
    Case("periodic-2d-odd", lambda: N.PeriodicConv2d(3), (2, 3, 3, 5)),
    Case("periodic-2d-even", lambda: N.PeriodicConv2d(2, (3, 2)), (2, 2, 3, 4)),
    Case("periodic-2d-one-pixel", lambda: N.PeriodicConv2d(2, bias=False), (2, 2, 1, 1)),
    Case("periodic-2d-depthwise", lambda: N.PeriodicConv2d(3, depthwise=True), (2, 3, 4, 5)),
    Case("symmetric-1d-odd", lambda: N.SymmetricConv(3, 5, dims=1), (2, 3, 5)),
    Case("symmetric-1d-wide", lambda: N.SymmetricConv(2, 9, dims=1, bias=False), (2, 2, 2)),
    Case("symmetric-2d", lambda: N.SymmetricConv(2), (2, 2, 4, 5)),
    Case("symmetric-2d-strip", lambda: N.SymmetricConv(2, (1, 5)), (2, 2, 1, 4)),
]

CASES = [*EMERGING, *SPECTRAL]
