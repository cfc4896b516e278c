"""normflows' layers. Its ``forward`` samples (z -> x), its ``inverse`` is what is trained."""

from __future__ import annotations

import functools

import normflows as nf
import numpy as np
import torch
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive
from normflows.flows.mixing import _LULinear
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCDF, PiecewiseRationalQuadraticCoupling
from normflows.nets import MLP, ConvNet2d
from normflows.nets.resnet import ResidualNet

from . import Case

flows = nf.flows


def _density(module, *inputs):
    return module.inverse(*inputs)


def _sampled(module, out, *inputs):
    return module(out[0], *inputs[1:])


def _case(name, make, inputs, **options):
    return Case(f"normflows.{name}", make, inputs, call=_density, inverse=_sampled, **options)


def _turned(name, make, inputs, **options):
    """The same by its forward: both directions are trained by somebody."""
    return Case(
        f"normflows.{name}.forward", make, inputs, inverse=lambda m, out, *x: m.inverse(out[0], *x[1:]), **options
    )


def _table(rows=7, width=6, spread=1.0):
    return lambda: (spread * torch.randn(rows, width),)


def _image(channels=4, side=4, rows=3):
    return lambda: (torch.randn(rows, channels, side, side),)


def _conv(inside, outside):
    return ConvNet2d((inside, 8, 8, outside), (3, 1, 3), init_zeros=False, weight_std=0.05)


