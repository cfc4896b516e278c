"""A flow as a ``torch.distributions.Distribution``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from .flow import Flow


class FlowDistribution(Distribution):
    """``Flow.to_distribution(context)``: batch shape ``[B]`` for a context ``[B, ...]``, else empty.

    It goes wherever torch's distributions do: into ``Independent``, ``MixtureSameFamily``, ``TransformedDistribution``;
    it expands, and ``log_prob`` broadcasts values ``[*sample, *batch, *event]`` against the context. ``has_rsample`` is
    the base's. For an image flow the values are x in ``[0, 1)``. A context ``[1, ...]`` is embedded once, however many
    values there are.

    ``support`` is all of ``[*event]`` unless one is given: a flow does not know where its layers' ranges end.
    Mean, variance and entropy have no closed form: they, and ``kl_divergence``, raise ``NotImplementedError``
    (:meth:`Flow.reverse_kl` estimates the latter from samples).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, flow: Flow, context: Tensor | None = None, *, support: constraints.Constraint | None = None
    ) -> None:
        self.flow, self._support = flow, support
        self.context = None if context is None else torch.as_tensor(context, device=flow._device())
        # Whether the batch axes are the context's, and not only those of an expansion.
        self._batched = self.context is not None and self.context.dim() > 0
        batch = self.context.shape[:1] if self._batched else torch.Size()
        super().__init__(batch, self._event(), validate_args=False)

    def _event(self) -> torch.Size:
        """The data's shape: the flow's own if it knows, else what one latent becomes."""
        known = getattr(self.flow, "event_shape", None)
        if known is not None:
            return known
        context = self.context[:1] if self._batched else self.context
        with torch.no_grad():
            z = self.flow.base.sample(0)  # knows dtype and device, and leaves the random stream alone
            z = z.new_zeros(len(context) if self._batched else 1, *z.shape[1:])
            return self.flow.bijection.inverse(z, self.flow._embed(context, z))[0].shape[1:]

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.base.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        if self._support is not None:
            return self._support
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: FlowDistribution | None = None) -> FlowDistribution:
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.flow, new._support, new._batched, new.context = self.flow, self._support, self._batched, self.context
        if self._batched:
            new.context = self.context.expand(*batch_shape, *self._axes)
        else:
            torch.broadcast_shapes(self.batch_shape, batch_shape)
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        return new

    def sample(self, sample_shape: torch.Size | Sequence[int] = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape)
        if self._batched:
            context = self.context.reshape(self.batch_shape.numel(), *self._axes)
            x = self.flow.rsample(shape.numel(), context)
        else:
            x = self.flow.rsample((shape + self.batch_shape).numel(), self.context)
        return x.reshape(shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        free = value.shape[: value.dim() - len(self.event_shape)]
        if value.shape[len(free) :] != self.event_shape:
            raise ValueError(f"values must end in {tuple(self.event_shape)}, got shape {tuple(value.shape)}")
        batch = torch.broadcast_shapes(free, self.batch_shape)
        value = value.expand(batch + self.event_shape).reshape(batch.numel(), *self.event_shape)
        context = self.context
        if self._batched:
            count = 1 if self.batch_shape.numel() == 1 else batch.numel()
            context = context if count == 1 else context.expand(*batch, *self._axes)
            context = context.reshape(count, *self._axes)
        return self.flow.log_prob(value, context).reshape(batch)

    @property
    def _axes(self) -> torch.Size:
        """Those of one entry of the context."""
        return self.context.shape[len(self.batch_shape) :]

    @property
    def mean(self) -> NoReturn:
        raise NotImplementedError("the mean of a flow has no closed form: take that of samples, d.sample((n,)).mean(0)")

    @property
    def variance(self) -> NoReturn:
        raise NotImplementedError(
            "the variance of a flow has no closed form: take that of samples, d.sample((n,)).var(0)"
        )

    def entropy(self) -> NoReturn:
        raise NotImplementedError(
            "the entropy of a flow has no closed form: take the mean of -d.log_prob(x) over samples x"
        )
