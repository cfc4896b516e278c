"""LU composition of K matrices of C channels: Glow's 1x1 convolutions, nflows' linear layer. A shape is [K, C, C]."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..case import BACKWARD, EXTRA, FORWARD, HEADLINE, STANDARD, STEP, Case, Inputs, Op, Peer
from .shapes import spread

# W and W^-1 with an exponential diagonal, its signs and a permutation; W alone with a softplus diagonal.
GLOW, NFLOWS = "", "nflows"
EPS = 1e-3
# Many dependent steps on little data: a Glow level's steps, a table's layer. Nothing here fills a GPU's memory.
SHAPES = {
    "cuda": [
        ((32, 48, 48), HEADLINE),
        ((32, 12, 12), STANDARD),
        ((1, 64, 64), STANDARD),
        ((4, 512, 512), STANDARD),
        ((1024, 64, 64), EXTRA),
    ],
    "cpu": [((32, 48, 48), HEADLINE), ((32, 12, 12), STANDARD), ((1, 64, 64), STANDARD), ((4, 256, 256), EXTRA)],
    "quick": [((2, 4, 4), HEADLINE)],
}


def inputs(case: Case, device: torch.device) -> Inputs:
    """Well conditioned, as trained ones are; a shape's axes after C mean nothing. Stored in float32 or float64."""
    count, channels = case.shape[:2]
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    triangles = torch.randn(2, count, channels, channels, device=device) * (0.5 / channels**0.5)
    found = {
        "lower": triangles[0].tril(-1).to(compute),
        "upper": triangles[1].triu(1).to(compute),
        "log_s": (0.1 * torch.randn(count, channels, device=device)).to(compute),
    }
    if case.variant == GLOW:
        found["sign"] = (torch.randint(0, 2, (count, channels), device=device) * 2 - 1).to(compute)
        found["permutation"] = torch.rand(count, channels, device=device).argsort(-1)
    return found


def call(variant: str):
    from nfkernels import lu_compose

    def run(v: Inputs, inverse: bool):
        factors = v["lower"], v["upper"], v["log_s"]
        if variant == GLOW:
            return tuple(lu_compose(*factors, sign=v["sign"], permutation=v["permutation"]))
        return tuple(lu_compose(*factors, diagonal="softplus", eps=EPS, inverse=False)[::2])

    return run


def plain(variant: str):
    from nfkernels.reference.lu_compose import forward

    def run(v: Inputs, inverse: bool):
        options = (0, EPS, True, True) if variant == GLOW else (1, EPS, True, False)
        made = forward(v["lower"], v["upper"], v["log_s"], v.get("sign"), v.get("permutation"), *options)
        return tuple(t for t in made if t is not None)

    return run


def hand_written(v: Inputs, inverse: bool):
    """Matrix by matrix in the storage's dtype, as every port writes it."""
    weights, inverses, logdet = [], [], v["log_s"].new_zeros(())
    eye = torch.eye(v["lower"].shape[1], dtype=v["lower"].dtype, device=v["lower"].device)
    for k in range(v["lower"].shape[0]):
        below, raw = v["lower"][k].tril(-1) + eye, v["log_s"][k]
        if "permutation" not in v:
            s = F.softplus(raw) + EPS
            weights.append(below @ (v["upper"][k].triu(1) + torch.diag(s)))
            logdet = logdet + torch.log(s).sum()
            continue
        p, above = eye[v["permutation"][k]], v["upper"][k].triu(1) + torch.diag(v["sign"][k] * torch.exp(raw))
        weights.append(p @ (below @ above))
        half = torch.linalg.solve_triangular(below, p.t(), upper=False, unitriangular=True)
        inverses.append(torch.linalg.solve_triangular(above, half, upper=True))
        logdet = logdet + raw.sum()
    return (torch.stack(weights), *([torch.stack(inverses)] if inverses else []), logdet)


def cotangents(v: Inputs):
    """Of every matrix that is made, and of the log-determinant."""
    lower = v["lower"]
    made = [torch.randn_like(lower) for _ in range(2 if "permutation" in v else 1)]
    return [*made, torch.ones((), dtype=lower.dtype, device=lower.device)]


def count(case: Case, direction: str) -> tuple[float, float]:
    """In whole squares: two triangles in, one or two matrices out; the backward reads the gradients, the triangles and
    the inverse, and writes two. Multiply-adds of the substitutions and products, in C^3."""
    number, channels = case.shape[:2]
    square, cube = number * channels**2 * (8 if case.dtype == torch.float64 else 4), number * channels**3
    once = {FORWARD: (3 * square, 2 * cube), BACKWARD: (6 * square, 6 * cube)}
    if case.variant == NFLOWS:
        once = {FORWARD: (2 * square, 2 / 3 * cube), BACKWARD: (4 * square, 2 * cube)}
    return tuple(map(sum, zip(*once.values(), strict=True))) if direction == STEP else once[direction]


def cases(kind: str) -> list[Case]:
    found = spread("lu_compose", (FORWARD, BACKWARD, STEP), SHAPES[kind])
    small = [(shape, max(level, STANDARD)) for shape, level in SHAPES[kind] if level != EXTRA]
    return found + spread("lu_compose", (FORWARD, BACKWARD), small, variant=NFLOWS)


def peers(variant: str) -> dict[str, Peer]:
    return {"hand-written": Peer(hand_written)}


OP = Op("lu_compose", inputs, call, plain, cotangents, count, cases, ("lower", "upper", "log_s"), peers)
