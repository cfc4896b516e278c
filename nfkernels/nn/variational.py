"""Variational inference: a flow fitted to a density that is known up to its normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .replay import call_with

if TYPE_CHECKING:
    from .flow import Flow


def reverse_kl(
    flow: Flow,
    log_density: Callable[[Tensor], Tensor],
    n: int,
    context: Tensor | None = None,
    *,
    path_gradient: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate of ``KL(q || p) - log Z`` from ``n`` samples of the flow q: a scalar, the negative ELBO.

    Its minimum over all q is ``-log Z``, where ``p = exp(log_density) / Z``: minus the loss is a lower bound of log Z.

    Args:
        flow: q. It is sampled, so its inverse should be the fast direction (couplings, or an ``IAF``).
        log_density: of samples ``[n, *event]`` (``[n, B, *event]`` with a context ``[B, ...]``), in nats: ``[n]``
            (``[n, B]``), differentiable. It need not be normalised.
        n: samples, for each entry of the context.
        path_gradient: take the gradient through the samples alone and leave out the score of q, whose mean is zero
            ("sticking the landing"): less noise near the optimum, none at it. It costs one more forward.
        generator: of the samples.

    Raises ``ValueError`` for log densities of another shape, and for bases that cannot carry gradients through samples
    (MixtureNormal). Reference: Rezende and Mohamed 2015, section 4; Roeder et al. 2017, for the path gradient.
    """
    if n < 1:
        raise ValueError(f"reverse_kl needs at least 1 sample, got n={n}")
    if path_gradient:
        x = flow.rsample(n, context, generator=generator)
        log_q = _log_prob_of_fixed(flow, x, context)
    else:
        x, log_q = flow.rsample_and_log_prob(n, context, generator=generator)
    log_p = log_density(x)
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"log_density must give one number per sample, {list(log_q.shape)} for samples {list(x.shape)}, "
            f"got {list(log_p.shape)}"
        )
    return (log_q - log_p).mean()


def _log_prob_of_fixed(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """``log q(x)``, in which the flow's parameters and its context, another network's output, count as constants."""
    fixed = {name: p.detach() for name, p in flow.named_parameters(prefix="flow")}
    if context is None or (context := torch.as_tensor(context, device=x.device)).dim() == 0:
        return call_with(_LogProb(flow), fixed, (x, context))
    context = context.detach().repeat(x.shape[0], *[1] * (context.dim() - 1))
    log_q = call_with(_LogProb(flow), fixed, (x.flatten(0, 1), context))
    return log_q.unflatten(0, x.shape[:2])


class _LogProb(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow._log_prob(x, context)
