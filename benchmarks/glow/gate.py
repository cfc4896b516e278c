"""The gate: with the same weights everyone must give the bits per dimension and the gradients of the plain model in
float64, and find the data again; one that does not reads WRONG and gets no time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nfkernels.models import Glow

from ..models import plain_glow
from .models import Ready, options, without_split_priors
from .setups import Setup

# Allowed errors by precision: bits per dimension, gradient (of its norm), rebuilt data. bfloat16 for the whole model
# rounds the data as well, so what it rebuilds is reported and not judged.
ALLOWED = {None: (1e-4, 2e-3, 1e-2), "networks": (2e-2, 0.3, 1e-2), "everything": (5e-2, 0.5, None)}


@dataclass
class Truth:
    """What is right for one model and one x: computed once, in float64, on the device."""

    x: Tensor
    bits: float
    gradients: dict[str, Tensor]


def truth(setup: Setup, glow: Glow, x: Tensor, *, split_priors: bool = True) -> Truth:
    plain = plain_glow.PlainGlow(setup.shape, **options(setup)).eval()
    plain_glow.copy_weights(plain, glow if split_priors else without_split_priors(setup, glow))
    plain.double().to(x.device)
    bits = plain.bits_per_dim(x.double()).mean()
    bits.backward()
    pairs = plain_glow.pairs(plain, glow)
    return Truth(x, bits.item(), {name: theirs.grad for name, theirs, _, _ in pairs})


def errors(ready: Ready, right: Truth) -> dict[str, float]:
    """Of the bits per dimension (absolute), of the gradient (by norms), of the data that is found again (largest)."""
    # With dropout there is nothing to compare; without, as in training.
    ready.model.train(ready.setup.dropout == 0)
    ready.forget_gradients()
    loss = ready.loss(right.x)
    loss.backward()
    off = norm = 0.0
    for name, got in ready.named_gradients().items():
        expected = right.gradients[name]
        off += (got.double() - expected).square().sum().item()
        norm += expected.square().sum().item()
    ready.forget_gradients()
    ready.model.eval()
    found = ready.rebuilt(right.x)
    return {
        "bits_error": abs(loss.item() - right.bits),
        "gradient_error": (off / norm) ** 0.5 if norm else float("nan"),
        "rebuilt_error": (found.double() - right.x.double()).abs().max().item(),
    }


def verdict(found: dict[str, float], precision: str | None) -> str | None:
    """Why a contender is wrong; None if it is right. What is not a number is wrong."""
    reasons = []
    for (name, value), allowed in zip(found.items(), ALLOWED[precision], strict=True):
        if allowed is not None and not value <= allowed:
            reasons.append(f"{name.replace('_', ' ')} {value:.2g}, allowed {allowed:.2g}")
    return "; ".join(reasons) or None