def _block(channels, scale=True, scale_map="sigmoid", mode="channel"):
    inside = {"channel": (channels + 1) // 2, "channel_inv": channels // 2}.get(mode, channels)
    changed = channels if "checkerboard" in mode else channels - inside
    return flows.AffineCouplingBlock(_conv(inside, (1 + scale) * changed), scale, scale_map, mode)


class Pair(torch.nn.Module):
    """A coupling of a list ``[z1, z2]``, called with one tensor."""

    def __init__(self, scale_map, scale=True):
        super().__init__()
        self.coupling = flows.AffineCoupling(MLP([3, 8, 6 if scale else 3]), scale, scale_map)

    def forward(self, z):
        z, log_det = self.coupling(list(z.chunk(2, 1)))
        return torch.cat(z, 1), log_det

    def inverse(self, z):
        z, log_det = self.coupling.inverse(list(z.chunk(2, 1)))
        return torch.cat(z, 1), log_det


def _mask(*shape):
    return (torch.arange(int(np.prod(shape))) % 2).float().view(shape)


def _spline(width=5, **options):
    return flows.CoupledRationalQuadraticSpline(width, 1, 8, num_bins=5, **options)


def _circular(circular, width=5, bound=3.0, **options):
    return flows.CircularCoupledRationalQuadraticSpline(
        width, 1, 8, circular, num_bins=5, tail_bound=bound, init_identity=False, **options
    )


def _images(channels=5):
    def net(inside, outside):
        return nf.nets.resnet.ConvResidualNet(inside, outside, 8, num_blocks=1)

    mask = torch.arange(channels) % 2
    return PiecewiseRationalQuadraticCoupling(mask, net, num_bins=4, tails="linear", tail_bound=3.0)


def _residual(inside, outside):
    return ResidualNet(inside, outside, hidden_features=8, num_blocks=1)


class Base(torch.nn.Module):
    """A base distribution's density, called as a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        with torch.no_grad():
            for value in (*base.parameters(), *base.buffers()):
                value.normal_(std=0.1)

    def forward(self, z, *y):
        return self.base.log_prob(z, *y)


def _base(name, make, inputs, **options):
    return Case(f"normflows.{name}", lambda: Base(make()), inputs, layers=("base",), **options)


def _classes(*shape):
    return lambda: (torch.randn(6, *shape), torch.arange(6) % 3)


def _weights(*shape):
    return lambda: (torch.randn(6, *shape), torch.rand(6, 3).softmax(1))


_MAF = functools.partial(MaskedAffineAutoregressive, 3, 8, num_blocks=1)
_AR = functools.partial(flows.AutoregressiveRationalQuadraticSpline, 3, 1, 8, num_bins=5, init_identity=False)
_BOUNDS = torch.tensor([1.0, 2.0, 3.0, 2.5, 4.0])

# What takes seconds is asked of one option of each adapter.
_ALIKE = dict.fromkeys(("compile", "train"), "another option of the same adapter is tested")
# Trained for 100 steps at a time, unrolled over D passes of its network, the original takes minutes.
_SLOW = {"train": "D passes of the original, 100 times over"}
# Beyond its bounds the original gives 0, where tails are listed feature by feature: nothing leads back from there.
_LOSES = {"inverse": "the original loses what lies beyond the bounds"}

CASES = [
    _case("AffineCoupling", lambda: Pair("exp"), _table(), layers=("coupling",)),
    *(
        _case(
            f"AffineCouplingBlock[{mode}]",
            lambda m=mode: _block(5 if "channel" in m else 3, mode=m),
            inputs,
            skip=_ALIKE if "inv" in mode else {},
        )
        for mode, inputs in {
            "channel": _image(5),
            "channel_inv": _image(5),
            "checkerboard": _image(3),
            "checkerboard_inv": _image(3),
        }.items()
    ),
    _case("AffineCouplingBlock[shift]", lambda: _block(4, scale=False), _image(), skip=_ALIKE),
    _case(
        "AffineCouplingBlock[table,checkerboard]",
        lambda: flows.AffineCouplingBlock(MLP([3, 8, 6]), split_mode="checkerboard"),
        _table(),
        skip=_ALIKE,
    ),
    _turned("AffineCouplingBlock", lambda: _block(4, scale_map="sigmoid_inv"), _image()),
    _case("MaskedAffineFlow", lambda: flows.MaskedAffineFlow(_mask(6), MLP([6, 8, 6]), MLP([6, 8, 6])), _table()),
    _case("MaskedAffineFlow[shift]", lambda: flows.MaskedAffineFlow(_mask(6), MLP([6, 8, 6])), _table(), skip=_ALIKE),
    _case(
        "MaskedAffineFlow[image]",
        lambda: flows.MaskedAffineFlow(_mask(3, 2, 5), _conv(3, 3), _conv(3, 3)),
        lambda: (torch.randn(2, 3, 2, 5),),
        skip=_ALIKE,
    ),
    _case("AffineConstFlow", lambda: flows.AffineConstFlow((4, 4, 1), scale=False), _image()),
    _case("CCAffineConst", lambda: flows.CCAffineConst((4, 1, 1), 3), _weights(4, 4, 4)),
    _case("ActNorm", lambda: flows.ActNorm((4, 1, 1)), _image()),
    _case("ActNorm[table]", lambda: flows.ActNorm((6,)), _table(), skip=_ALIKE),
    Case("normflows.utils.nn.ActNorm", lambda: nf.utils.nn.ActNorm((4, 1, 1)), _image()),
    _case("Invertible1x1Conv[lu]", lambda: flows.Invertible1x1Conv(5, True), _image(5)),
    _case("Invertible1x1Conv", lambda: flows.Invertible1x1Conv(5, False), _image(5), skip=_ALIKE),
    _turned("Invertible1x1Conv[lu]", lambda: flows.Invertible1x1Conv(5, True), _image(5)),
    _case("InvertibleAffine[lu]", lambda: flows.InvertibleAffine(6), _table()),
    _turned("InvertibleAffine", lambda: flows.InvertibleAffine(6, False), _table()),
    _case("LULinearPermute", lambda: flows.LULinearPermute(6, identity_init=False), _table()),
    Case(
        "normflows._LULinear",
        lambda: _LULinear(6, identity_init=False),
        _table(),
        inverse=lambda m, out, x: m.inverse(out[0]),
        skip=_ALIKE,
    ),
    _case("Permute", lambda: flows.Permute(5), _image(5)),
    _case("Squeeze", flows.Squeeze, _image(3)),
    _case(
        "GlowBlock",
        lambda: flows.GlowBlock(5, 8, net_actnorm=True, use_lu=False),
        _image(5),
        layers=("flows.0", "flows.0.flows.1.param_map.net.1", "flows.1", "flows.2"),
    ),
    _case("CoupledRationalQuadraticSpline", _spline, _table(9, 5, 2.0)),
    _case("CoupledRationalQuadraticSpline[circular]", lambda: _spline(tails="circular"), _table(9, 5), skip=_ALIKE),
    _turned(
        "CoupledRationalQuadraticSpline[context]",
        lambda: _spline(num_context_channels=2),
        lambda: (2 * torch.randn(9, 5), torch.randn(9, 2)),
        skip=_ALIKE,
    ),
    _case("CircularCoupledRationalQuadraticSpline[mixed]", lambda: _circular([0, 1]), _table(9, 5), skip=_ALIKE),
    _case("CircularCoupledRationalQuadraticSpline[halves]", lambda: _circular([0, 2, 4]), _table(9, 5)),
    _case(
        "CircularCoupledRationalQuadraticSpline[bounds]",
        lambda: _circular([1, 2, 3], bound=_BOUNDS.clone(), mask=torch.tensor([1, 0, 0, 1, 1])),
        _table(9, 5),
        skip=_LOSES | _ALIKE,
    ),
    _case("PiecewiseRationalQuadraticCoupling[image]", _images, _image(5), skip=_ALIKE),
    Case(
        "normflows.PiecewiseRationalQuadraticCDF",
        lambda: PiecewiseRationalQuadraticCDF([5], 4, "linear", 3.0, identity_init=False),
        _table(9, 5, 2.0),
        inverse=lambda m, out, x: m.inverse(out[0]),
    ),
    _turned("MaskedAffineAutoregressive", _MAF, _table(7, 3)),
    _case("MaskedAffineAutoregressive", _MAF, _table(7, 3), skip=_SLOW),
    _case(
        "MaskedAffineAutoregressive[feedforward]",
        lambda: _MAF(use_residual_blocks=False, random_mask=True, activation=torch.tanh),
        _table(7, 3),
        skip=_SLOW,
    ),
    _turned(
        "MaskedAffineAutoregressive[context]",
        lambda: _MAF(context_features=2),
        lambda: (torch.randn(7, 3), torch.randn(7, 2)),
        skip=_ALIKE,
    ),
    _case("AutoregressiveRationalQuadraticSpline", lambda: _AR(permute_mask=True), _table(7, 3, 2.0)),
    _turned("AutoregressiveRationalQuadraticSpline", _AR, _table(7, 3, 2.0), skip=_SLOW),
    _case(
        "CircularAutoregressiveRationalQuadraticSpline",
        lambda: flows.CircularAutoregressiveRationalQuadraticSpline(
            5, 1, 8, [1, 4], num_bins=5, tail_bound=_BOUNDS.clone(), init_identity=False
        ),
        _table(7, 5),
        skip=_LOSES | _ALIKE,
    ),
    _base("DiagGaussian", lambda: nf.distributions.DiagGaussian((4, 2, 2)), _image(4, 2)),
    _base("DiagGaussian[fixed]", lambda: nf.distributions.DiagGaussian(6, trainable=False), _table(), skip=_ALIKE),
    _base("ClassCondDiagGaussian", lambda: nf.distributions.ClassCondDiagGaussian((4, 2, 2), 3), _classes(4, 2, 2)),
    _base("GlowBase", lambda: nf.distributions.GlowBase((4, 2, 2)), _image(4, 2)),
    _base("GlowBase[classes]", lambda: nf.distributions.GlowBase((4, 2, 2), 3), _classes(4, 2, 2)),
    _base("GlowBase[weights]", lambda: nf.distributions.GlowBase((4, 2, 2), 3), _weights(4, 2, 2), skip=_ALIKE),
]
