"""The invertible layer: what every layer of this package is, and how layers make a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ops._library import under_transform
from ..reference.affine_coupling import compute_dtype
from .config import Recorded
from .replay import gradients, random_state, set_random_state

_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Bijection(Recorded, nn.Module):
    """An invertible map with its log-determinant. ``forward`` goes from data to latent, ``inverse`` back.

    Both take ``(x, context=None, *, lengths=None)`` and return ``(y, logdet)``: ``logdet [B]`` is ``log|det J|`` of the
    direction computed, float32 (float64 for float64 data). ``context`` goes to the conditioners, untouched.
    ``lengths`` (int64 ``[B]``) says how many positions of the last axis of ``x [B, C, T]`` are valid: the others are
    zero on both sides and count nothing.

    Layers raise ``ValueError`` for data of a shape, type or device that they were not built for, for a context they
    need and do not get, and for ``lengths`` where they have no sequence axis. A layer of one's own has a ``forward``
    and an ``inverse``; everything else has a default.
    """

    __call__: Callable[..., tuple[Tensor, Tensor]]  # for type checkers: nn.Module's own says Any

    @property
    def uses_context(self) -> bool:
        """Whether a context changes anything: a :class:`Flow` with no such layer refuses one.

        A layer of one's own is taken to use it unless it says otherwise.
        """
        return True

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(z, logdet [B])``, data -> latent, of ``x [B, ...]``. Raises ``ValueError`` as the class says."""
        raise NotImplementedError

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, logdet [B])``, latent -> data; the logdet is that of this direction, minus the forward's at ``x``."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """Sets what starts from data (ActNorm), explicitly, and returns what this layer then makes of ``x``.

        In training mode the first forward does it by itself, from its batch.
        """
        return self(x, context, lengths=lengths)[0]

    @torch.no_grad()
    def from_output(
        self,
        z: Tensor,
        dz: Tensor | None,
        dlogdet: Tensor | None,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """``(x, dx, gradients of wanted)`` of a forward that gave ``z``, without a graph: for training that keeps no
        activations (:class:`ReversibleSequential`).

        ``dz`` and ``dlogdet`` are the loss's gradients with respect to the forward's results, None for zero; ``wanted``
        holds parameters of this layer and perhaps its context; ``lengths`` are those of x. Here x is found by
        ``inverse`` and the forward runs again on it; a layer that can do with less says so itself. Random numbers are
        drawn alike in both.
        """
        state = random_state(z.device)
        x, _ = self.inverse(z, context, lengths=self.lengths_after(lengths))
        set_random_state(state, z.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = self(x, context, lengths=lengths)
        dx, *found = gradients(out, [x, *wanted], (dz, dlogdet))
        return x.detach(), dx, found

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

    The data's shape is what the layers make of it; the logdet ``[B]`` is the sum of theirs, 0 for no layer. Indexing
    gives a layer, slicing a chain; ``len`` and iteration work. Raises ``TypeError`` for what is no Bijection.
    """

    layers: Any  # nn.ModuleList, whose elements no type checker knows

    def __init__(self, *layers: Bijection | Iterable[Bijection]) -> None:
        super().__init__()
        given: tuple[Any, ...] = layers
        if len(layers) == 1 and isinstance(layers[0], Iterable) and not isinstance(layers[0], Bijection):
            given = tuple(layers[0])
        for layer in given:
            if not isinstance(layer, Bijection):
                raise TypeError(f"a Chain is made of Bijections, got {type(layer).__name__}")
        self.layers = nn.ModuleList(given)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        total = None
        for layer in self.layers:
            x, logdet = layer(x, context, lengths=lengths)
            total = logdet if total is None else total + logdet
            lengths = layer.lengths_after(lengths)
        return x, zero_logdet(x) if total is None else total

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        total = None
        for layer in reversed(self.layers):
            z, logdet = layer.inverse(z, context, lengths=lengths)
            total = logdet if total is None else total + logdet
            lengths = layer.lengths_before(lengths)
        return z, zero_logdet(z) if total is None else total

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer.initialize(x, context, lengths=lengths)
            lengths = layer.lengths_after(lengths)
        return x

    @property
    def uses_context(self) -> bool:
        return any(layer.uses_context for layer in self.layers)

    def lengths_after(self, lengths: Tensor | None) -> Tensor | None:
        for layer in self.layers:
            lengths = layer.lengths_after(lengths)
        return lengths

    def lengths_before(self, lengths: Tensor | None) -> Tensor | None:
        for layer in reversed(self.layers):
            lengths = layer.lengths_before(lengths)
        return lengths

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)

    @overload
    def __getitem__(self, index: int) -> Bijection: ...

    @overload
    def __getitem__(self, index: slice) -> Chain: ...

    def __getitem__(self, index: int | slice) -> Bijection:
        return Chain(*self.layers[index]) if isinstance(index, slice) else self.layers[index]


