"""Dequantise uint8 images with noise from the device's key, without and with the logit."""

from __future__ import annotations

import math

import torch

from ..case import EXTRA, FORWARD, STANDARD, Case, Inputs, Op, Peer
from .shapes import IMAGES, demoted, only, spread

ALPHA = {"": None, "logit": 0.05}


def inputs(case: Case, device: torch.device) -> Inputs:
    images = torch.randint(0, 256, case.shape, dtype=torch.uint8, device=device)
    return {"images": images, "key": torch.tensor([1234, 5], device=device)}


def call(variant: str):
    from nfkernels import dequantize

    alpha = ALPHA[variant]
    return lambda v, inverse: dequantize(v["images"], v["key"], levels=256, alpha=alpha)


def plain(variant: str):
    """With torch's own generator, as every port writes it: other noise, so only its range can be compared."""
    alpha = ALPHA[variant]

    def run(v: Inputs, inverse: bool):
        images = v["images"].float()
        y = (images + torch.rand_like(images)) / 256
        if alpha is None:
            return y, y.new_zeros(y.shape[0])
        w = alpha + (1 - 2 * alpha) * y
        logdet = math.log(1 - 2 * alpha) - torch.log(w) - torch.log1p(-w)
        return torch.log(w) - torch.log1p(-w), logdet.flatten(1).sum(1)

    return run


def in_range(variant: str):
    """Whether every output lies in its grey level's interval."""
    alpha = ALPHA[variant]

    def check(v: Inputs, outputs) -> bool:
        y = outputs[0].double()
        if alpha is not None:
            y = (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)
        low = v["images"] / 256
        return bool(((y >= low - 1e-5) & (y <= low + 1 / 256 + 1e-5)).all())

    return check


def cotangents(v: Inputs):
    return []


def count(case: Case, direction: str) -> tuple[float, float]:
    return case.elements * (1 + case.dtype.itemsize), 0


def cases(kind: str) -> list[Case]:
    images = IMAGES[kind]
    found = spread("dequantize", (FORWARD,), images)
    return found + spread("dequantize", (FORWARD,), demoted(only(images), STANDARD), variant="logit") + spread(
        "dequantize", (FORWARD,), demoted(only(images, STANDARD), EXTRA), variant="logit"
    )  # fmt: skip


def peers(variant: str) -> dict[str, Peer]:
    return {"hand-written": Peer(plain(variant), check=in_range(variant))}


OP = Op("dequantize", inputs, call, plain, cotangents, count, cases, (), peers, ("images",))
