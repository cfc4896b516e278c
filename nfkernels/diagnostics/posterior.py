"""Is a conditional flow calibrated? Coverage of its regions, and the ranks of simulation-based calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nn.modes import evaluating

if TYPE_CHECKING:
    from ..nn import Flow

# Values of samples that are drawn at once, unless told otherwise: 64 MiB of float32.
_VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Coverage:
    """How often the truth lay in a flow's regions of given probability.

    Args:
        nominal: the probabilities that were asked for, as in ``levels``.
        empirical: the share of the pairs whose truth lay inside, one for each.
        standard_error: of ``empirical`` around ``nominal`` where the flow is right, ``sqrt(p (1 - p) / count)``.
        count: how many pairs there were.
    """

    nominal: tuple[float, ...]
    empirical: tuple[float, ...]
    standard_error: tuple[float, ...]
    count: int

    def __str__(self) -> str:
        rows = zip(self.nominal, self.empirical, self.standard_error, strict=True)
        lines = [f"  {p:6.1%}   {found:6.1%}  (+- {error:.1%} by chance)" for p, found, error in rows]
        return "\n".join([f"nominal   found in {self.count} pairs", *lines])


def coverage(
    flow: Flow,
    theta: Tensor,
    context: Tensor | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    draws: int = 1000,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Coverage:
    """How often ``theta`` lies in the flow's highest-density regions of probability ``levels`` given its context.

    A posterior that is calibrated holds the truth in its 80 % region 80 % of the time; one that is too narrow
    (overconfident) less often, one that is too wide more often. The region of probability p is where the density is
    higher than at all but a share p of the flow's own samples: it takes densities alone to tell what lies inside.
    Where samples are exactly as dense as theta (a flow that is flat somewhere), how many of them count is drawn. A
    theta of density 0 lies in no region.

    Args:
        flow: of the parameters given the context.
        theta: the true parameters, ``[N, *event]``, in the flow's dtype.
        context: what was observed, ``[N, ...]``, one for each theta; None for a flow without a context.
        levels: probabilities between 0 and 1.
        draws: samples of the flow for each theta. The levels are met to about ``1 / draws``.
        generator: of the samples, on the flow's device.
        batch_size: how many theta at once (by default as many as 64 MiB of samples allow).

    Raises ``ValueError`` for levels that are no probabilities, for no theta or draws, for theta that are not finite,
    for densities that are NaN or infinite, and for another number of contexts. Cost: ``N draws`` samples with their
    densities, and N densities. Reference: Hermans et al. 2022 (A trust crisis in simulation-based inference?),
    definition 3.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels are probabilities between 0 and 1, got {levels}")

    def outside(theta: Tensor, context: Tensor | None) -> Tensor:
        drawn = _draw(flow.rsample_and_log_prob, draws, context, len(theta), generator)[1]
        own = flow.log_prob(theta, context)
        nowhere = own == -math.inf  # the flow says that there is no such theta
        if not bool((torch.isfinite(own) | nowhere).all()) or bool(torch.isnan(drawn).any() | drawn.isinf().all()):
            raise ValueError("the flow's log density is not finite at some theta or samples: look at flow.check(theta)")
        above, ties = (drawn > own).sum(0), (drawn == own).sum(0)
        if bool(ties.any()):
            u = torch.rand(ties.shape, generator=generator, device=ties.device, dtype=torch.float64)
            above = above + (u * (ties + 1)).long()
        return torch.where(nowhere, draws, above).double() / draws

    share = _in_chunks(outside, flow, theta, context, draws, batch_size)
    empirical = tuple(float((share < level).double().mean()) for level in levels)
    errors = tuple(math.sqrt(level * (1 - level) / len(theta)) for level in levels)
    return Coverage(levels, empirical, errors, len(theta))


def ranks(
    flow: Flow,
    theta: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 1000,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """The rank of every number of ``theta`` among the flow's samples: int64 ``[N, *event]``, from 0 to ``draws``.

    Simulation-based calibration: if the flow is the posterior, the ranks are uniform on ``0 .. draws``. A histogram
    with a hump in the middle means posteriors that are too wide, one that is high at both ends too narrow, a slope a
    bias.
    ``nfkernels.plot.calibration(ranks, draws)`` draws them with the band that chance leaves.

    Args: as in :func:`coverage`. Raises ``ValueError`` as it does, except for densities, which are not looked at.
    Cost: ``N draws`` samples. Reference: Talts et al. 2018 (Validating Bayesian inference algorithms with
    simulation-based calibration), algorithm 1.
    """

    def below(theta: Tensor, context: Tensor | None) -> Tensor:
        (drawn,) = _draw(lambda *a, **k: (flow.rsample(*a, **k),), draws, context, len(theta), generator)
        if not bool(torch.isfinite(drawn).all()):
            raise ValueError("the flow's samples are not finite: look at flow.check(theta, context)")
        return (drawn < theta).sum(0)

    return _in_chunks(below, flow, theta, context, draws, batch_size)


def _draw(
    draw: Callable[..., tuple[Tensor, ...]],
    draws: int,
    context: Tensor | None,
    count: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, ...]:
    """What ``draw`` gives, ``[draws, count, ...]`` each."""
    if context is not None:
        return draw(draws, context, generator=generator)
    return tuple(v.unflatten(0, (draws, count)) for v in draw(draws * count, generator=generator))


def _in_chunks(
    function: Callable[[Tensor, Tensor | None], Tensor],
    flow: Flow,
    theta: Tensor,
    context: Tensor | None,
    draws: int,
    batch_size: int | None,
) -> Tensor:
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if theta.shape[1:] != flow.base.shape and theta.shape[1:] != getattr(flow, "event_shape", flow.base.shape):
        raise ValueError(f"theta is [N, {', '.join(map(str, flow.base.shape))}] of this flow, got {list(theta.shape)}")
    if not len(theta):
        raise ValueError("there is no theta to look at")
    if not bool(torch.isfinite(theta).all()):
        raise ValueError("theta is not finite everywhere")
    contexts = len(theta) if context is None else context.shape[0] if context.dim() else 1
    if contexts != len(theta) or (context is not None and not context.dim()):
        raise ValueError(f"every theta needs the context it belongs to: got {len(theta)} theta, {contexts} contexts")
    if batch_size is None:
        batch_size = max(1, _VALUES_AT_ONCE // (draws * max(1, theta[0].numel())))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    found = []
    with evaluating(flow):
        for start in range(0, len(theta), batch_size):
            part = slice(start, start + batch_size)
            found.append(function(theta[part], None if context is None else context[part]))
    return torch.cat(found)
