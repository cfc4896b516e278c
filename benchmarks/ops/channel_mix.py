"""Channel mix (1x1 convolution) at Glow's widths; its inverse is the same op with the other matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..case import BACKWARD, EXTRA, FORWARD, HEADLINE, STANDARD, STEP, Case, Inputs, Op, Peer
from .shapes import spread

# About 100 MB for a GPU, 3 MB for a CPU, whatever the width; then the same widths launch-bound and at 1 GB.
SHAPES = {
    "cuda": [
        ((128, 12, 128, 128), HEADLINE),
        ((64, 24, 128, 128), HEADLINE),
        ((128, 48, 64, 64), HEADLINE),
        ((64, 96, 64, 64), HEADLINE),
        ((16, 12, 8, 8), STANDARD),
        ((1344, 12, 128, 128), STANDARD),
        ((1344, 48, 64, 64), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((64, 48, 16, 16), STANDARD),
        ((64, 24, 16, 16), EXTRA),
        ((672, 24, 128, 128), EXTRA),
        ((64, 96, 8, 8), EXTRA),
        ((672, 96, 64, 64), EXTRA),
    ],
    "cpu": [
        ((64, 48, 16, 16), HEADLINE),
        ((64, 12, 16, 16), HEADLINE),
        ((64, 24, 16, 16), STANDARD),
        ((64, 96, 8, 8), STANDARD),
        ((64, 12, 64, 64), STANDARD),
        ((4, 12, 8, 8), EXTRA),
        ((32, 48, 64, 64), EXTRA),
    ],
    "quick": [((2, 4, 4, 4), HEADLINE)],
}


def weight(channels: int, device: torch.device, dtype=torch.float32):
    """Close to a rotation, as trained ones are; every singular value within 10 % of 1."""
    rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
    return (rotation * (0.9 + 0.2 * torch.rand(channels, dtype=torch.float64))).to(device, dtype).contiguous()


def inputs(case: Case, device: torch.device) -> Inputs:
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    x = torch.randn(case.shape, device=device).to(case.dtype)
    return {"x": x, "weight": weight(case.shape[1], device, compute),
            "bias": torch.randn(case.shape[1], device=device, dtype=compute)}  # fmt: skip


def call(variant: str):
    from nfkernels import channel_mix

    return lambda v, inverse: (channel_mix(v["x"], v["weight"], v["bias"]),)


def plain(variant: str):
    from nfkernels.reference.channel_mix import forward

    return lambda v, inverse: (forward(v["x"], v["weight"], v["bias"]),)


def conv2d(v: Inputs, inverse: bool):
    return (F.conv2d(v["x"], v["weight"][:, :, None, None], v["bias"]),)


def cotangents(v: Inputs):
    return [torch.randn_like(v["x"])]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and y; the backward reads x and dy and writes dx, and multiplies twice."""
    n, c = case.data_bytes, case.shape[1]
    passes = {FORWARD: (2, 2), BACKWARD: (3, 4), STEP: (5, 6)}
    moved, products = passes[direction]
    return moved * n, products * c * case.elements


def cases(kind: str) -> list[Case]:
    return spread("channel_mix", (FORWARD, BACKWARD, STEP), SHAPES[kind])


def peers(variant: str) -> dict[str, Peer]:
    return {"conv2d": Peer(conv2d)}


OP = Op("channel_mix", inputs, call, plain, cotangents, count, cases, ("x", "weight", "bias"), peers)
