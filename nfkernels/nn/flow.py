"""A flow: a bijection and the base distribution its latents follow."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .bases import Base
from .batches import check_finite, chunked, without_padding
from .bijection import Bijection
from .config import Recorded

if TYPE_CHECKING:
    from torch.distributions import constraints
    from typing_extensions import Self

    from .check import CheckReport
    from .distribution import FlowDistribution
    from .graphed_flow import GraphedFlow


class Flow(Recorded, nn.Module):
    """``log p(x) = log p_base(z) + logdet`` with ``z, logdet = bijection(x)``.

    Args:
        bijection: data -> latent in its forward.
        base: distribution of the latent, shape ``[*base.shape]``.
        embed: network applied to the context before the bijection sees it (an ``nn.Embedding`` for labels).

    ``x [B, *event]`` is one batch; ``context [B, ...]`` has one entry per sample, ``[1, ...]`` one for all. Drawing
    ``n`` samples gives ``[n, *event]``, with a context ``[B, ...]`` ``[n, B, *event]`` (torch's order), with a context
    of no axis (one label) ``[n, *event]`` again. ``batch_size`` computes in chunks, with equal results. In training
    mode the first batch through the flow sets what starts from data (see :meth:`initialize`).

    ``lengths`` (integers ``[B]``) are the valid positions of sequences ``x [B, C, T]``, those of the data in every
    method: what lies beyond is taken as zero, changes nothing and counts nothing. With them T may be below the base's.

    A context is embedded once for each of its entries, however many samples are drawn for it. Raises ``ValueError`` for
    a context that no layer uses, or that has another number of entries than there are samples.
    """

    __call__: Callable[..., tuple[Tensor, Tensor]]  # for type checkers: nn.Module's own says Any

    def __init__(self, bijection: Bijection, base: Base, *, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.bijection, self.base, self.embed = bijection, base, embed

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(z, logdet)``, data -> latent. Nothing is looked at on the host: this is what to compile or capture."""
        context = self._embed(context, x)
        if lengths is None:
            return self.bijection(x, context)
        return self.bijection(without_padding(x, lengths), context, lengths=lengths)

    # --- density ---

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """``log p(x | context) [B]`` in nats. Raises ``ValueError`` for non-finite data (on the CPU only)."""
        x = x if lengths is None else without_padding(x, lengths)
        self._check_data(x)
        return chunked(self._log_prob, batch_size, x, self._matched(context, x), lengths)

    def nll(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """The training loss: the batch's mean of ``-log p(x)`` in nats, a scalar."""
        return -self._log_prob(x, context, lengths).mean()

    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """The latent of x, with gradients."""
        x = x if lengths is None else without_padding(x, lengths)
        self._check_data(x)
        return chunked(lambda *a: self._run(*a)[0], batch_size, x, self._matched(context, x), lengths)

    def decode(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """The data of a latent, with gradients: the inverse of :meth:`encode`."""
        lengths = self.bijection.lengths_after(lengths)

        def inverse(z: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor:
            z = z if lengths is None else without_padding(z, lengths)
            return self.bijection.inverse(z, self._embed(context, z), lengths=lengths)[0]

        return chunked(inverse, batch_size, z, self._matched(context, z), lengths)

    # --- samples ---

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Samples ``[n, *event]`` or ``[n, B, *event]``. Temperature scales the base's standard deviation."""
        return self.rsample(n, context, temperature=temperature, generator=generator, batch_size=batch_size)

    def rsample(
        self,
        n: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """As :meth:`sample`, with gradients through the inverse (reverse KL, variational inference).

        Raises ``ValueError`` where gradients are on and the base's samples do not carry all of them (MixtureNormal).
        """
        self._check_rsample()
        return self._draw(n, context, temperature, generator, batch_size, density=False)[0]

    @torch.no_grad()
    def sample_and_log_prob(
        self,
        n: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log density ``[n]`` or ``[n, B]`` (at temperature 1) in one pass through the inverse."""
        return self.rsample_and_log_prob(
            n, context, temperature=temperature, generator=generator, batch_size=batch_size
        )

    def rsample_and_log_prob(
        self,
        n: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`sample_and_log_prob`, with gradients; raises as :meth:`rsample` does."""
        self._check_rsample()
        return self._draw(n, context, temperature, generator, batch_size, density=True)

    def reverse_kl(
        self,
        log_density: Callable[[Tensor], Tensor],
        n: int,
        context: Tensor | None = None,
        *,
        path_gradient: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of variational inference: see :func:`nfkernels.nn.variational.reverse_kl`."""
        from .variational import reverse_kl

        return reverse_kl(self, log_density, n, context, path_gradient=path_gradient, generator=generator)

    def to_distribution(
        self, context: Tensor | None = None, *, support: constraints.Constraint | None = None
    ) -> FlowDistribution:
        """The flow as a ``torch.distributions.Distribution``, of batch shape ``[B]`` under a context ``[B, ...]``.

        ``support``: where it is not all of the space (``constraints.unit_interval``, say, for values between 0 and 1).
        """
        from .distribution import FlowDistribution

        return FlowDistribution(self, context, support=support)

    def compile_graph(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Callable[..., Tensor] | None = None,
    ) -> GraphedFlow:
        """This flow with log_prob, sample and a training step played back from CUDA graphs (see :class:`GraphedFlow`)::

            fast = flow.compile_graph(batch, optimizer=optimizer)
            for batch in batches:
                loss = fast.step(batch)

        ``x`` and ``context`` are a batch as they will come: log_prob and sample are recorded for it at once where the
        flow is in evaluation mode, a step in its first calls. Other sizes are recorded when they come. Raises
        ``ValueError`` for non-finite data (on the CPU only).
        """
        from .graphed_flow import GraphedFlow

        self._check_data(x)
        return GraphedFlow(self, optimizer, loss=loss).prepare(x, context)

    # --- state ---

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> None:
        """Sets what starts from data (ActNorm) from this batch, now; in training mode the first forward does it."""
        x = x if lengths is None else without_padding(x, lengths)
        self._check_data(x)
        self.bijection.initialize(x, self._embed(context, x), lengths=lengths)

    def check(self, x: Tensor, context: Tensor | None = None) -> CheckReport:
        """Round trip, log-determinant and conditioning of every layer on real data: print what it returns."""
        from .check import check

        return check(self, x, context)

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file with the weights and the configuration, written whole or not at all."""
        from .serialize import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Self:
        """The flow saved at ``path``, in eval mode. Runs no pickle. Raises ``CheckpointError`` for any other file."""
        from .serialize import CheckpointError, load

        flow = load(path, device=device)
        if not isinstance(flow, cls):
            raise CheckpointError(f"{os.fspath(path)} holds a {type(flow).__name__}, not a {cls.__name__}")
        return flow

    # --- inside ---

    def _matched(self, context: Tensor | None, like: Tensor) -> Tensor | None:
        """The context as a tensor of one entry per sample."""
        if context is None:
            return None
        if not self.bijection.uses_context:
            raise ValueError("no layer of this flow uses a context: build its layers for one, or leave it out")
        if not isinstance(context, Tensor):
            context = torch.as_tensor(context, device=like.device)
        if context.dim() == 0:
            return context.expand(like.shape[0])
        if context.shape[0] not in (1, like.shape[0]):
            raise ValueError(f"a context has one entry per sample, got {context.shape[0]} for {like.shape[0]} samples")
        return context

    def _embed(self, context: Tensor | None, like: Tensor) -> Tensor | None:
        context = self._matched(context, like)
        context = context if self.embed is None else self._embedded(context)
        if isinstance(context, Tensor) and context.shape[0] == 1 != like.shape[0]:
            return context.expand(like.shape[0], *context.shape[1:])
        return context

    def _embedded(self, context: Tensor | None) -> Tensor:
        if context is not None:
            return self.embed(context)
        try:
            return self.embed(None)  # a network may have a token for none
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"this flow embeds a context, by a {type(self.embed).__name__} that takes no None: give it a context"
            ) from error

    def _check_rsample(self) -> None:
        if torch.is_grad_enabled() and not self.base.has_rsample:
            raise ValueError(
                f"samples of a {type(self.base).__name__} do not carry the gradients of all its parameters, which "
                "would stay where they are unnoticed: use sample(), or freeze those (base.logits.requires_grad_(False))"
            )

    def _run(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        # A flow derived from this one may have a forward without lengths.
        return self(x, context) if lengths is None else self(x, context, lengths=lengths)

    def _log_prob(self, x: Tensor, context: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        z, logdet = self._run(x, context, lengths)
        if lengths is None:
            return self.base.log_prob(z) + logdet
        return self.base.log_prob(z, lengths=self.bijection.lengths_after(lengths)) + logdet

    def _check_data(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"data must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        check_finite(x)

    def _draw(
        self,
        n: int,
        context: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
        batch_size: int | None,
        *,
        density: bool,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(n, float | Sequence):
            raise ValueError(f"n must be a whole number, how many samples to draw, got {n}")
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        batch: int | None = None
        if context is not None:
            context = torch.as_tensor(context, device=self._device())
            batch = None if context.dim() == 0 else context.shape[0]
            # Embedded before it is repeated: the network may be large.
            context = context[None] if batch is None else context
            context = self._embed(context, context)
            axes = context.shape[1:]
            context = context.expand(n, *axes) if batch is None else context.repeat(n, *[1] * len(axes))
        total = n if batch is None else n * batch
        z = self.base.sample(total, generator=generator, temperature=temperature)

        def inverse(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            x, logdet = self.bijection.inverse(z, self._embed(None, z) if context is None else context)
            return x, self.base.log_prob(z) - logdet if density else logdet

        x, log_prob = chunked(inverse, batch_size, z, context)
        if batch is None:
            return x, log_prob
        return x.unflatten(0, (n, batch)), log_prob.unflatten(0, (n, batch))

    def _device(self) -> torch.device:
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device
