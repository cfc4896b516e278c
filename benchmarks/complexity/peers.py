"""What others offer for the same maps: ``torch.linalg`` by hand, nflows, normflows, zuko where they are installed.

A peer is made for a size, with weights of its own of the same kind, and changes nothing of a library but its weights.
One that cannot be made or run is recorded with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Peer:
    """``inverse(z)`` gives x; ``logdet()`` the log-determinant alone, None where it comes with the transform only.
    ``forward(x)`` is for the gate. ``weights`` change in place between calls."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    logdet: Callable[[], Tensor] | None
    weights: list[Tensor]


Builders = dict[str, Callable[[int], Peer]]


def _matrix(d: int, *batch: int) -> Tensor:
    """Well conditioned at every size."""
    return torch.eye(d) + 0.2 * torch.randn(*batch, d, d) / d**0.5


def _of_module(module: nn.Module, forward, inverse, logdet) -> Peer:
    return Peer(forward, inverse, logdet, [p for p in module.parameters() if p.numel()])


# --- torch.linalg -----------------------------------------------------------------------------------------------------


def _solve(d: int) -> Peer:
    w = _matrix(d)
    return Peer(lambda x: x @ w.mT, lambda z: torch.linalg.solve(w, z.mT).mT, lambda: torch.linalg.slogdet(w)[1], [w])


def _scale(d: int) -> Peer:
    s = 1 + 0.2 * torch.rand(d)
    return Peer(lambda x: x * s, lambda z: z / s, lambda: s.log().sum(), [s])


def _triangle(d: int) -> Peer:
    t = _matrix(d).tril()
    return Peer(lambda x: x @ t.mT, lambda z: torch.linalg.solve_triangular(t, z.mT, upper=False).mT,
                lambda: t.diagonal().log().sum(), [t])  # fmt: skip


