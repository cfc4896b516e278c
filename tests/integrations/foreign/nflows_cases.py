"""nflows' layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nflows import distributions, flows, transforms
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms.orthogonal import HouseholderSequence
from nflows.transforms.svd import SVDLinear
from torch import nn
from torch.nn import functional as F

from . import Case

RQ = transforms.PiecewiseRationalQuadraticCouplingTransform


def _net(inside: int, outside: int) -> ResidualNet:
    return ResidualNet(inside, outside, hidden_features=16, num_blocks=1)


def _net_with_context(inside: int, outside: int) -> ResidualNet:
    return ResidualNet(inside, outside, hidden_features=16, context_features=3, num_blocks=1)


def _conv_net(inside: int, outside: int) -> ConvResidualNet:
    return ConvResidualNet(inside, outside, hidden_channels=8, num_blocks=1)


class _Unscaled(nn.Module):
    """A network that does not tell its width."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inside, 16), nn.Tanh(), nn.Linear(16, outside))

    def forward(self, x, context=None):
        return self.body(x)


def _alternating(features: int) -> list[int]:
    return [i % 2 for i in range(features)]


def _rows(features: int, size: float = 1.0) -> Callable[[], tuple]:
    return lambda: (size * torch.randn(7, features),)


def _with_context(features: int, size: float = 1.0) -> Callable[[], tuple]:
    return lambda: (size * torch.randn(7, features), torch.randn(7, 3))


def _images(channels: int, side: int = 4) -> Callable[[], tuple]:
    return lambda: (torch.randn(3, channels, side, side),)


def _unit(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.rand(7, *shape),)


def _back(module, out, x, *context):
    return module.inverse(out[0], *context)


def _layer(name: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple], **options) -> Case:
    return Case(f"nflows.{name}", make, inputs, **{"inverse": _back, **options})


def _spline(mask, net, **options) -> Callable[[], nn.Module]:
    return lambda: RQ(mask, net, num_bins=6, **options)


DOMAIN = {"compile": "the domain is looked at, as the original does", "func": "its domain error looks at the data"}

COUPLINGS = [
    _layer("Affine", lambda: transforms.AffineCouplingTransform(_alternating(5), _net), _rows(5)),
    _layer(
        "Affine, random mask, context",
        lambda: transforms.AffineCouplingTransform([1, 1, -1, 0, 1, 0], _net_with_context),
        _with_context(6),
    ),
    _layer("Affine, images", lambda: transforms.AffineCouplingTransform([1, 1, 0], _conv_net), _images(3)),
    _layer("Additive", lambda: transforms.AdditiveCouplingTransform(_alternating(5), _net), _rows(5)),
    _layer("Additive, images", lambda: transforms.AdditiveCouplingTransform([0, 1, 1, 0], _conv_net), _images(4)),
    _layer("RQ", _spline(_alternating(5), _net, tails="linear", tail_bound=3.0), _rows(5, 2)),
    _layer(
        "RQ, context, own least sizes",
        _spline(
            [0, 0, 1, 1], _net_with_context, tails="linear", tail_bound=2.0, min_bin_width=1e-2, min_bin_height=2e-2,
            min_derivative=5e-2,
        ),
        _with_context(4, 2),
    ),
    _layer("RQ, unscaled network", _spline(_alternating(4), _Unscaled, tails="linear"), _rows(4)),
    _layer("RQ, images", _spline([1, 0, 1], _conv_net, tails="linear", tail_bound=2.0), _images(3)),
    _layer("RQ without tails", _spline(_alternating(5), _net), _unit(5), skip=DOMAIN),
    _layer(
        "RQ, unconditional too",
        _spline(_alternating(5), _net, tails="linear", tail_bound=2.0, apply_unconditional_transform=True),
        _rows(5),
    ),
    _layer(
        "RQ, unconditional too, images",
        _spline(
            [0, 1, 0], _conv_net, tails="linear", tail_bound=2.0, apply_unconditional_transform=True, img_shape=[4, 4]
        ),
        _images(3),
    ),
    _layer(
        "RQ without tails, unconditional too",
        _spline(_alternating(5), _net, apply_unconditional_transform=True),
        _unit(5),
        skip=DOMAIN,
    ),
    _layer(
        "RationalQuadraticCDF",
        lambda: transforms.PiecewiseRationalQuadraticCDF([5], num_bins=6, tails="linear", tail_bound=2.0),
        _rows(5),
    ),
    _layer(
        "RationalQuadraticCDF, images",
        lambda: transforms.PiecewiseRationalQuadraticCDF([2, 3, 3], num_bins=4, identity_init=True),
        _unit(2, 3, 3),
        skip=DOMAIN,
    ),
]  # fmt: skip


def _maf(**options) -> Callable[[], nn.Module]:
    return lambda: transforms.MaskedAffineAutoregressiveTransform(5, 12, **options)


def _spline_maf(**options) -> Callable[[], nn.Module]:
    make = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    return lambda: make(4, 12, **{"num_bins": 5, "tails": "linear", "tail_bound": 2.0, **options})


AUTOREGRESSIVE = [
    _layer("MaskedAffine", _maf(num_blocks=1), _rows(5)),
    _layer("MaskedAffine, context", _maf(context_features=3, activation=torch.tanh), _with_context(5)),
    _layer(
        "MaskedAffine, feed-forward, random masks, context",
        _maf(context_features=3, use_residual_blocks=False, random_mask=True, activation=F.elu),
        _with_context(5),
    ),
    _layer("MaskedAffine, an activation of another kind", _maf(num_blocks=1, activation=F.softplus), _rows(5)),
    _layer(
        "MaskedAffine, one feature",
        lambda: transforms.MaskedAffineAutoregressiveTransform(1, 6, num_blocks=1),
        _rows(1),
    ),
    _layer("MaskedRQ", _spline_maf(num_blocks=1), _rows(4)),
    _layer("MaskedRQ, context", _spline_maf(num_blocks=1, context_features=3), _with_context(4)),
    _layer("MaskedRQ without tails", _spline_maf(num_blocks=1, tails=None), _unit(4), skip=DOMAIN),
]


