"""The normaliser of a density that is known up to it, by importance sampling from a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nn.modes import evaluating

if TYPE_CHECKING:
    from ..nn import Flow


@dataclass(frozen=True)
class Evidence:
    """An importance-weighted estimate of ``log Z``.

    Args:
        value: the estimate in nats.
        standard_error: of it, in nats, to first order (the weights' relative standard deviation over ``sqrt(count)``).
            Not to be trusted where the effective sample size is a few.
        effective_sample_size: ``(sum w)^2 / sum w^2``, from 1 to ``count``: as many samples of p itself would do.
        elbo: the mean of ``log w``, a lower bound of ``log Z``; what it lacks is ``KL(q || p)``.
        count: how many samples were drawn.
    """

    value: float
    standard_error: float
    effective_sample_size: float
    elbo: float
    count: int

    def __str__(self) -> str:
        size = self.effective_sample_size
        return (
            f"log evidence {self.value:.4f} +- {self.standard_error:.4f} nats "
            f"(ELBO {self.elbo:.4f}; effective sample size {size:.0f} of {self.count}, {size / self.count:.0%})"
        )


def log_evidence(
    flow: Flow,
    log_density: Callable[[Tensor], Tensor],
    *,
    count: int = 10_000,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 4096,
) -> Evidence:
    """``log Z`` of ``p(x) = exp(log_density(x)) / Z`` from ``count`` samples of the flow q, with its error.

    ``Z = E_q[w]`` with the weights ``w = exp(log_density(x)) / q(x)``; their mean is unbiased, its logarithm a little
    low. Good where q covers p: a flow trained by reverse KL can miss a mode, which the weights then do not see.

    Args:
        flow: q.
        log_density: of samples ``[n, *event]``, in nats: ``[n]``; need not be normalised. ``-inf`` is a weight of zero.
        count: samples, at least 2.
        context: one condition of a conditional flow: ``[1, ...]``, or a label.
        generator: of the samples, on the flow's device.
        batch_size: samples that go through the flow and ``log_density`` at once.

    Raises ``ValueError`` for log densities of another shape, that are NaN or +inf, or all -inf, and for several
    contexts at once. Cost: ``count`` samples with their densities. Reference: Burda et al. 2016, equation 8; Kong 1992,
    for the effective sample size.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2 samples, for an error, got {count}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if context is not None:
        context = torch.as_tensor(context)
        if context.dim() and context.shape[0] != 1:
            raise ValueError(f"log_evidence takes one context at a time, got {context.shape[0]}: call it for each")
    parts = []
    with evaluating(flow):
        for start in range(0, count, batch_size):
            n = min(batch_size, count - start)
            x, log_q = flow.rsample_and_log_prob(n, context, generator=generator)
            x, log_q = (x.flatten(0, 1), log_q.flatten()) if log_q.dim() == 2 else (x, log_q)
            log_p = torch.as_tensor(log_density(x), device=x.device)
            if log_p.shape != log_q.shape:
                raise ValueError(
                    f"log_density must give one number per sample, {list(log_q.shape)} for samples {list(x.shape)}, "
                    f"got {list(log_p.shape)}"
                )
            parts.append(log_p.double() - log_q.double())
    return _from_weights(torch.cat(parts))


def _from_weights(log_w: Tensor) -> Evidence:
    count = len(log_w)
    if bool((torch.isnan(log_w) | (log_w == math.inf)).any()):
        bad = int((torch.isnan(log_w) | (log_w == math.inf)).sum())
        raise ValueError(f"{bad} of {count} weights are not finite: log_density or the flow gives NaN or infinity")
    top = log_w.max()
    if top == -math.inf:
        raise ValueError("log_density is -inf at all samples: the flow does not reach where the density is")
    w = torch.exp(log_w - top)
    mean = w.mean()
    size = float(w.sum() ** 2 / w.square().sum())
    error = float(w.std() / (mean * math.sqrt(count)))
    return Evidence(float(top + mean.log()), error, size, float(log_w.mean()), count)
