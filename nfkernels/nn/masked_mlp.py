"""MADE: a network whose outputs for one feature see only the features before it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Degrees
from ..ops.autoregressive_inverse import MOST_LAYERS, ActivationName
from ..reference.affine_coupling import compute_dtype
from .conditioners import Activation, activation_of, drop_in_training
from .config import Recorded
from .conv_net import check_context, check_network, network_dtype, refuse_context

OrderName = Literal["natural", "reversed", "random"]


class MaskedMLP(Recorded, nn.Module):
    """``[B, D] -> [B, D * P]``: the P parameters of feature i depend on the features before i alone (MADE).

    Args:
        features: D. params_per_feature: P; feature i's are ``output[:, P * i : P * (i + 1)]``.
        hidden: width of the hidden layers.
        order: which features are before which: ``"natural"`` (0 first), ``"reversed"``, ``"random"`` (drawn once, from
            ``seed`` or torch's generator), or int64 ``[D]``, the place of each feature. Features of equal place do not
            see each other.
        passes: that many groups of features of (nearly) equal size, in that order, in the place of single features: 2
            make a coupling. An inverse takes one pass of the network per group.
        layers: hidden layers; with ``residual`` the blocks ``h + W2 act(W1 act(h))`` between the first layer and the
            last.
        context_channels: E of a context ``[B, E]``, which everything may depend on. It is added to the first layer and
            inside every block through a linear map.
        activation: see :class:`MLP`.
        dropout: probability, before the last layer or inside every block. It acts in training, where an inverse by
            passes then undoes nothing.

    The last layer starts at zero. A hidden unit of degree d sees the features of degrees below d, and the outputs of
    features of degree d and above see it; units are sorted by degree, from 1 to ``passes - 1`` (with a context from 0:
    such units see the context alone, so that the first feature depends on it too). With fewer units than degrees one
    unit stands for several: a feature then misses the nearest of those before it.

    Buffers: ``degrees`` int64 ``[D]``, from 0 to ``passes - 1``, saved; ``hidden_degrees`` and the masks, which follow
    from it, are not. What lies beside a mask in a weight is not looked at.

    Raises ``ValueError`` for sizes, orders or activations that are none. Reference: Germain et al. 2015 (MADE), eq.
    8-14; the blocks are nflows'.
    """

    degrees: Tensor
    passes: int
    _sees: Degrees | None

    def __init__(
        self,
        features: int,
        hidden: int,
        params_per_feature: int,
        *,
        order: OrderName | Tensor = "natural",
        seed: int | None = None,
        passes: int | None = None,
        layers: int = 2,
        context_channels: int = 0,
        activation: Activation = "relu",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "hidden": hidden, "params_per_feature": params_per_feature, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"MaskedMLP needs {name} of at least 1, got {size}")
        check_network((), dropout, "element")
        self.features, self.params_per_feature = features, params_per_feature
        self.in_channels, self.out_channels = features, features * params_per_feature
        self.context_channels, self.residual, self.dropout = context_channels, residual, dropout
        self.activation, self._act = activation, activation_of(activation)
        self.register_buffer("degrees", _degrees(order, features, passes, seed))
        self.first = nn.Linear(features, hidden)
        between = 2 * layers if residual else layers - 1
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(between))
        self.last = nn.Linear(hidden, self.out_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        places = (1 + layers if residual else 1) if context_channels else 0
        self.context = nn.ModuleList(nn.Linear(context_channels, hidden, bias=False) for _ in range(places))
        _make_masks(self, None)
        # Another order may come with a state: the masks are made again from it.
        self.register_load_state_dict_post_hook(_make_masks)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The params ``[B, D * P]`` of ``x [B, D]``, a feature's side by side."""
        x = x.to(network_dtype(self.first.weight))
        (first, b), *hidden, last = self.weights()
        extra = self.context_terms(context)
        act = self._act
        h = F.linear(x, first, b)
        if extra:
            h = h + extra[0]
        if self.residual:
            for i, (one, two) in enumerate(zip(hidden[::2], hidden[1::2], strict=True)):
                t = F.linear(act(h), *one)
                t = act(t if not extra else t + extra[1 + i])
                h = h + F.linear(drop_in_training(t, self.dropout, self.training), *two)
            return F.linear(h, *last)
        h = act(h)
        for layer in hidden:
            h = act(F.linear(h, *layer))
        return F.linear(drop_in_training(h, self.dropout, self.training), *last)

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """``(weight, bias)`` of every layer, first to last, with zeros where the masks are."""
        cuts = [self.first_cut, *[self.hidden_cut] * len(self.hidden), self.last_cut]
        layers = (self.first, *self.hidden, self.last)
        return [(layer.weight.masked_fill(cut, 0.0), layer.bias) for cut, layer in zip(cuts, layers, strict=True)]

    def network(self, z: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        """This network as :func:`nfkernels.ops.autoregressive_inverse` takes it, to invert a layer at ``z``; None where
        what that computes is not what the forward does (it would be in another type, say, or past a hook)."""
        fits = type(self) is MaskedMLP and not (self._forward_hooks or self._forward_pre_hooks)
        fits = fits and self._sees is not None and not (self.dropout and self.training)
        if not fits or network_dtype(self.first.weight) != compute_dtype(z):
            return None
        layers = (self.first, *self.hidden, self.last)
        terms: list[Tensor | None] = [*self.context_terms(context)]
        blocks = len(self.hidden) // 2 if self.residual else 0
        if terms and self.residual:
            terms = [terms[0], *(t for term in terms[1:] for t in (term, None))]
        terms += [None] * (1 + len(self.hidden) - len(terms))
        return {
            "weights": [layer.weight for layer in layers],
            "biases": [layer.bias for layer in layers],
            "degrees": self._sees,
            "context": terms,
            "activation": self.activation,
            "residual": [-1, *(n for i in range(blocks) for n in (-1, 2 * i))] if self.residual else None,
            "final_activation": not self.residual,
        }

    @property
    def fused(self) -> bool:
        """Whether the op's kernels know the activation."""
        return self.activation in get_args(ActivationName)

    def context_terms(self, context: Tensor | None) -> list[Tensor]:
        """What a context adds to the first layer and inside each block, each ``[B, hidden]``; empty without one."""
        if not self.context_channels:
            refuse_context(context, "MaskedMLP")
            return []
        context = check_context(context, self.context_channels, "MaskedMLP", dims=2)
        context = context.to(network_dtype(self.first.weight))
        return [layer(context) for layer in self.context]

    def extra_repr(self) -> str:
        return f"passes={self.passes}, activation={self.activation!r}, residual={self.residual}"


def _degrees(order: OrderName | Tensor, features: int, passes: int | None, seed: int | None) -> Tensor:
    """The place of every feature, from 0 without gaps."""
    if seed is not None and not (isinstance(order, str) and order == "random"):
        raise ValueError(f'a seed goes with order="random", got order={order!r}')
    if isinstance(order, Tensor):
        if order.dtype != torch.int64 or order.shape != (features,):
            raise ValueError(f"order must be int64 [{features}], got {order.dtype} {list(order.shape)}")
        degrees = order.clone() if order.is_meta else torch.unique(order, return_inverse=True)[1]
        count = features if order.is_meta else int(degrees.max()) + 1
    elif order in get_args(OrderName):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        natural = torch.arange(features)
        orders = {"natural": natural, "reversed": natural.flip(0)}
        degrees = orders[order] if order in orders else torch.randperm(features, generator=generator)
        count = features
    else:
        known = ", ".join(map(repr, get_args(OrderName)))
        raise ValueError(f"unknown order {order!r}: expected {known} or an int64 tensor")
    if passes is None:
        return degrees
    if not 1 <= passes <= count:
        raise ValueError(f"passes must be from 1 to {count}, as many as this order has places, got {passes}")
    return torch.div(degrees * passes, count, rounding_mode="floor")


def _make_masks(module: MaskedMLP, _: Any) -> None:
    degrees = module.degrees
    if not degrees.is_meta:
        module.passes = int(degrees.max()) + 1
    elif not hasattr(module, "passes"):
        module.passes = module.features
    hidden = module.first.out_features
    low = 0 if module.context_channels or module.passes == 1 else 1
    count = module.passes - low
    # Spread so that the last unit has the highest degree, however few they are: some output sees every feature.
    places = (torch.arange(1, hidden + 1, device=degrees.device) * count - 1) // hidden + low
    outputs = degrees.repeat_interleave(module.params_per_feature)
    layers = 1 + len(module.hidden)
    known = not degrees.is_meta and layers <= MOST_LAYERS
    module._sees = Degrees(tuple(degrees.tolist()), (tuple(places.tolist()),) * layers) if known else None
    module.register_buffer("hidden_degrees", places, persistent=False)
    # True where a weight counts 0: filling is one op forth and one back, choosing is two.
    module.register_buffer("first_cut", places[:, None] <= degrees, persistent=False)
    module.register_buffer("hidden_cut", places[:, None] < places, persistent=False)
    module.register_buffer("last_cut", outputs[:, None] < places, persistent=False)
