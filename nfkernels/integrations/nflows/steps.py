"""How nflows' layers hand on data and log-determinant: a running one, so that a chain of layers adds nothing up.

A :class:`Step` is a Layer of methods that are all one: ``_step``. Called by itself it returns what the original
returns; a fused ``CompositeTransform`` calls ``_step`` and passes the running log-determinant on, unless
the layer is being watched by hooks, which fire on ``__call__`` alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...nn.hooks import hooked
from ...reference.affine_coupling import compute_dtype
from ..adapter import Adapter

# A running log-determinant: what each sample has, [B], and what all have alike, a scalar; None for zero.
Total = tuple["Tensor | None", "Tensor | float | None"]
NOTHING: Total = (None, None)


class Step:
    """A layer ``forward(inputs, context)`` and ``inverse(inputs, context)`` by one method ``_step``."""

    def forward(self, inputs, context=None):
        outputs, total = self._step(inputs, context, False, NOTHING)
        return outputs, whole(total, inputs)

    def inverse(self, inputs, context=None):
        outputs, total = self._step(inputs, context, True, NOTHING)
        return outputs, whole(total, inputs)

    def _original(self, inputs, context, inverse, total):
        """The original layer: what is unusual, and its errors."""
        outputs, logdet = super().inverse(inputs, context) if inverse else super().forward(inputs, context)
        return outputs, added(total, logdet)


class StepAdapter(Adapter):
    def methods(self) -> tuple[str, ...]:
        return ("forward", "inverse")


def through(module: nn.Module, x: Tensor, context: Any, inverse: bool, total: Total) -> tuple[Tensor, Total]:
    """One layer of a chain, fused or not."""
    step = getattr(type(module), "_step", None)
    if step is not None and not ("inverse" in module.__dict__ if inverse else observed(module)):
        return step(module, x, context, inverse, total)
    x, logdet = module.inverse(x, context) if inverse else module(x, context)
    return x, added(total, logdet)


def observed(module: nn.Module) -> Any:
    """Whether calling the module does more than its forward."""
    return (
        hooked(module)
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def added(total: Total, logdet: Tensor | float) -> Total:
    vector, scalar = total
    if isinstance(logdet, Tensor) and logdet.dim():
        return (logdet if vector is None else vector + logdet), scalar
    return vector, (logdet if scalar is None else scalar + logdet)


def joined(op: Any, x: Tensor, params: Tensor, total: Total, **options: Any) -> tuple[Tensor, Total]:
    """An op that takes a running log-determinant."""
    vector, scalar = total
    if vector is None or (vector.dtype == compute_dtype(x) and vector.shape == x.shape[:1] and vector.is_contiguous()):
        y, vector = op(x, params, logdet=vector, **options)
        return y, (vector, scalar)
    y, logdet = op(x, params, **options)
    return y, (vector + logdet, scalar)


def whole(total: Total, inputs: Tensor) -> Tensor:
    """The log-determinant as nflows returns it: ``[B]``, memory of its own."""
    vector, scalar = total
    rows = inputs.shape[0]
    if vector is not None:
        vector = vector if scalar is None else vector + scalar
        return vector if vector.shape[0] == rows else vector.expand(rows).clone()
    if isinstance(scalar, Tensor):
        return scalar.expand(rows).clone()
    return inputs.new_zeros(rows) if scalar is None else inputs.new_full((rows,), scalar)