def _batch_norm() -> nn.Module:
    layer = transforms.BatchNorm(5).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


LINEAR = [
    _layer("LULinear", lambda: transforms.LULinear(5, identity_init=False), _rows(5)),
    _layer("LULinear, one feature", lambda: transforms.LULinear(1, identity_init=False), _rows(1)),
    _layer("LULinear, wide", lambda: transforms.LULinear(70, identity_init=False), _rows(70)),
    _layer("NaiveLinear", lambda: transforms.NaiveLinear(5), _rows(5), inverse=None),
    _layer("QRLinear", lambda: transforms.QRLinear(5, num_householder=3), _rows(5)),
    _layer("SVDLinear", lambda: SVDLinear(5, num_householder=4, identity_init=False), _rows(5)),
    _layer("HouseholderSequence", lambda: HouseholderSequence(5, 4), _rows(5)),
    _layer("OneByOneConvolution", lambda: transforms.OneByOneConvolution(3, identity_init=False), _images(3)),
    _layer("RandomPermutation", lambda: transforms.RandomPermutation(5), _rows(5)),
    _layer("ReversePermutation, images", lambda: transforms.ReversePermutation(4, dim=3), _images(2)),
    _layer("SqueezeTransform", transforms.SqueezeTransform, _images(3)),
    _layer("SqueezeTransform(3)", lambda: transforms.SqueezeTransform(3), _images(4, 6)),
    _layer("IdentityTransform", transforms.IdentityTransform, _rows(3)),
    _layer("PointwiseAffineTransform", lambda: transforms.PointwiseAffineTransform(1.5, torch.rand(4) + 0.5), _rows(4)),
    _layer("PointwiseAffineTransform, scalar", lambda: transforms.PointwiseAffineTransform(scale=2.0), _images(2)),
    _layer("ActNorm", lambda: transforms.ActNorm(5), _rows(5)),
    _layer("ActNorm, images", lambda: transforms.ActNorm(3), _images(3)),
    _layer("BatchNorm, training", lambda: transforms.BatchNorm(5), _rows(5), inverse=None),
    _layer("BatchNorm, evaluation", _batch_norm, _rows(5)),
]  # fmt: skip


def _chain(features: int) -> nn.Module:
    return transforms.CompositeTransform(
        [
            transforms.ActNorm(features),
            transforms.RandomPermutation(features),
            transforms.LULinear(features),
            RQ(_alternating(features), _net, num_bins=4, tails="linear", tail_bound=3.0),
            transforms.LeakyReLU(),
            transforms.InverseTransform(transforms.AffineCouplingTransform(_alternating(features), _net)),
        ]
    )


def _log_prob(model, x, *context):
    return model.log_prob(x, *context)


def _nsf(context: int | None = None) -> nn.Module:
    def net(inside, outside):
        return ResidualNet(inside, outside, hidden_features=16, num_blocks=1, context_features=context)

    layers = []
    for _ in range(2):
        layers += [
            transforms.RandomPermutation(4),
            transforms.LULinear(4),
            RQ(_alternating(4), net, num_bins=5, tails="linear", tail_bound=3.0),
        ]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))


def _sbi_maf() -> nn.Module:
    """As sbi builds it: standardized, masked affine layers and permutations, an embedding of the context."""
    layers = [transforms.PointwiseAffineTransform(0.3, torch.rand(4) + 0.5)]
    for _ in range(2):
        layers += [
            transforms.MaskedAffineAutoregressiveTransform(
                4, 12, context_features=2, num_blocks=1, use_residual_blocks=False, activation=torch.tanh
            ),
            transforms.RandomPermutation(4),
        ]
    return flows.Flow(
        transforms.CompositeTransform(layers), distributions.StandardNormal([4]), embedding_net=nn.Linear(3, 2)
    )


WHOLE = ("_transform", "_transform._transforms.1", "_distribution")
MODELS = [
    _layer("CompositeTransform", lambda: _chain(4), _rows(4), layers=("", "_transforms.3", "_transforms.5")),
    _layer("CompositeTransform of none", lambda: transforms.CompositeTransform([]), _rows(4)),
    _layer(
        "InverseTransform",
        lambda: transforms.InverseTransform(transforms.AffineCouplingTransform(_alternating(4), _net)),
        _rows(4),
    ),
    Case("nflows.StandardNormal", lambda: distributions.StandardNormal([4]), _rows(4), call=_log_prob),
    Case("nflows.StandardNormal, images", lambda: distributions.StandardNormal([2, 4, 4]), _images(2), call=_log_prob),
    Case("nflows.DiagonalNormal", lambda: distributions.DiagonalNormal([4]), _rows(4), call=_log_prob),
    Case(
        "nflows.ConditionalDiagonalNormal",
        lambda: distributions.ConditionalDiagonalNormal([4], nn.Linear(3, 8)),
        _with_context(4),
        call=_log_prob,
    ),
    Case("nflows.Flow, NSF", _nsf, _rows(4), call=_log_prob, layers=WHOLE),
    Case("nflows.Flow, NSF, context", lambda: _nsf(3), _with_context(4), call=_log_prob, layers=WHOLE),
    Case("nflows.Flow, MAF as in sbi", _sbi_maf, _with_context(4), call=_log_prob, layers=WHOLE),
]

CASES = [*COUPLINGS, *AUTOREGRESSIVE, *LINEAR, *MODELS]
