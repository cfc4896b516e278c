"""Layers of speech models, known by their structure alone."""

from __future__ import annotations

import torch

from . import Case
from . import speech_flows as s

LENGTHS = torch.tensor([6, 4, 7])


def _mask(x, lengths):
    """``[B, 1, T]``, in the data's type: nobody asks gradients of it."""
    return (torch.arange(x.shape[2]) < lengths[:, None])[:, None].to(x)


def _data(channels, *more):
    def inputs():
        x = torch.randn(3, channels, 7)
        return x * _mask(x, LENGTHS), LENGTHS, *(torch.randn(shape) for shape in more)

    return inputs


def _plain(channels):
    return lambda: (torch.randn(3, channels, 7),)


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _masked(name, make, channels):
    """``layer(x, mask, reverse=False)``."""
    return Case(
        name, make, _data(channels), lambda m, x, lengths: m(x, _mask(x, lengths)),
        lambda m, out, x, lengths: m(_first(out), _mask(x, lengths), reverse=True),
    )  # fmt: skip


def _unmasked(name, make, channels):
    return Case(name, make, _plain(channels), inverse=lambda m, out, x: m(_first(out), reverse=True))


def _speaker(name, make, channels):
    return Case(
        name, make, _data(channels, (3, 2, 1)), lambda m, x, lengths, g: m(x, _mask(x, lengths), g=g),
        lambda m, out, x, lengths, g: m(_first(out), _mask(x, lengths), g=g, reverse=True),
    )  # fmt: skip


def _affine(how, net):
    return Case(
        f"RAD-TTS.AffineTransformationLayer ({how}, {net})",
        lambda: s.RadAffineTransformationLayer(4, 3, how, net),
        lambda: (torch.randn(3, 4, 7), torch.randn(3, 3, 7)),
        inverse=lambda m, out, x, context: m(out[0], context, inverse=True),
    )


CASES = [
    # The ways back of the matrices are float32's only: they are inverted there.
    Case("WaveGlow.Invertible1x1Conv", lambda: s.WgInvertible1x1Conv(4), _plain(4)),
    Case("RAD-TTS.Invertible1x1ConvLUS", lambda: s.RadInvertible1x1ConvLUS(5), _plain(5)),
    _affine("tanh", "simple_conv"),
    _masked("Glow-TTS.ActNorm", lambda: s.GtActNorm(4), 4),
    _masked("Glow-TTS.InvConvNear", lambda: s.GtInvConvNear(8), 8),
    _masked("Glow-TTS.CouplingBlock", lambda: s.GtCouplingBlock(6, 5), 6),
    _masked("VITS.ResidualCouplingLayer (mean_only)", lambda: s.VitsResidualCouplingLayer(6, 5, 0, True), 6),
    _masked("VITS.ConvFlow", lambda: s.VitsConvFlow(2, 6), 2),
]

VARIANTS = [
    Case("RAD-TTS.Invertible1x1Conv", lambda: s.RadInvertible1x1Conv(5), _plain(5)),
    _affine("exp", "wavenet"),
    _affine("sigmoid", "wavenet"),
    _affine("translate", "wavenet"),
    _unmasked("Glow-TTS.ActNorm (ddi, no mask)", lambda: s.GtActNorm(4, ddi=True), 4),
    _unmasked("Glow-TTS.InvConvNear (no mask, no Jacobian)", lambda: s.GtInvConvNear(8, 4, True), 8),
    _unmasked("Glow-TTS.CouplingBlock (sigmoid, no mask)", lambda: s.GtCouplingBlock(6, 5, 0, True), 6),
    _speaker("Glow-TTS.CouplingBlock (speaker)", lambda: s.GtCouplingBlock(6, 5, 2, True, normed=True), 6),
    _masked("VITS.ElementwiseAffine", lambda: s.VitsElementwiseAffine(2), 2),
    _masked("VITS.ResidualCouplingLayer", lambda: s.VitsResidualCouplingLayer(6, 5), 6),
    _speaker("VITS.ResidualCouplingLayer (speaker)", lambda: s.VitsResidualCouplingLayer(6, 5, 2, True), 6),
]
