"""LU-factored linear maps: Glow's form, on tables and images, and the form that nflows' ``LULinear`` computes."""

from __future__ import annotations

import torch

from ..case import BACKWARD, EXTRA, FORWARD, HEADLINE, INVERSE, STANDARD, STEP, Case, Inputs, Op, Peer
from ..peers.layers import installed, nflows_lu_linear
from .shapes import demoted, only, spread

DIAGONALS = {"": "exp", "nflows": "softplus"}
EPS = 1e-3
# From launch-bound to 1 GB for a GPU; a CPU's are those of tabular flows, then of Glow's levels.
SHAPES = {
    "cuda": [
        ((524288, 64), HEADLINE),
        ((64, 48, 64, 128), HEADLINE),
        ((256, 16), STANDARD),
        ((4194304, 64), STANDARD),
        ((4096, 64), STANDARD),
        ((65536, 128), EXTRA),
        ((64, 48, 16, 16), EXTRA),
    ],
    "cpu": [
        ((4096, 64), HEADLINE),
        ((64, 48, 16, 16), STANDARD),
        ((256, 64), STANDARD),
        ((4096, 8), EXTRA),
        ((4096, 32), EXTRA),
        ((4096, 128), EXTRA),
        ((65536, 64), EXTRA),
    ],
    "quick": [((8, 6), HEADLINE)],
}


def inputs(case: Case, device: torch.device) -> Inputs:
    """The factors of a rotation, as Glow begins with them; without its permutation and signs for nflows."""
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    width = case.shape[1]
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    p, lower, upper = torch.linalg.lu(rotation)
    s = upper.diagonal()
    found = {"x": torch.randn(case.shape).to(case.dtype), "lower": lower, "upper": upper, "log_s": s.abs().log(),
             "bias": torch.randn(width, dtype=torch.float64)}  # fmt: skip
    if case.variant != "nflows":
        found |= {"sign": s.sign(), "permutation": p.argmax(-1)}
    kept = ("x", "permutation")
    return {k: v.to(device) if k in kept else v.to(device, compute).contiguous() for k, v in found.items()}


def call(variant: str):
    from nfkernels import lu_linear

    def run(v: Inputs, inverse: bool):
        options = {"sign": v.get("sign"), "permutation": v.get("permutation"), "diagonal": DIAGONALS[variant]}
        return (lu_linear(v["x"], v["lower"], v["upper"], v["log_s"], v["bias"], eps=EPS, inverse=inverse, **options),)

    return run


def plain(variant: str):
    from nfkernels.reference.lu_compose import Diagonal
    from nfkernels.reference.lu_linear import forward

    kind = int(Diagonal[DIAGONALS[variant]])

    def run(v: Inputs, inverse: bool):
        factors = (v["lower"], v["upper"], v["log_s"], v.get("sign"), v.get("permutation"))
        return (forward(v["x"], *factors, v["bias"], kind, EPS, inverse),)

    return run


def bare_product(variant: str) -> Peer:
    """One product with a dense matrix and its gradients: no factors, and with the inverse no solve. What a linear map
    costs at least, which is why no speed-up is told over it."""
    from nfkernels.reference.channel_mix import forward
    from nfkernels.reference.lu_compose import Diagonal
    from nfkernels.reference.lu_compose import forward as compose

    def adapt(v: Inputs) -> Inputs:
        factors = [None if t is None else t[None] for t in (
            v["lower"], v["upper"], v["log_s"], v.get("sign"), v.get("permutation"))]  # fmt: skip
        weight, inverse, _ = compose(*factors, int(Diagonal[DIAGONALS[variant]]), EPS, True, True)
        return {"x": v["x"], "weight": weight[0], "inverse": inverse[0], "bias": v["bias"]}

    def run(v: Inputs, inverse: bool):
        if inverse:
            return (forward(v["x"], v["inverse"], v["bias"]),)
        return (forward(v["x"], v["weight"], v["bias"]),)

    def check(v: Inputs, outputs) -> bool:
        found = adapt(v)
        want = [forward(v["x"], found[k], v["bias"]).double() for k in ("weight", "inverse")]
        return any((outputs[0].double() - t).norm() <= 1e-3 * t.norm() for t in want)

    return Peer(run, adapt, check)


def cotangents(v: Inputs):
    return [torch.randn_like(v["x"])]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x and y, and one matrix's products with them; the backward reads x and dy, writes dx, and multiplies twice."""
    moved, products = {FORWARD: (2, 2), INVERSE: (2, 2), BACKWARD: (3, 4), STEP: (5, 6)}[direction]
    return moved * case.data_bytes, products * case.shape[1] * case.elements


def cases(kind: str) -> list[Case]:
    shapes = SHAPES[kind]
    found = spread("lu_linear", (FORWARD, INVERSE, STEP), shapes)
    if kind != "quick" and installed("nflows"):
        rows = [(shape, level) for shape, level in shapes if len(shape) == 2]
        found += spread("lu_linear", (FORWARD, INVERSE, STEP), only(rows), variant="nflows")
        found += spread("lu_linear", (INVERSE, STEP), demoted(only(rows, STANDARD), EXTRA), variant="nflows")
    return found


def peers(variant: str) -> dict[str, Peer]:
    found = {"bare product": bare_product(variant)}
    if variant == "nflows" and installed("nflows"):
        found["nflows"] = nflows_lu_linear()
    return found


DIFFERENTIABLE = ("x", "lower", "upper", "log_s", "bias", "weight")  # the last is the bare product's
OP = Op("lu_linear", inputs, call, plain, cotangents, count, cases, DIFFERENTIABLE, peers)
