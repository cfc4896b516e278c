"""Gaussian log-density summed over the sample: standard normal, and with mean and log-scale per element."""

from __future__ import annotations

import math

import torch

from ..case import BACKWARD, EXTRA, FORWARD, STANDARD, STEP, Case, Inputs, Op, Peer
from .shapes import IMAGES, ROWS, demoted, only, spread

LEARNED, STANDARD_NORMAL = "", "standard normal"


def inputs(case: Case, device: torch.device) -> Inputs:
    batch, channels, *spatial = case.shape
    found = {"x": torch.randn(case.shape, device=device).to(case.dtype)}
    if case.variant == LEARNED:
        params = torch.randn(batch, 2 * channels, *spatial, device=device).mul_(0.5).to(case.params)
        found["params"] = params.contiguous(memory_format=torch.channels_last) if case.channels_last else params
    return found


def call(variant: str):
    from nfkernels import gaussian_log_density

    return lambda v, inverse: (gaussian_log_density(v["x"], v.get("params")),)


def hand_written(v: Inputs, inverse: bool):
    """The density as every Glow port writes it."""
    x = v["x"]
    if "params" not in v:
        return ((-0.5 * (x * x + math.log(2 * math.pi))).flatten(1).sum(1),)
    mean, log_scale = v["params"].to(x.dtype).chunk(2, 1)
    eps = (x - mean) * torch.exp(-log_scale)
    return ((-0.5 * (eps * eps + math.log(2 * math.pi)) - log_scale).flatten(1).sum(1),)


def cotangents(v: Inputs):
    x = v["x"]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [torch.randn(x.shape[0], device=x.device, dtype=dtype)]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and params are read; the backward reads them again and writes both gradients."""
    read = case.data_bytes + (2 * case.elements * case.params.itemsize if case.variant == LEARNED else 0)
    return {FORWARD: read, BACKWARD: 2 * read, STEP: 3 * read}[direction], 0


def cases(kind: str) -> list[Case]:
    images, rows = IMAGES[kind], ROWS[kind]
    found = spread("gaussian_log_density", (FORWARD, BACKWARD, STEP), images + demoted(rows))
    head = demoted(only(images), STANDARD)
    found += spread("gaussian_log_density", (FORWARD, BACKWARD), head, variant=STANDARD_NORMAL)
    narrow = {"params": torch.bfloat16, "channels_last": True}
    return found + spread("gaussian_log_density", (FORWARD, BACKWARD), demoted(head, EXTRA), **narrow)


def plain(variant: str):
    return hand_written


def peers(variant: str) -> dict[str, Peer]:
    return {"hand-written": Peer(hand_written)}


OP = Op("gaussian_log_density", inputs, call, plain, cotangents, count, cases, ("x", "params"), peers)
