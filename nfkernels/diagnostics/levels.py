"""The log-likelihood of a multi-scale flow, level by level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nn.bases import StandardNormal
from ..nn.bijection import Bijection, Chain
from ..nn.modes import evaluating
from ..nn.multi_scale import MultiScale
from ..ops import gaussian_log_density

if TYPE_CHECKING:
    from ..nn import Flow


def levels_of(flow: Flow) -> MultiScale | None:
    """The flow's levels: its bijection, or the last layer of its chain. None where it has none, or a base that does not
    fall apart into theirs."""
    last: Bijection = flow.bijection
    while isinstance(last, Chain) and len(last):
        last = last[-1]
    return last if isinstance(last, MultiScale) and type(flow.base) is StandardNormal else None


def level_log_probs(flow: Flow, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
    """What each level of a multi-scale flow adds to ``log p(x)``: ``[B, levels]`` in nats, finest first.

    Of a level that is the log-density of the latents that leave after it (which follow N(0, I)) plus the
    log-determinant of its layers; what comes before the levels counts to the first. Together they are
    ``flow.log_prob(x)``.

    Args:
        flow: one that ends in a ``MultiScale`` on a ``StandardNormal``, such as a ``Glow``.
        x: floating point ``[B, *event]``; of images x in [0, 1), such as ``flow.dequantize(images)``.
        context: as the flow takes it.
        batch_size: samples at once; all by default.

    Raises ``ValueError`` for a flow without levels, and as ``log_prob`` does. Cost: one forward. Reference: Dinh et al.
    2017 (RealNVP), section 3.6.
    """
    levels = levels_of(flow)
    if levels is None:
        raise ValueError(f"this {type(flow).__name__} has no levels: expected a MultiScale on a StandardNormal")
    flow._check_data(x)
    context = flow._matched(context, x)
    size = max(1, len(x)) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    found = []
    with evaluating(flow):
        for start in range(0, max(1, len(x)), size):
            rows = slice(start, start + size)
            given = context if context is None or context.shape[0] == 1 else context[rows]
            found.append(_one_batch(flow, levels, x[rows], given))
    return torch.cat(found)


def _one_batch(flow: Flow, levels: MultiScale, x: Tensor, context: Tensor | None) -> Tensor:
    logdets: list[Tensor] = []
    keep = [
        level.register_forward_hook(lambda _, args, out: logdets.append(out[1]))
        for level in dict.fromkeys(levels.levels)
    ]
    try:
        z, logdet = flow(x, context)
    finally:
        for handle in keep:
            handle.remove()
    densities = [gaussian_log_density(part.flatten(1)) for part in levels.split(z)]
    parts = [density + own for density, own in zip(densities, logdets, strict=True)]
    parts[0] = parts[0] + (logdet - sum(logdets))
    return torch.stack(parts, 1)
