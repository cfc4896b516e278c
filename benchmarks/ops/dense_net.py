"""A spline coupling's network in one call: linear, two residual blocks, linear, 23 values for each feature."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..case import EXTRA, FORWARD, HEADLINE, STANDARD, STEP, Case, Inputs, Op
from .shapes import demoted, only, spread

HIDDEN = {"": 64, "32 hidden": 32, "128 hidden": 128}
LAYERS, PARAMS = 4, 23  # inside the two blocks; of a spline of 8 bins
SHAPES = {
    "cuda": [((512, 5), HEADLINE), ((4096, 5), STANDARD), ((65536, 32), STANDARD)],
    "cpu": [
        ((512, 5), HEADLINE),
        ((4096, 5), STANDARD),
        ((50, 2), STANDARD),
        ((1, 5), EXTRA),
        ((512, 32), EXTRA),
        ((16384, 5), EXTRA),
    ],
    "quick": [((8, 3), HEADLINE)],
}


def widths(case: Case) -> list[int]:
    """Of the data on its way through the layers."""
    return [case.shape[1], *[HIDDEN[case.variant]] * (LAYERS + 1), PARAMS * case.shape[1]]


def inputs(case: Case, device: torch.device) -> Inputs:
    found = {"x": torch.randn(case.shape[:2])}
    wide = widths(case)
    for i, (before, after) in enumerate(pairwise(wide)):
        found[f"weight{i}"] = torch.randn(after, before) / before**0.5
        found[f"bias{i}"] = 0.1 * torch.randn(after)
    return {k: v.to(device, case.dtype) for k, v in found.items()}


def weights(v: Inputs) -> list[Tensor]:
    return [v[f"{kind}{i}"] for i in range(LAYERS + 2) for kind in ("weight", "bias")]


def call(variant: str):
    from nfkernels import dense_net

    return lambda v, inverse: (dense_net(v["x"], weights(v)),)


def plain(variant: str):
    """Layer by layer, as a module's forward is."""
    from nfkernels.reference.dense_net import Activation, Share, forward

    return lambda v, inverse: (forward(v["x"], None, weights(v), True, int(Activation.relu), int(Share.none)),)


def cotangents(v: Inputs):
    return [torch.randn(len(v["x"]), len(v[f"bias{LAYERS + 1}"]), device=v["x"].device, dtype=v["x"].dtype)]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and y, and what the backward reads of each layer; every product once, in a step three times."""
    wide, size = widths(case), case.dtype.itemsize
    products = 2 * sum(a * b for a, b in pairwise(wide)) * case.shape[0]
    ends, inner = (wide[0] + wide[-1]) * case.shape[0] * size, sum(wide[1:-1]) * case.shape[0] * size
    return {FORWARD: (ends, products), STEP: (3 * ends + 2 * inner, 3 * products)}[direction]


def cases(kind: str) -> list[Case]:
    shapes, found = SHAPES[kind], []
    for variant in HIDDEN if kind != "quick" else [""]:
        chosen = shapes if not variant else demoted(only(shapes), STANDARD)
        found += spread("dense_net", (FORWARD, STEP), chosen, variant=variant)
    return found


NAMES = tuple(f"{kind}{i}" for i in range(LAYERS + 2) for kind in ("weight", "bias"))
OP = Op("dense_net", inputs, call, plain, cotangents, count, cases, ("x", *NAMES))