class Inverse(Bijection):
    """A bijection with its directions swapped, shapes too; it shares the parameters of the one it is made of.

    What starts from data (ActNorm) starts in its own forward, which an Inverse runs on latents: inside one it keeps
    the parameters it has, in training too, and :meth:`initialize` raises ``ValueError`` if it has not started yet.
    Initialize the layer itself, ``inverse.inv.initialize(...)``, from what its forward takes.
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context, lengths=lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.bijection(z, context, lengths=lengths)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        for module in self.bijection.modules():
            if getattr(module, "_started", True) is False and not bool(module.initialized):
                raise ValueError(
                    f"{type(module).__name__} inside an Inverse cannot start from data that meets its output: "
                    "initialize it alone, by inverse.inv.initialize(...), from what its own forward takes"
                )
        return self(x, context, lengths=lengths)[0]

    @property
    def uses_context(self) -> bool:
        return self.bijection.uses_context

    def lengths_after(self, lengths: Tensor | None) -> Tensor | None:
        return self.bijection.lengths_before(lengths)

    def lengths_before(self, lengths: Tensor | None) -> Tensor | None:
        return self.bijection.lengths_after(lengths)

    @property
    def inv(self) -> Bijection:
        return self.bijection


# --- shared by the layers ---------------------------------------------------------------------------------------------


def reads_values(x: Tensor) -> bool:
    """Whether looking at values is free here: CPU, neither traced nor transformed, and no fake tensors, without any."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or under_transform():
        return False
    return not isinstance(x, FakeTensor) and torch._C._get_dispatch_mode(_FAKE) is None


def zero_logdet(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=compute_dtype(x))


def check_floating(x: Tensor, layer: str) -> None:
    """Whole numbers would come back rounded to whole numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{layer} takes floating point data, got {x.dtype}: convert it first, for example by .float()")


def check_device(x: Tensor, own: Tensor, layer: str) -> None:
    """``own`` is any tensor of the layer: apart from its data, results may be memory that nothing wrote."""
    if own.device != x.device:
        raise ValueError(f"{layer} is on {own.device} but its data is on {x.device}: move one of them")


def check_channels(x: Tensor, channels: int, layer: str, *, least: int = 2, own: Tensor | None = None) -> None:
    """One sentence for a wrong type, rank or channel count, or (given a tensor of the layer) a wrong device."""
    check_floating(x, layer)
    if own is not None:
        check_device(x, own, layer)
    if x.dim() < least or x.shape[1] != channels:
        raise ValueError(f"{layer} was built for {channels} channels on axis 1, got a tensor of shape {tuple(x.shape)}")


def describe_non_finite(x: Tensor) -> str | None:
    """Counts and names what is NaN or infinite in ``x [B, ...]``, in one sentence; None if nothing is. Reads values."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return None
    per_sample = (~finite).reshape(x.shape[0], -1).sum(1)
    bad = per_sample.nonzero()[:, 0].tolist()
    first = bad[0]
    more = f" (and some in {len(bad) - 1} more samples)" if len(bad) > 1 else ""
    count = int(per_sample[first])
    verb = "is" if count == 1 else "are"
    return f"{count} of {x[0].numel()} values {verb} NaN or infinite in sample {first}{more}"


def check_width(count: int, layer: str, unit: str = "channel") -> None:
    if count < 1:
        raise ValueError(f"{layer} needs at least 1 {unit}, got {count}")


def check_lengths(x: Tensor, lengths: Tensor) -> None:
    """``lengths [B]``, whole numbers from 0 to T (values looked at on the CPU only), for ``x [B, C, T]``."""
    if x.dim() != 3 or lengths.shape != (x.shape[0],):
        raise ValueError(
            f"lengths [B] go with data [B, C, T]: got lengths {tuple(lengths.shape)} and data {tuple(x.shape)}"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers [B], got {lengths.dtype}")
    if reads_values(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > x.shape[2]:
            wrong = low if low < 0 else high
            raise ValueError(f"lengths must be from 0 to {x.shape[2]} for data {tuple(x.shape)}, got {wrong}")


def valid_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """bool ``[B, 1, T]``, True at valid positions; None without lengths."""
    if lengths is None:
        return None
    check_lengths(x, lengths)
    return (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]


def positions(x: Tensor, lengths: Tensor | None) -> int | Tensor:
    """How many positions each sample has: a number, or ``[B]`` in the log-determinant's type."""
    if lengths is None:
        return x.shape[2:].numel()
    check_lengths(x, lengths)
    return lengths.to(compute_dtype(x))


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """``v [C]`` shaped to broadcast over ``x [B, C, *spatial]``, in the arithmetic's type."""
    return v.to(compute_dtype(x)).reshape(-1, *[1] * (x.dim() - 2))


def refuse_lengths(lengths: Tensor | None, layer: str) -> None:
    if lengths is not None:
        raise ValueError(f"{layer} has no sequence axis: it takes no lengths")
