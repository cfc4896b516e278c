"""Layers of Glow ports, known by their structure alone."""

from __future__ import annotations

import torch

from . import Case
from . import glow_ports as g


def _images(channels=4):
    return lambda: (torch.randn(3, channels, 5, 4),)


def _with_total(channels=4):
    return lambda: (torch.randn(3, channels, 5, 4), torch.randn(3))


def _pair(name, make, inputs, back="reverse", **options):
    """``layer(x) -> z or (z, logdet)`` and a method that undoes it."""
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    return Case(name, make, inputs, inverse=lambda m, out, *given: getattr(m, back)(first(out)), **options)


def _running(name, make, inputs, **options):
    """``layer(x, logdet, reverse)``."""

    def back(m, out, *given):
        z, total = out if isinstance(out, tuple) else (out, None)
        return m(z, total, reverse=True)

    return Case(name, make, inputs, inverse=back, **options)


def _two_tanh(s):
    return torch.exp(2 * torch.tanh(s / 2))


CASES = [
    _pair("rosinality.ActNorm", lambda: g.RoActNorm(4), _images()),
    _running("chrischute.ActNorm", lambda: g.ChActNorm(4, return_ldj=True), _with_total()),
    _running("y0ast.ActNorm2d", lambda: g.Y0ActNorm2d(5), _with_total(5)),
    _pair("survae.ActNormBijection2d", lambda: g.SvActNorm(4), _images(), "inverse"),
    _pair("FInCFlow.ActNorm", lambda: g.FiActNorm(4), _images()),
    _pair("rosinality.InvConv2d", lambda: g.RoInvConv2d(4), _images()),
    _pair("rosinality.InvConv2dLU", lambda: g.RoInvConv2dLU(5), _images(5)),
    Case("chrischute.InvConv", lambda: g.ChInvConv(4), _with_total(), skip={"float64": "its way back is float32's"}),
    _running("y0ast.InvertibleConv1x1 (LU)", lambda: g.Y0InvertibleConv1x1(5, True), _with_total(5)),
    _pair("FInCFlow.Conv1x1Householder", lambda: g.FiConv1x1Householder(4, 3), _images()),
    _pair("rosinality.AffineCoupling", lambda: g.RoAffineCoupling(6), _images(6)),
    _running("chrischute.Coupling", lambda: g.ChCoupling(3), _with_total(6)),
    _pair("survae.AffineCouplingBijection", lambda: g.SvAffineCoupling(5), _images(5), "inverse"),
    _pair("FInCFlow.Coupling", lambda: g.FiCoupling(4), _images()),
]

# Options of the same layers: values, gradients and the way back are tested, but not everything else once more.
VARIANTS = [
    _pair("rosinality.ActNorm (logdet=False)", lambda: g.RoActNorm(5, logdet=False), _images(5)),
    _running("chrischute.ActNorm (in a network)", lambda: g.ChActNorm(4), _images()),
    _running("y0ast.ActNorm2d (in a network)", lambda: g.Y0ActNorm2d(4), _images()),
    _pair("survae.ActNormBijection", lambda: g.SvActNorm(3, 0), lambda: (torch.randn(6, 3),), "inverse"),
    _pair("FInCFlow.ActNorm (2-D)", lambda: g.FiActNorm(3), lambda: (torch.randn(6, 3),)),
    _running("y0ast.InvertibleConv1x1", lambda: g.Y0InvertibleConv1x1(4, False), _with_total()),
    _running("y0ast.InvertibleConv1x1 (no logdet)", lambda: g.Y0InvertibleConv1x1(4, True), _images()),
    _pair("survae.Conv1x1", lambda: g.SvConv1x1(4), _images(), "inverse"),
    _pair("FInCFlow.Conv1x1", lambda: g.FiConv1x1(4), _images()),
    _pair("rosinality.AffineCoupling (additive)", lambda: g.RoAffineCoupling(4, affine=False), _images()),
    _pair(
        "survae.AffineCouplingBijection (sequential, 2 tanh)",
        lambda: g.SvAffineCoupling(4, "sequential", _two_tanh),
        _images(),
        "inverse",
    ),
    Case(
        "FInCFlow.Coupling (context)",
        lambda: g.FiCoupling(4, context=2),
        lambda: (torch.randn(3, 4, 5, 4), torch.randn(3, 2, 5, 4)),
        inverse=lambda m, out, x, context: m.reverse(out[0], context),
    ),
]
