"""nflows' and normflows' LU layer whole: packed triangles, a permutation before, the map and its log-determinant."""

from __future__ import annotations

import torch

from ..case import EXTRA, FORWARD, HEADLINE, INVERSE, STANDARD, STEP, Case, Inputs, Op
from . import lu_linear
from .shapes import spread

EPS = 1e-3
SHAPES = {
    "cuda": [((512, 10), HEADLINE), ((4096, 64), STANDARD)],
    "cpu": [
        ((512, 10), HEADLINE),
        ((4096, 64), STANDARD),
        ((64, 4), STANDARD),
        ((512, 32), EXTRA),
        ((4096, 128), EXTRA),
    ],
    "quick": [((8, 6), HEADLINE)],
}


def inputs(case: Case, device: torch.device) -> Inputs:
    from nfkernels.reference.lu_layer import packed

    found = lu_linear.inputs(case, torch.device("cpu"))
    found["lower"], found["upper"] = (
        packed(found["lower"], False).contiguous(),
        packed(found["upper"], True).contiguous(),
    )
    return {k: v.to(device) for k, v in found.items() if k != "sign"} | {"columns": found["permutation"].to(device)}


def call(variant: str):
    from nfkernels import lu_layer

    def run(v: Inputs, inverse: bool):
        factors = v["lower"], v["upper"], v["log_s"], v["bias"]
        return lu_layer(v["x"], *factors, columns=v["columns"], diagonal="softplus", eps=EPS, inverse=inverse)

    return run


def plain(variant: str):
    from nfkernels.reference.lu_compose import Diagonal
    from nfkernels.reference.lu_layer import forward

    def run(v: Inputs, inverse: bool):
        factors = v["lower"], v["upper"], v["log_s"], None, None, v["columns"], v["bias"]
        return forward(v["x"], *factors, int(Diagonal.softplus), EPS, inverse)

    return run


def cotangents(v: Inputs):
    x = v["x"]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [torch.randn_like(x), torch.randn(x.shape[0], device=x.device, dtype=dtype)]


def cases(kind: str) -> list[Case]:
    return spread("lu_layer", (FORWARD, INVERSE, STEP), SHAPES[kind])


DIFFERENTIABLE = ("x", "lower", "upper", "log_s", "bias")
OP = Op("lu_layer", inputs, call, plain, cotangents, lu_linear.count, cases, DIFFERENTIABLE)
