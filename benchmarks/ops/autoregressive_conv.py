"""Autoregressive convolution, 3 x 3: half of an emerging convolution; forward, step, and the inverse that solves it.

``solve`` are the inverses, ``solve, loop`` small ones that a loop over pixels is measured on too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..case import EXTRA, FORWARD, HEADLINE, INVERSE, STANDARD, STEP, Case, Inputs, Op, Peer
from .shapes import spread

SOLVE, LOOP, RASTER = "solve", "solve, loop", "raster"
# What torch.compile unrolls grows with height and width: inverses at the sizes of CIFAR's levels only.
SHAPES = {
    "cuda": [
        ((1344, 12, 32, 32), HEADLINE),
        ((16, 12, 8, 8), STANDARD),
        ((1344, 12, 128, 128), STANDARD),
        ((64, 12, 32, 32), STANDARD),
        ((64, 48, 16, 16), STANDARD),
        ((64, 96, 8, 8), EXTRA),
    ],
    "cpu": [
        ((64, 12, 32, 32), HEADLINE),
        ((64, 48, 16, 16), STANDARD),
        ((1, 12, 32, 32), EXTRA),
        ((64, 96, 8, 8), EXTRA),
    ],
    "quick": [((2, 4, 4, 4), HEADLINE)],
}
LOOPED = {"cuda": (64, 12, 8, 8), "cpu": (64, 12, 8, 8), "quick": (2, 4, 2, 2)}
RASTERED = {"cuda": (64, 24, 16, 16), "cpu": (64, 24, 16, 16), "quick": (2, 4, 4, 4)}


def mask_of(variant: str) -> str:
    return "raster" if variant == RASTER else "square"


def image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Tables are images of one pixel, sequences images of one row."""
    return (*shape, 1, 1) if len(shape) == 2 else (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape


def inputs(case: Case, device: torch.device) -> Inputs:
    """A weight close to the identity, as trained ones are: the inverse of random data stays as large as the data."""
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    channels = case.shape[1]
    x = torch.randn(image(case.shape), device=device).to(case.dtype)
    weight = 0.3 * torch.randn(channels, channels, 3, 3, dtype=torch.float64) / (3 * channels**0.5)
    weight[:, :, 1, 1].diagonal().copy_(0.9 + 0.2 * torch.rand(channels, dtype=torch.float64))
    return {"x": x, "weight": weight.to(device, compute), "bias": torch.randn(channels, device=device, dtype=compute)}


def call(variant: str):
    from nfkernels import autoregressive_conv

    mask = mask_of(variant)
    return lambda v, inverse: (autoregressive_conv(v["x"], v["weight"], v["bias"], mask=mask, inverse=inverse),)


def plain(variant: str):
    from nfkernels.ops.autoregressive_conv import stacked_taps
    from nfkernels.reference.autoregressive_conv import Form, forward, premultiplied

    form = Form(3, 3, mask_of(variant) == "raster", False)

    def run(v: Inputs, inverse: bool):
        weight, bias = stacked_taps(v["weight"], form), v["bias"]
        if inverse:
            weight, bias = premultiplied(weight, bias, form)
        return (forward(v["x"], weight, bias, form, inverse),)

    return run


def conv2d(v: Inputs, inverse: bool):
    """The square mask's four taps, the centre's a triangle, as a 2 x 2 convolution."""
    (a, b), (c, d) = (row.unbind(2) for row in v["weight"][:, :, :2, :2].unbind(2))
    kernel = torch.stack([a, b, c, d.tril()], 2).unflatten(2, (2, 2))
    return (F.conv2d(F.pad(v["x"], (1, 0, 1, 0)), kernel, v["bias"]),)


def loop(v: Inputs, inverse: bool):
    """Pixel after pixel, a triangular solve each, all samples at once."""
    if not inverse:
        return conv2d(v, False)
    y, weight = v["x"], v["weight"]
    made: dict[tuple[int, int], torch.Tensor] = {}
    for h in range(y.shape[2]):
        for w in range(y.shape[3]):
            rest = y[:, :, h, w] - v["bias"]
            for dh, dw in ((0, 1), (1, 0), (1, 1)):
                if (h - dh, w - dw) in made:
                    rest = rest - made[h - dh, w - dw] @ weight[:, :, 1 - dh, 1 - dw].t()
            made[h, w] = torch.linalg.solve_triangular(weight[:, :, 1, 1].tril(), rest.t(), upper=False).t()
    return (torch.stack(list(made.values()), 2).reshape(y.shape),)


def cotangents(v: Inputs):
    return [torch.randn_like(v["x"])]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and y; a step reads x and dy and writes dx besides, and multiplies three times."""
    taps = 5 if case.variant == RASTER else 4
    moved, products = {FORWARD: (2, 2), INVERSE: (2, 2), STEP: (5, 6)}[direction]
    return moved * case.data_bytes, products * taps * case.shape[1] * case.elements


def cases(kind: str) -> list[Case]:
    name = "autoregressive_conv"
    solved = [(shape, level) for shape, level in SHAPES[kind] if math.prod(shape[2:]) <= 1024]
    found = spread(name, (FORWARD, STEP), SHAPES[kind]) + spread(name, (INVERSE,), solved, variant=SOLVE)
    found += spread(name, (INVERSE,), [(LOOPED[kind], STANDARD)], variant=LOOP)
    return found + spread(name, (FORWARD, INVERSE), [(RASTERED[kind], EXTRA)], variant=RASTER)


def peers(variant: str) -> dict[str, Peer]:
    return {"": {"conv2d": Peer(conv2d)}, LOOP: {"hand-written": Peer(loop)}}.get(variant, {})


OP = Op("autoregressive_conv", inputs, call, plain, cotangents, count, cases, ("x", "weight", "bias"), peers)
