"""The invertible layer: what every layer of this package is, and how layers make a chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .config import Recorded


class Bijection(Recorded, nn.Module):
    """An invertible map with its log-determinant. ``forward`` goes from data to latent, ``inverse`` back.

    Both take ``(x, context=None, *, lengths=None)`` and return ``(y, logdet)``: ``logdet [B]`` is ``log|det J|`` of the
    direction computed, float32 (float64 for float64 data). ``context`` goes to the conditioners, untouched.
    ``lengths`` (int64 ``[B]``) says how many positions of the last axis of ``x [B, C, T]`` are valid: the others are
    zero on both sides and count nothing.
    """

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """Sets what starts from data (ActNorm), explicitly, and returns what this layer then makes of ``x``.

        In training mode the first forward does it by itself, from its batch.
        """
        return self(x, context, lengths=lengths)[0]

    def lengths_after(self, lengths: Tensor | None) -> Tensor | None:
        """The valid lengths of the forward's output."""
        return lengths

    def lengths_before(self, lengths: Tensor | None) -> Tensor | None:
        """The valid lengths of the inverse's output."""
        return lengths

    @property
    def inv(self) -> Bijection:
        """The same layer (shared parameters), directions swapped."""
        return Inverse(self)


class Chain(Bijection):
    """Layers in the order data meets them: ``Chain(a, b)`` computes ``b(a(x))``. Takes layers or one iterable of them.

    Indexing gives a layer, slicing a chain; ``len`` and iteration work. Raises ``TypeError`` for what is no Bijection.
    """

    def __init__(self, *layers: Bijection | Iterable[Bijection]) -> None:
        super().__init__()
        if len(layers) == 1 and isinstance(layers[0], Iterable) and not isinstance(layers[0], Bijection):
            layers = tuple(layers[0])
        for layer in layers:
            if not isinstance(layer, Bijection):
                raise TypeError(f"a Chain is made of Bijections, got {type(layer).__name__}")
        self.layers = nn.ModuleList(layers)

    def forward(self, x, context=None, *, lengths=None):
        total = None
        for layer in self.layers:
            x, logdet = layer(x, context, lengths=lengths)
            total = logdet if total is None else total + logdet
            lengths = layer.lengths_after(lengths)
        return x, zero_logdet(x) if total is None else total

    def inverse(self, z, context=None, *, lengths=None):
        total = None
        for layer in reversed(self.layers):
            z, logdet = layer.inverse(z, context, lengths=lengths)
            total = logdet if total is None else total + logdet
            lengths = layer.lengths_before(lengths)
        return z, zero_logdet(z) if total is None else total

    @torch.no_grad()
    def initialize(self, x, context=None, *, lengths=None):
        for layer in self.layers:
            x = layer.initialize(x, context, lengths=lengths)
            lengths = layer.lengths_after(lengths)
        return x

    def lengths_after(self, lengths):
        for layer in self.layers:
            lengths = layer.lengths_after(lengths)
        return lengths

    def lengths_before(self, lengths):
        for layer in reversed(self.layers):
            lengths = layer.lengths_before(lengths)
        return lengths

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)

    def __getitem__(self, index: int | slice) -> Bijection:
        return Chain(*self.layers[index]) if isinstance(index, slice) else self.layers[index]


class Inverse(Bijection):
    """A bijection with its directions swapped; it shares the parameters of the one it is made of."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x, context=None, *, lengths=None):
        return self.bijection.inverse(x, context, lengths=lengths)

    def inverse(self, z, context=None, *, lengths=None):
        return self.bijection(z, context, lengths=lengths)

    def lengths_after(self, lengths):
        return self.bijection.lengths_before(lengths)

    def lengths_before(self, lengths):
        return self.bijection.lengths_after(lengths)

    @property
    def inv(self) -> Bijection:
        return self.bijection


# --- shared by the layers ---------------------------------------------------------------------------------------------


def zero_logdet(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=compute_dtype(x))


def check_channels(x: Tensor, channels: int, layer: str, *, least: int = 2) -> None:
    """One sentence for a wrong rank or channel count."""
    if x.dim() < least or x.shape[1] != channels:
        raise ValueError(f"{layer} was built for {channels} channels on axis 1, got a tensor of shape {tuple(x.shape)}")


def valid_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """bool ``[B, 1, T]``, True at valid positions; None without lengths."""
    if lengths is None:
        return None
    if x.dim() != 3 or lengths.shape != (x.shape[0],):
        raise ValueError(
            f"lengths [B] go with data [B, C, T]: got lengths {tuple(lengths.shape)} and data {tuple(x.shape)}"
        )
    return (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]


def positions(x: Tensor, lengths: Tensor | None) -> int | Tensor:
    """How many positions each sample has: a number, or ``[B]`` in the log-determinant's type."""
    return x.shape[2:].numel() if lengths is None else lengths.to(compute_dtype(x))


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """``v [C]`` shaped to broadcast over ``x [B, C, *spatial]``, in the arithmetic's type."""
    return v.to(compute_dtype(x)).reshape(-1, *[1] * (x.dim() - 2))


def refuse_lengths(lengths: Tensor | None, layer: str) -> None:
    if lengths is not None:
        raise ValueError(f"{layer} has no sequence axis: it takes no lengths")
