"""What works on images only."""

from __future__ import annotations

from nfkernels import nn as N

from .case import Case

CASES = [
    Case(
        f"variational-dequantization-{name}",
        lambda shape=shape, steps=steps: N.VariationalDequantization(shape, steps=steps, hidden=2),
        (2, *shape),
        context=(2, *shape),
        domain="unit",
        latent="unit",
    )
    for name, shape, steps in (("grey", (1, 2, 4), 2), ("colour", (3, 2, 2), 2))
]
