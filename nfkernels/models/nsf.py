"""Neural spline flows over the columns of a table (Durkan et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.actnorm import ActNorm
from ..nn.bases import Base, DiagonalNormal, StandardNormal, Uniform
from ..nn.bijection import Bijection, Chain
from ..nn.circle import (
    CircularNormal,
    PeriodicFeatures,
    PeriodicMaskedMLP,
    PhaseShift,
    check_interval,
    circular_mask,
)
from ..nn.columns import Columns
from ..nn.conditioners import Activation
from ..nn.coupling import Coupling, SplineCoupling
from ..nn.elementwise_spline import ElementwiseSpline
from ..nn.flow import Flow
from ..nn.learned_bases import MixtureNormal, StudentT
from ..nn.masked_autoregressive import MaskedAutoregressive
from ..nn.masked_mlp import MaskedMLP
from ..nn.standardize import Standardize
from ..nn.transforms import MixedSplineTransform, SplineTransform, identity_params
from ..ops import Spline
from .tables import Linear, Mask, Network, base_over, check_choice, check_table, coupling_masks, make_network, mixing

Interval = tuple[float, float]
Build = Callable[[Tensor | None, Tensor, Spline, int], nn.Module | None]


class NSF(Flow):
    """A neural spline flow: rational-quadratic spline couplings (or autoregressive layers), with a linear layer before
    each and after the last.

    Args:
        features: number of columns D; data is ``[B, D]``, best of mean 0 and variance 1, since a spline acts on
            ``[-bound, bound]`` and leaves alone what lies outside.
        layers: spline couplings. hidden, depth: width and blocks (hidden layers, of an MLP) of their networks.
        bins, bound: of the splines.
        coupling: False: every layer is a :class:`MaskedAutoregressive` one, in which a column's spline depends on all
            columns before it: better densities at the same cost, but samples in one pass per column.
        context: width E of a context ``[B, E]`` that the networks are given: a conditional density.
        embed: network applied to the context first, of output width ``context``: for labels an
            ``nn.Embedding(classes, context)``, for observations of any form a summary network that learns along.
        circular: numbers of the columns that are angles, or hours of a day. ``interval`` is where they lie, one for all
            (``[-pi, pi)`` by default) or one for each; samples do, up to rounding, and data is taken modulo its length.
            Their splines, networks and base (:class:`CircularNormal`, on ``[-bound, bound)``) are periodic, and a
            learned rotation stands where other columns have the linear layer.
        linear: ``"lu"`` (a random permutation and an :class:`LULinear`), ``"permutation"`` or ``"none"``.
        mask: what a coupling transforms: ``"alternating"`` columns, ``"halves"``, or ``"random"`` halves; the next
            layer transforms the others. Alternating by default, random where some columns are angles.
        network, activation, dropout: of the conditioners, ``"residual"`` (:class:`ResidualNet`, as in the paper) or
            ``"mlp"``. Raw widths and heights are divided by ``sqrt(hidden)``, as nflows does.
        actnorm: an :class:`ActNorm` before every coupling but the first (of columns that are no angles).
        base: any base over ``(D,)``; N(0, I) by default. One for angles must be periodic where they are.

    Every layer starts as the identity, up to permutations. One column has nothing to be coupled to: its flow is made of
    elementwise splines, whose parameters are learned or, given a context, a network's.

    Raises ``ValueError`` for options that do not fit each other. Reference: Durkan et al. 2019, section 4 and B.1.
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 5,
        hidden: int = 64,
        depth: int = 2,
        bins: int = 8,
        bound: float = 3.0,
        coupling: bool = True,
        context: int = 0,
        embed: nn.Module | None = None,
        circular: Sequence[int] = (),
        interval: Interval | Sequence[Interval] = (-math.pi, math.pi),
        linear: Linear = "lu",
        mask: Mask | None = None,
        network: Network = "residual",
        activation: Activation = "relu",
        dropout: float = 0.0,
        actnorm: bool = False,
        base: Base | None = None,
    ) -> None:
        check_table(features, layers, hidden, context, embed, "NSF")
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        circular = [int(c) for c in circular]
        angles = circular_mask(features, circular, "NSF")
        plain = (~angles).nonzero()[:, 0].tolist()
        spline = Spline(
            bins=bins, low=-bound, high=bound, tails="circular" if angles.any() else "linear", prescale=hidden**-0.5
        )
        build = partial(
            _conditioner, kind=network, hidden=hidden, depth=depth, context=context, activation=activation,
            dropout=dropout,
        )  # fmt: skip
        if mask is not None and not coupling:
            raise ValueError(f"an autoregressive NSF couples no columns by masks, got mask={mask!r}: leave it out")
        if mask is None:
            mask = "random" if angles.any() else "alternating"
        chosen = coupling_masks(mask, features, layers, angles)
        parts: list[Bijection] = []
        if angles.any():
            parts.append(_onto_one_interval(features, circular, interval, bound))
        for i, transformed in enumerate(chosen):
            parts += _between(linear, actnorm and i > 0, angles, plain, bound)
            if coupling or transformed is None:
                parts.append(_coupling(transformed, angles, spline, build))
            else:
                parts.append(_autoregressive(angles, spline, **build.keywords))
        parts += _between(linear, False, torch.zeros_like(angles), plain, bound)
        default = partial(CircularNormal, circular=circular, low=-bound, high=bound)
        base = base_over(features, base, default if angles.any() else StandardNormal)
        if angles.any():
            _check_periodic(base, angles, bound)
        super().__init__(Chain(parts), base, embed=embed)
        self.features = features
        self.event_shape = torch.Size((features,))