def _blocks(d: int, c: int) -> Peer:
    w = _matrix(c, d // c)

    def split(x: Tensor) -> Tensor:
        return x.view(len(x), d // c, c).permute(1, 2, 0)

    return Peer(lambda x: (w @ split(x)).permute(2, 0, 1).reshape(-1, d),
                lambda z: torch.linalg.solve(w, split(z)).permute(2, 0, 1).reshape(-1, d),
                lambda: torch.linalg.slogdet(w)[1].sum(), [w])  # fmt: skip


def _two_triangles(d: int) -> Peer:
    lower, upper = _matrix(d).tril(), _matrix(d).triu()
    lower.fill_diagonal_(1.0)

    def inverse(z: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(lower, z.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True).mT

    return Peer(lambda x: x @ upper.mT @ lower.mT, inverse, lambda: upper.diagonal().log().sum(), [lower, upper])


def _solve_pixels(c: int) -> Peer:
    w = _matrix(c)

    def mix(x: Tensor, matrix: Tensor) -> Tensor:
        return F.conv2d(x, matrix[:, :, None, None])

    return Peer(lambda x: mix(x, w), lambda z: mix(z, torch.linalg.inv(w)), lambda: torch.linalg.slogdet(w)[1], [w])


# --- nflows -----------------------------------------------------------------------------------------------------------


def _nflows(name: str, *arguments, **options) -> Callable[[int], Peer]:
    """A class of ``nflows.transforms``, its features first; reflections: ``None`` of them means as many as features."""

    def build(d: int) -> Peer:
        from nflows import transforms

        layer = getattr(transforms, name)(d, *(d if a is None else a for a in arguments), **options)
        return _of_module(
            layer, lambda x: layer(x)[0], lambda z: layer.inverse(z)[0], getattr(layer, "logabsdet", None)
        )

    return build


def _nflows_pixels(c: int) -> Peer:
    """``OneByOneConvolution``: a permutation, then its LULinear over flattened pixels."""
    from nflows import transforms

    layer = transforms.OneByOneConvolution(c, identity_init=False)
    return _of_module(layer, lambda x: layer(x)[0], lambda z: layer.inverse(z)[0], layer.logabsdet)


# --- normflows: its forward goes from latent to data ------------------------------------------------------------------


def _normflows_lu(d: int) -> Peer:
    from normflows.flows import LULinearPermute

    layer = LULinearPermute(d, identity_init=False)
    return _of_module(layer, lambda x: layer.inverse(x)[0], lambda z: layer.forward(z)[0], layer.linear.logabsdet)


def _normflows(name: str, use_lu: bool) -> Callable[[int], Peer]:
    """Their log-determinant comes with the transform only."""

    def build(d: int) -> Peer:
        from normflows import flows

        layer = getattr(flows, name)(d, use_lu=use_lu)
        return _of_module(layer, lambda x: layer.inverse(x)[0], lambda z: layer.forward(z)[0], None)

    return build


def _normflows_permute(d: int) -> Peer:
    from normflows.flows import Permute

    layer = Permute(d)
    return Peer(lambda x: layer.inverse(x)[0], lambda z: layer.forward(z)[0], None, [])


# --- zuko -------------------------------------------------------------------------------------------------------------


def _zuko_lu(d: int) -> Peer:
    """The transform is made from its matrix at every call, as zuko's flows do."""
    from zuko.transforms import LULinearTransform

    w = _matrix(d)
    like = torch.zeros(1, d)
    return Peer(lambda x: LULinearTransform(w)(x), lambda z: LULinearTransform(w).inv(z),
                lambda: LULinearTransform(w).log_abs_det_jacobian(like, like), [w])  # fmt: skip


def _zuko_rotation(d: int) -> Peer:
    from zuko.transforms import RotationTransform

    a = torch.randn(d, d) / d**0.5
    return Peer(lambda x: RotationTransform(a)(x), lambda z: RotationTransform(a).inv(z), None, [a])


def _zuko_permutation(d: int) -> Peer:
    from zuko.transforms import PermutationTransform

    map_ = PermutationTransform(torch.randperm(d))
    return Peer(lambda x: map_(x), lambda z: map_.inv(z), None, [])


# --- by layer ---------------------------------------------------------------------------------------------------------

FULL: Builders = {
    "torch.linalg.solve": _solve,
    "nflows NaiveLinear": _nflows("NaiveLinear"),
    "normflows InvertibleAffine": _normflows("InvertibleAffine", use_lu=False),
}
DIAGONAL: Builders = {"by hand": _scale}
TRIANGULAR: Builders = {"torch.linalg.solve_triangular": _triangle}
LU: Builders = {
    "torch.linalg.solve_triangular": _two_triangles,
    "nflows LULinear": _nflows("LULinear", identity_init=False),
    "normflows LULinearPermute": _normflows_lu,
    "normflows InvertibleAffine": _normflows("InvertibleAffine", use_lu=True),
    "zuko LULinearTransform": _zuko_lu,
}
PERMUTATION: Builders = {
    "nflows RandomPermutation": _nflows("RandomPermutation"),
    "normflows Permute": _normflows_permute,
    "zuko PermutationTransform": _zuko_permutation,
}


def blocks(c: int) -> Builders:
    return {"torch.linalg.solve": lambda d: _blocks(d, c)}


def blocks_of(d: int) -> Builders:
    return {"torch.linalg.solve": lambda c: _blocks(d, c)}


def qr(reflections: int | None) -> Builders:
    return {"nflows QRLinear": _nflows("QRLinear", reflections), "nflows SVDLinear": _nflows("SVDLinear", reflections)}


def householder(reflections: int | None) -> Builders:
    rotation = {"zuko RotationTransform": _zuko_rotation} if reflections is None else {}
    return {"nflows HouseholderSequence": _nflows("HouseholderSequence", reflections), **rotation}


def mixes(kind: str) -> Builders:
    """Of channels."""
    if kind == "full":
        conv = {"normflows Invertible1x1Conv": _normflows("Invertible1x1Conv", use_lu=False)}
        return {"torch.linalg.inv": _solve_pixels, **conv}
    if kind == "plu":
        conv = {"normflows Invertible1x1Conv": _normflows("Invertible1x1Conv", use_lu=True)}
        return {"nflows OneByOneConvolution": _nflows_pixels, **conv}
    return {}


def mixes_of(kind: str, channels: int) -> Builders:
    """The same over pixels."""
    return {name: lambda d, build=build: build(channels) for name, build in mixes(kind).items()}
