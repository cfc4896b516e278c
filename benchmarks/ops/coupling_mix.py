"""Coupling of one step, actnorm and 1x1 convolution of the next, in one kernel, and as two ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..case import BACKWARD, EXTRA, FORWARD, HEADLINE, STANDARD, STEP, Case, Inputs, Op, Peer
from . import affine_coupling
from .channel_mix import weight
from .shapes import spread

FORM = affine_coupling.FORMS[""]
SHAPES = {
    "cuda": [
        ((128, 12, 128, 128), HEADLINE),
        ((64, 24, 128, 128), HEADLINE),
        ((128, 48, 64, 64), HEADLINE),
        ((16, 12, 8, 8), STANDARD),
        ((1344, 12, 128, 128), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((64, 48, 16, 16), STANDARD),
        ((1344, 48, 64, 64), EXTRA),
        ((64, 24, 16, 16), EXTRA),
    ],
    "cpu": [
        ((64, 48, 16, 16), HEADLINE),
        ((64, 12, 16, 16), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((4, 12, 8, 8), EXTRA),
    ],
    "quick": [((2, 4, 4, 4), HEADLINE)],
}


def inputs(case: Case, device: torch.device) -> Inputs:
    found = affine_coupling.inputs(case, device)
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    matrix = weight(case.shape[1], device, torch.float64)
    found |= {"weight": matrix.to(compute), "inverse_weight": torch.linalg.inv(matrix).to(compute).contiguous()}
    return found | {"bias": torch.randn(case.shape[1], device=device, dtype=compute)}


def call(variant: str):
    from nfkernels import coupling_mix

    def run(v: Inputs, inverse: bool):
        return coupling_mix(
            v["x"], v["params"], v["weight"], v["bias"], inverse_weight=v["inverse_weight"], **FORM
        )[:2]  # fmt: skip

    return run


def plain(variant: str):
    from nfkernels.reference.channel_mix import forward

    couple = affine_coupling.plain("")

    def run(v: Inputs, inverse: bool):
        y, logdet = couple(v, False)
        return forward(y, v["weight"], v["bias"]), logdet

    return run


def two_ops(v: Inputs, inverse: bool):
    from nfkernels import affine_coupling, channel_mix

    y, logdet = affine_coupling(v["x"], v["params"], **FORM)
    return channel_mix(y, v["weight"], v["bias"]), logdet


def hand_written(v: Inputs, inverse: bool):
    y, logdet = affine_coupling.hand_written(v, False)
    return F.conv2d(y, v["weight"][:, :, None, None], v["bias"]), logdet


def count(case: Case, direction: str) -> tuple[float, float]:
    """x, params and z; the backward reads z, params and dz, writes dx and dparams, and multiplies three times."""
    n, s, p, c = case.elements, case.dtype.itemsize, case.params.itemsize, case.shape[1]
    once = {FORWARD: (n * (2 * s + p), 2 * c * n), BACKWARD: (n * (3 * s + 2 * p), 6 * c * n)}
    if direction == STEP:
        return tuple(map(sum, zip(*once.values(), strict=True)))
    return once[direction]


def cases(kind: str) -> list[Case]:
    found = spread("coupling_mix", (FORWARD, BACKWARD, STEP), SHAPES[kind])
    narrow = {"params": torch.bfloat16, "channels_last": True}
    return found + spread("coupling_mix", (FORWARD, BACKWARD), [(SHAPES[kind][0][0], STANDARD)], **narrow)


def peers(variant: str) -> dict[str, Peer]:
    return {"two ops": Peer(two_ops), "hand-written": Peer(hand_written)}


OP = Op(
    "coupling_mix", inputs, call, plain, affine_coupling.cotangents, count, cases,
    ("x", "params", "weight", "bias"), peers,
)  # fmt: skip
