"""A scale and a shift per channel, an actnorm; with a permutation of the channels before it too."""

from __future__ import annotations

import torch

from ..case import FORWARD, STANDARD, STEP, Case, Inputs, Op
from .shapes import IMAGES, demoted, only, spread

ORDERED = "permuted"


def inputs(case: Case, device: torch.device) -> Inputs:
    channels = case.shape[1]
    found = {"x": torch.randn(case.shape).to(case.dtype), "scale": torch.rand(channels) + 0.5,
             "shift": torch.randn(channels)}  # fmt: skip
    if case.variant == ORDERED:
        found["order"] = torch.randperm(channels)
    return {k: v.to(device) for k, v in found.items()}


def call(variant: str):
    from nfkernels import channel_affine

    return lambda v, inverse: (channel_affine(v["x"], v["scale"], v["shift"], v.get("order")),)


def plain(variant: str):
    """As an actnorm is written: parameters ``[1, C, 1, 1]``."""

    def run(v, inverse):
        x = v["x"] if "order" not in v else v["x"].index_select(1, v["order"])
        ones = [1] * (x.dim() - 2)
        return (x * v["scale"].view(-1, *ones) + v["shift"].view(-1, *ones),)

    return run


def cotangents(v: Inputs):
    return [torch.randn_like(v["x"])]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and y; the backward reads x and dy and writes dx."""
    return {FORWARD: 2, STEP: 5}[direction] * case.data_bytes, 0


def cases(kind: str) -> list[Case]:
    images = IMAGES[kind]
    found = spread("channel_affine", (FORWARD, STEP), images)
    return found + spread("channel_affine", (FORWARD, STEP), demoted(only(images), STANDARD), variant=ORDERED)


OP = Op("channel_affine", inputs, call, plain, cotangents, count, cases, ("x", "scale", "shift"))
