"""Masked and inverse autoregressive flows over the columns of a table."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..nn.bases import Base
from ..nn.bijection import Bijection, Chain
from ..nn.conditioners import Activation
from ..nn.flow import Flow
from ..nn.masked_autoregressive import MaskedAutoregressive, as_transform, params_per_feature, start_as_identity
from ..nn.masked_mlp import MaskedMLP
from ..ops import ScaleMap, Spline
from .tables import Linear, Network, base_over, check_choice, check_table, mixing

Order = Literal["alternating", "random", "natural"]


class AutoregressiveFlow(Flow):
    """What :class:`MAF` and :class:`IAF` have in common: the arguments, and all but the direction."""

    _swapped = False  # whether samples are the fast direction

    def __init__(
        self,
        features: int,
        *,
        layers: int = 5,
        hidden: int = 64,
        depth: int = 2,
        context: int = 0,
        embed: nn.Module | None = None,
        transform: ScaleMap | Spline | str = "affine",
        order: Order = "alternating",
        passes: int | None = None,
        linear: Linear = "none",
        network: Network = "mlp",
        activation: Activation = "relu",
        dropout: float = 0.0,
        base: Base | None = None,
    ) -> None:
        check_table(features, layers, hidden, context, embed, type(self).__name__)
        check_choice("order", order, Order)
        check_choice("network", network, Network)
        parts: list[Bijection] = []
        for i in range(layers):
            if i:
                parts += mixing(linear, features)
            made = as_transform(transform)
            net = MaskedMLP(
                features, hidden, params_per_feature(made),
                order=order if order != "alternating" else "reversed" if i % 2 else "natural", passes=passes,
                layers=depth, residual=network == "residual", context_channels=context, activation=activation,
                dropout=dropout,
            )  # fmt: skip
            start_as_identity(net, made)
            layer = MaskedAutoregressive(features, transform=made, conditioner=net)
            parts.append(layer.inv if self._swapped else layer)
        super().__init__(Chain(parts), base_over(features, base), embed=embed)
        self.features = features
        self.event_shape = torch.Size((features,))


class MAF(AutoregressiveFlow):
    """A masked autoregressive flow over the columns of a table ``[B, D]``: densities in one pass of each layer's
    network, samples in one per feature, which the fused inverse makes one kernel.

    Args:
        features: D.
        layers: autoregressive layers.
        hidden, depth: width and hidden layers (blocks, of a residual network) of their :class:`MaskedMLP`.
        context: width E of a context ``[B, E]`` that the networks are given: a conditional density.
        embed: network applied to the context first, of output width ``context``: for labels an
            ``nn.Embedding(classes, context)``, for observations of any form a summary network that learns along.
        transform: ``"affine"`` (the scale's logarithm soft-clipped at 6.9), a :class:`~nfkernels.ScaleMap`, a preset's
            name, or a :class:`~nfkernels.Spline`.
        order: of the features. ``"alternating"``: there and back in turn; ``"random"``: drawn for each layer;
            ``"natural"``: the same in all.
        passes: groups of features in the place of single ones: what the slow direction costs. 2 makes couplings.
        linear: between the layers: ``"none"``, ``"lu"`` (a random permutation and an :class:`LULinear`) or
            ``"permutation"``.
        network, activation, dropout: of the conditioners; ``"mlp"`` or ``"residual"``.
        base: any base over ``(D,)``; N(0, I) by default.

    With the affine transform (and splines) every layer starts as the identity. Raises ``ValueError`` for options that
    do not fit each other. Reference: Papamakarios et al. 2017.
    """


class IAF(AutoregressiveFlow):
    """An inverse autoregressive flow over ``[B, D]``: samples, and the density of its own samples, in one pass of each
    layer's network; the density of other data in one per feature. Variational inference (:meth:`Flow.reverse_kl`) asks
    for no more. Arguments as :class:`MAF` has them. Reference: Kingma et al. 2016.
    """

    _swapped = True