def _check_periodic(base: Base, angles: Tensor, bound: float) -> None:
    """What of a base's mass lies beyond an angle's interval would be missing from the density."""
    fits = not isinstance(base, StandardNormal | DiagonalNormal | MixtureNormal | StudentT)
    if isinstance(base, CircularNormal | Uniform):
        fits = (base.low, base.high) == (-bound, bound)
        fits = fits and (isinstance(base, Uniform) or base.circular.tolist() == angles.tolist())
    if not fits:
        columns = angles.nonzero()[:, 0].tolist()
        raise ValueError(
            f"columns {columns} are angles, whose base must be periodic on [{-bound}, {bound}), got {base}: leave base "
            f"out, or give CircularNormal({len(angles)}, {columns}, low={-bound}, high={bound})"
        )


def _onto_one_interval(
    features: int, circular: Sequence[int], interval: Interval | Sequence[Interval], bound: float
) -> Standardize:
    """One spline op has one interval: angles come to that of the other columns."""
    each: list[Any] = [interval] * len(circular) if isinstance(interval[0], int | float) else list(interval)
    if len(each) != len(circular):
        raise ValueError(f"interval is one pair, or one for each of {len(circular)} circular columns: got {len(each)}")
    middle, scale = torch.zeros(features), torch.ones(features)
    for column, (low, high) in zip(circular, each, strict=True):
        check_interval(low, high, "NSF")
        middle[column], scale[column] = (low + high) / 2, (high - low) / (2 * bound)
    return Standardize(middle, scale)


def _between(linear: Linear, actnorm: bool, angles: Tensor, plain: list[int], bound: float) -> list[Bijection]:
    """The layers before a coupling: linear ones for columns that are no angles, rotations for those that are."""
    features = len(angles)
    own: list[Bijection] = [ActNorm(len(plain))] if actnorm and plain else []
    own += mixing(linear, len(plain)) if plain else []
    found: list[Bijection] = own if len(plain) == features else [Columns(layer, plain) for layer in own]
    if angles.any():
        found.append(PhaseShift(features, angles.nonzero()[:, 0].tolist(), low=-bound, high=bound))
    return found


def _coupling(transformed: Tensor | None, angles: Tensor, spline: Spline, build: Build) -> Bijection:
    if transformed is None:  # one column
        return ElementwiseSpline(1, spline=spline, conditioner=build(None, angles, spline, 1))
    moved = angles[transformed]
    if not bool(moved.any()):
        spline = replace(spline, tails="linear", derivatives=None)
    conditioner = build(~transformed, angles, spline, len(moved))
    if bool(moved.any()) and not bool(moved.all()):
        return Coupling(MixedSplineTransform(spline, moved), conditioner, transformed)
    return SplineCoupling(conditioner, transformed, spline=spline)


def _autoregressive(
    angles: Tensor,
    spline: Spline,
    *,
    kind: Network,
    hidden: int,
    depth: int,
    context: int,
    activation: Activation,
    dropout: float,
) -> Bijection:
    check_choice("network", kind, Network)
    features, count = len(angles), spline.params_per_element
    options: dict[str, Any] = {
        "layers": depth, "residual": kind == "residual", "context_channels": context, "activation": activation,
        "dropout": dropout,
    }  # fmt: skip
    net: MaskedMLP | PeriodicMaskedMLP
    if bool(angles.any()):
        numbers = angles.nonzero()[:, 0].tolist()
        net = PeriodicMaskedMLP(features, hidden, count, numbers, low=spline.low, high=spline.high, **options)
        last = net.network.last
        transform = SplineTransform(spline) if bool(angles.all()) else MixedSplineTransform(spline, angles)
    else:
        net = MaskedMLP(features, hidden, count, **options)
        transform, last = SplineTransform(spline), net.last
    with torch.no_grad():
        last.bias[: features * count].copy_(identity_params(spline, features))
    return MaskedAutoregressive(features, transform=transform, conditioner=net)


def _conditioner(
    kept: Tensor | None,
    angles: Tensor,
    spline: Spline,
    count: int,
    *,
    kind: Network,
    hidden: int,
    depth: int,
    context: int,
    activation: Activation,
    dropout: float,
) -> nn.Module | None:
    """The network that gives the splines of ``count`` columns from the columns ``kept``, or (None) from the context
    alone; it starts with splines that are the identity."""
    if kept is None and not context:
        return None
    read = angles[kept] if kept is not None else angles.new_zeros(context)
    turning = read.nonzero()[:, 0].tolist()
    net = make_network(
        kind, len(read) + len(turning), hidden, count * spline.params_per_element, depth=depth,
        context=0 if kept is None else context, activation=activation, dropout=dropout,
    )  # fmt: skip
    with torch.no_grad():
        net.last.bias.copy_(identity_params(spline, count))
    return PeriodicFeatures(net, len(read), turning, low=spline.low, high=spline.high) if turning else net
