"""What a layer of somebody else's says of its mathematics, data to latent, so that steps can be built from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...nn.fold import Folded, Scaling, diagonals, folded
from ...ops import ScaleMap, lu_compose
from ...ops.affine_coupling import IdentityName, LayoutName, OrderName
from ...reference.lu_compose import exact_dtype, no_autocast


class NotUnderstood(Exception):
    """A module is no part of a step; the message says why."""


@dataclass(frozen=True)
class Elementwise:
    """``scale x + bias`` for each channel. ``formula`` makes ``(Scaling, log|scale|)``, ``[K, C]``, of the attributes
    ``names`` stacked for K layers; ``flag`` names the buffer that says whether a first batch has set them."""

    channels: int
    names: tuple[str, ...]
    formula: Callable[..., tuple[Scaling, Tensor]]
    flag: str | None = None


@dataclass(frozen=True)
class Mix:
    """``W x`` at every position. ``compose(weight wanted, inverse wanted, *stacked)`` makes the matrices, the inverses
    (None where not wanted) and the sum of ``log|det W|``, of the attributes ``names``, stacked for K layers."""

    channels: int
    names: tuple[str, ...]
    compose: Callable[..., tuple[Tensor | None, Tensor | None, Tensor]]


@dataclass(frozen=True)
class AffineCoupling:
    """The options of :func:`nfkernels.affine_coupling`; ``to_data`` where they describe the way from the latent
    to the data. ``network`` is the path from the layer to what it calls on the channels that pass through."""

    channels: int
    split: int
    scale_map: ScaleMap
    order: OrderName
    layout: LayoutName
    identity: IdentityName
    network: tuple[str, ...]
    to_data: bool = False

    def negated(self) -> AffineCoupling:
        """The inverse, seen with the sign of all that it transforms turned round: ``(y - t) / s`` of -y is
        ``-(y + t) / s``. So an inverse coupling is a coupling, and signs are algebra on the matrices around it."""
        scale_map = self.scale_map
        if scale_map.has_scale:
            scale_map = replace(scale_map, reciprocal=not scale_map.reciprocal)
            return replace(
                self, scale_map=scale_map, order="shift_first" if self.order == "scale_first" else "scale_first"
            )
        return self

    def signs(self, like: Tensor) -> Tensor:
        """``[K, C]``, like ``like``: -1 for what the coupling transforms."""
        signs = torch.ones_like(like)
        signs.narrow(1, self.split if self.identity == "first" else 0, self.channels - self.split).fill_(-1.0)
        return signs


Part = Elementwise | Mix | AffineCoupling


def ends_of(network: nn.Module) -> tuple[int, int] | None:
    """The channels that go into a network's first convolution and come out of its last one."""
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return (convs[0].in_channels, convs[-1].out_channels) if convs else None


def linear_pattern(parts: Sequence[Part]) -> bool:
    """Whether one mix can do what these do: scalings before and after at most one mix."""
    kinds = "".join("m" if isinstance(p, Mix) else "e" for p in parts)
    return kinds in ("m", "em", "me", "eme", "e")


def fold(
    parts: Sequence[Part], tensors: Sequence[Sequence[Tensor]], weight: bool, inverse: bool
) -> tuple[Folded, Tensor]:
    """The steps' linear parts as one affine map each, both ways as wanted, and the sum of their log-determinants at
    one position; ``tensors`` are the parts' own, stacked."""
    before = after = mixes = None
    logdet = None
    for part, own in zip(parts, tensors, strict=True):
        if isinstance(part, Mix):
            *mixes, one = part.compose(weight, inverse, *own)
        else:
            scaling, log_abs = part.formula(*own)
            one = log_abs.sum()
            before, after = (scaling, after) if mixes is None else (before, scaling)
        logdet = one if logdet is None else logdet + one
    if mixes is None:
        mixes, after = (
            diagonals(before),
            Scaling(torch.ones_like(before.bias), before.bias, torch.ones_like(before.bias)),
        )
        before = None
    return folded(before, mixes[0] if weight else None, mixes[1] if inverse else None, after), logdet


def lu(weight: bool, inverse: bool, lower, upper, log_s, sign, permutation) -> tuple:
    """``P (L + I) (U + diag(sign e^log_s))`` with dense P; one launch for all K."""
    return tuple(
        lu_compose(
            lower, upper, log_s, sign=sign, permutation=permutation.argmax(-1), weight=weight, inverse=inverse
        )
    )  # fmt: skip


def dense(weight: bool, inverse: bool, matrices: Tensor) -> tuple:
    """Whole matrices: inverses and log-determinants of all K from one factorisation each, in float64."""
    with no_autocast(matrices.device.type):
        exact = matrices.to(exact_dtype(matrices))
        made = torch.linalg.inv_ex(exact)[0].to(matrices.dtype) if inverse else None
        logdet = torch.linalg.slogdet(exact)[1].sum().to(matrices.dtype)
    return matrices, made, logdet
