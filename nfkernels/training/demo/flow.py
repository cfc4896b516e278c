"""The flow of a quick look: how it is built, trained and measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ... import models
from ...nn import Chain, Flow, Standardize
from ..data.toy import Toy
from ..recipe import Recipe

_AT_ONCE = 20_000  # points through the flow together
# Two columns take turns, so that nothing needs to stand between couplings, and every picture shows one layer's work.
_PLAIN = {"NSF": {"linear": "none", "network": "mlp"}}
Estimate = tuple[float, float]  # mean and standard error


class Likelihoods(NamedTuple):
    """Mean log-likelihoods of held-out points, in nats.

    ``flow`` the flow's, ``truth`` those of the density that they were drawn from, ``gap`` by how much the latter is
    larger (of the same points, so known far better than either), ``normal`` a full-covariance normal's.
    """

    points: int
    flow: Estimate
    truth: Estimate
    gap: Estimate
    normal: Estimate

    def facts(self) -> dict[str, float | int]:
        """For ``--json``."""
        estimates = {"log_likelihood": self.flow, "truth": self.truth, "gap": self.gap, "normal": self.normal}
        numbers: dict[str, float] = {}
        for name, (mean, error) in estimates.items():
            numbers |= {name: mean, f"{name}_standard_error": error}
        return {"points": self.points, **numbers}


def build(kind: str, data: Tensor, *, layers: int, width: int) -> Flow:
    """A flow of the plane, ``kind`` of ``nfkernels.models``. ``data [N, 2]`` is moved to the middle and scaled alike
    along both axes, so that shapes and angles stay what they are."""
    flow = getattr(models, kind)(2, layers=layers, hidden=width, **_PLAIN.get(kind, {}))
    unit = Standardize(data.mean(0), data.var(0).mean().sqrt())
    return Flow(Chain(unit, *_layers(flow)), flow.base)


def _layers(flow: Flow) -> list:
    return list(flow.bijection) if isinstance(flow.bijection, Chain) else [flow.bijection]


def recipe(steps: int, batch_size: int, seed: int) -> Recipe:
    """Unlimited data and a smooth target: no weight decay, and a rate that ends at zero."""
    return Recipe(
        steps=steps,
        batch_size=batch_size,
        optimizer="adam",
        lr=1e-2,
        schedule="cosine",
        warmup=20,
        weight_decay=0.0,
        clip=5.0,
        ema=0.98,
        validate_every=steps,
        seed=seed,
    )


@torch.no_grad()
def likelihoods(flow: Flow, toy: Toy, held_out: Tensor, training: Tensor) -> Likelihoods:
    device = flow.base.like.device
    own = flow.log_prob(held_out.to(device), batch_size=_AT_ONCE).cpu().double()
    truth = toy.log_prob(held_out)
    normal = MultivariateNormal(training.mean(0), training.T.cov()).log_prob(held_out).double()
    return Likelihoods(len(held_out), *map(estimate, (own, truth, truth - own, normal)))


def estimate(values: Tensor) -> Estimate:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
