"""A flow as a ``torch.distributions.Distribution``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from .flow import Flow


class FlowDistribution(Distribution):
    """``Flow.to_distribution(context)``: batch shape ``[B]`` for a context ``[B, ...]``, else empty.

    ``log_prob`` broadcasts values ``[*sample, *batch, *event]`` against the context, as torch's distributions do.
    For an image flow the values are x in ``[0, 1)``.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, flow: Flow, context: Tensor | None = None) -> None:
        self.flow, self.context = flow, context
        batched = isinstance(context, Tensor) and context.dim() > 0
        batch = context.shape[:1] if batched else torch.Size()
        super().__init__(batch, self._event(batched), validate_args=False)

    def _event(self, batched: bool) -> torch.Size:
        """The data's shape: the flow's own if it knows, else what one latent becomes."""
        known = getattr(self.flow, "event_shape", None)
        if known is not None:
            return known
        context = self.context[:1] if batched else self.context
        with torch.no_grad():
            z = self.flow.base.sample(0)  # knows dtype and device, and leaves the random stream alone
            z = z.new_zeros(len(context) if batched else 1, *z.shape[1:])
            return self.flow.bijection.inverse(z, self.flow._embed(context, z))[0].shape[1:]

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError(
            "a flow's distribution does not expand: its batch shape is that of its context, so give "
            "flow.to_distribution a context of the batch you need"
        )

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape)
        return self.flow.rsample(shape.numel(), self.context).reshape(shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        free = value.shape[: value.dim() - len(self.event_shape)]
        if value.shape[len(free) :] != self.event_shape:
            raise ValueError(f"values must end in {tuple(self.event_shape)}, got shape {tuple(value.shape)}")
        batch = torch.broadcast_shapes(free, self.batch_shape)
        value = value.expand(batch + self.event_shape).reshape(-1, *self.event_shape)
        context = self.context
        if self.batch_shape:
            axes = context.shape[1:]
            context = context.expand(*batch, *axes).reshape(-1, *axes)
        return self.flow.log_prob(value, context).reshape(batch)
