"""What a picture asks of a flow, or of anything that has a density: points in chunks, one context for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Flow, ImageFlow
from ..nn.modes import evaluating

AT_ONCE = 16_384  # points through the flow together
_LOOKED_AT = 4000  # samples that a picture's limits are taken from


def looking(model: Any) -> AbstractContextManager[None]:
    """No gradients inside, and evaluation mode where the model has modes; afterwards it is as it was."""
    return evaluating(model) if isinstance(model, nn.Module) else torch.no_grad()


def columns_of(model: Any) -> int | None:
    """How many columns a row of this flow or distribution has, None where it does not say."""
    if isinstance(model, ImageFlow):
        event = tuple(model.event_shape)
    elif isinstance(model, Flow):
        event = tuple(model.base.shape)
    elif isinstance(model, torch.distributions.Distribution):
        event = tuple(model.event_shape) or (1,)
    else:
        return None
    if len(event) != 1:
        raise ValueError(f"the flow is over {event}: expected one over rows [D]; image_grid draws images")
    return event[0]


def flow_of_rows(flow: Any, what: str) -> int:
    """The number of columns of a flow that a picture needs as such. ``TypeError`` for anything else."""
    if not isinstance(flow, Flow):
        raise TypeError(f"{what} draws what the layers of a Flow of nfkernels do, got {_kind(flow)}")
    return columns_of(flow) or 0


def log_density(model: Any, points: Tensor, context: Any = None) -> Tensor:
    """``log p`` of points ``[N, D]`` float64, on the CPU in float64 ``[N]``.

    ``model``: anything with a ``log_prob``, or the function itself, which is given the points in its own type (float32
    where it has none). Raises ``ValueError`` for what gives another shape.
    """
    function = _log_prob(model)
    model = getattr(model, "__self__", model)  # whose method it is
    like = _like(model)
    given = one_context(context, like.device)
    parts = []
    with looking(model):
        for x in points.to(like).split(AT_ONCE):
            if given is None:
                found = function(x)
            else:
                found = function(x, given if isinstance(model, Flow) else given.expand(len(x), *given.shape[1:]))
            if not isinstance(found, Tensor) or found.shape not in ((len(x),), (len(x), 1)):
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"log_prob of points {list(x.shape)} gave {got}: expected one number each, [{len(x)}]")
            parts.append(found.reshape(-1).cpu().double())
    return torch.cat(parts)


def some_samples(model: Any, context: Any = None, *, count: int = _LOOKED_AT, seed: int = 0) -> Tensor | None:
    """Points ``[count, D]`` on the CPU, the same for one seed; of what cannot be sampled from None."""
    if isinstance(model, Flow):
        like = _like(model)
        generator = torch.Generator(like.device).manual_seed(seed)
        given = one_context(context, like.device)
        with looking(model):
            drawn = model.sample(count, given, generator=generator, batch_size=AT_ONCE)
        return (drawn if given is None else drawn[:, 0]).cpu()
    if isinstance(model, torch.distributions.Distribution):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model.sample((count,)).reshape(count, -1).cpu()
    return None


def one_context(context: Any, device: torch.device) -> Tensor | None:
    """``[1, ...]``: a picture is of one density. A label may come without an axis. ``ValueError`` for several."""
    if context is None:
        return None
    context = torch.as_tensor(context, device=device)
    context = context[None] if context.dim() == 0 else context
    if context.shape[0] != 1:
        raise ValueError(
            f"context is {list(context.shape)}: expected one for the whole picture, [1, ...], so pick it, context[:1]"
        )
    return context


def device_of(model: Any) -> torch.device:
    return _like(model).device


def _log_prob(model: Any) -> Callable[..., Tensor]:
    function = getattr(model, "log_prob", model)
    if not callable(function):
        raise TypeError(f"expected a flow, or a function of points [N, D] that gives log p [N], got {_kind(model)}")
    return function


def _like(model: Any) -> Tensor:
    """A tensor of the device and the type that points should have."""
    if isinstance(model, Flow):
        return model.base.like
    if isinstance(model, nn.Module):
        return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.empty(0)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
