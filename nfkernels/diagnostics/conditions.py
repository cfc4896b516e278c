"""How much every layer stretches: the condition numbers of their Jacobians, worst first."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nn.check import CHANNELS, JACOBIAN_ELEMENTS, dense_jacobians, known_condition
from ..nn.layer_calls import LayerCall, layer_calls

if TYPE_CHECKING:
    from ..nn import Flow

_STEP = 1e-6  # of a difference quotient, per element, in float64


@dataclass(frozen=True)
class Condition:
    """Of one layer: ``layer`` (its name, as in ``flow.named_modules()``), ``kind`` (its class), and ``value``, the
    largest over the smallest singular value of its Jacobian. Where it is not ``exact`` it is a lower bound, as a rule
    within a few percent."""

    layer: str
    kind: str
    value: float
    exact: bool


def condition_numbers(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, samples: int = 2, iterations: int = 12
) -> list[Condition]:
    """The condition number of every layer's Jacobian at some samples, the worst layer first.

    A layer of condition number k loses about ``log10(k)`` of its digits on the way back: in float32, which has seven,
    1e7 leaves nothing. Layers whose Jacobian does not depend on data tell it themselves; of others with at most 512
    elements the whole Jacobian is taken, of larger ones its ends are sought by power iteration, on the layer and on its
    inverse.

    Args:
        flow: any flow; a copy of its layers is used, in evaluation mode and float64.
        x: data ``[B, *event]`` as ``flow.encode`` takes it.
        context: as the flow takes it.
        samples: the first so many of x; the largest number among them counts.
        iterations: of the power iteration, each two forwards and one backward, twice.

    Layers for which it cannot be found (no gradient, not finite) are left out. Raises what ``flow.encode`` raises.
    """
    some = x[:samples]
    given = context if not isinstance(context, Tensor) or context.dim() == 0 or len(context) == 1 else context[:samples]
    calls = layer_calls(copy.deepcopy(flow).eval(), some, given)
    found = []
    for call in calls.layers:
        with contextlib.suppress(Exception):  # a layer that raises here is one that flow.check tells of
            value, exact = _of_layer(call, iterations)
            if not math.isnan(value):
                found.append(Condition(call.name, type(call.layer).__name__, value, exact))
    return sorted(found, key=lambda condition: condition.value, reverse=True)


def _of_layer(call: LayerCall, iterations: int) -> tuple[float, bool]:
    known = known_condition(call.layer, tuple(call.x.shape[1:])) if call.x.shape[1] <= CHANNELS else math.nan
    if not math.isnan(known):
        return known, True
    call = _in_double(call)
    if call.x[0].numel() <= JACOBIAN_ELEMENTS and call.lengths is None:
        with torch.enable_grad():
            x = call.x.requires_grad_()
            singular = torch.linalg.svdvals(dense_jacobians(call.layer(x, call.context)[0], x))
        return float((singular.amax(1) / singular.amin(1)).max()), True
    with torch.no_grad():
        z, _ = call.layer(call.x, call.context, lengths=call.lengths)
    after = call.layer.lengths_after(call.lengths)
    there = largest_stretch(lambda v: call.layer(v, call.context, lengths=call.lengths)[0], call.x, iterations)
    back = largest_stretch(lambda v: call.layer.inverse(v, call.context, lengths=after)[0], z, iterations)
    return float((there * back).max()), False


def _in_double(call: LayerCall) -> LayerCall:
    context = call.context
    if isinstance(context, Tensor) and context.is_floating_point():
        context = context.double()
    return call._replace(layer=copy.deepcopy(call.layer).double(), x=call.x.double(), context=context)


def largest_stretch(function: Callable[[Tensor], Tensor], x: Tensor, iterations: int) -> Tensor:
    """The largest singular value of the Jacobian of ``function`` at every sample of ``x [B, ...]`` (float64), ``[B]``:
    from below, by power iteration. ``J v`` is a difference quotient, ``J^T u`` a backward."""
    generator = torch.Generator().manual_seed(0)
    v = _unit(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))[0]
    step = _STEP * math.sqrt(x[0].numel())
    for _ in range(iterations):
        with torch.no_grad():
            pushed = (function(x + step * v) - function(x - step * v)) / (2 * step)
        u, stretch = _unit(pushed)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (pulled,) = torch.autograd.grad((function(at) * u).sum(), at)
        v, _ = _unit(pulled)
    return stretch


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return v / norm.reshape(-1, *[1] * (v.dim() - 1)), norm
