"""Sampling from a masked autoregressive layer with two hidden layers: its inverse, against one pass per feature."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..case import EXTRA, HEADLINE, INVERSE, STANDARD, Case, Inputs, Op, Peer
from ..peers.layers import installed
from .shapes import only, spread

HIDDEN, LAYERS = 64, 2
SPLINE = "spline"  # of 8 bins; else nflows' affine map
SHAPES = {
    "cuda": [((65536, 20), HEADLINE), ((512, 20), STANDARD), ((8192, 20), STANDARD), ((8192, 63), EXTRA)],
    "cpu": [
        ((512, 20), HEADLINE),
        ((64, 20), STANDARD),
        ((10000, 20), STANDARD),
        ((512, 6), EXTRA),
        ((512, 63), EXTRA),
    ],
    "quick": [((8, 6), HEADLINE)],
}


@functools.lru_cache(maxsize=64)
def degrees_of(features: int):
    """As nflows' MADE has them, hidden units in the order of their degrees."""
    from nfkernels.ops import Degrees

    most = max(1, features - 1)
    hidden = sorted(i % most + min(1, features - 1) for i in range(HIDDEN))
    return Degrees(range(features), [hidden] * LAYERS)


def transform_of(variant: str):
    from nfkernels import ScaleMap, Spline

    return Spline() if variant == SPLINE else ScaleMap("softplus", eps=1e-3)


def params_of(variant: str) -> int:
    return transform_of(variant).params_per_element if variant == SPLINE else 2


def inputs(case: Case, device: torch.device) -> Inputs:
    found = {"z": torch.randn(case.shape[:2])}
    for i, mask in enumerate(degrees_of(case.shape[1]).masks(params_of(case.variant))):
        found[f"weight{i}"] = mask * torch.randn(mask.shape) / mask.shape[1] ** 0.5
        found[f"bias{i}"] = 0.1 * torch.randn(len(mask))
    return {k: v.to(device, case.dtype) for k, v in found.items()}


def network(v: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    return [v[f"weight{i}"] for i in range(LAYERS + 1)], [v[f"bias{i}"] for i in range(LAYERS + 1)]


def call(variant: str):
    from nfkernels import autoregressive_inverse

    transform = transform_of(variant)

    def run(v: Inputs, inverse: bool):
        return autoregressive_inverse(v["z"], *network(v), degrees_of(v["z"].shape[1]), transform=transform)

    return run


def plain(variant: str):
    from nfkernels.ops.autoregressive_inverse import _transform
    from nfkernels.reference.autoregressive_inverse import Shape, forward

    transform, _ = _transform(transform_of(variant), "scale_first", "scale_shift", True)

    def run(v: Inputs, inverse: bool):
        degrees = degrees_of(v["z"].shape[1])
        shape = Shape(degrees.passes, 0, [-1] * LAYERS, True)
        return forward(v["z"], *network(v), [None] * LAYERS, degrees.table(v["z"]), shape, transform)

    return run


def nflows_passes(variant: str) -> Peer:
    """``nflows.transforms.MaskedAffineAutoregressiveTransform``, its parameters ours but for the units' order."""
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform

    made = {}

    def layers(features: int, z: Tensor):
        key = features, z.device, z.dtype
        if key not in made:
            layer = MaskedAffineAutoregressiveTransform(
                features, HIDDEN, num_blocks=LAYERS - 1, use_residual_blocks=False
            ).to(z)
            net = layer.autoregressive_net
            made[key] = layer, [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer]
        return made[key]

    def adapt(v: Inputs) -> Inputs:
        _, linears = layers(v["z"].shape[1], v["z"])
        found, order = {"z": v["z"]}, None
        for i, linear in enumerate(linears):
            weight, bias = v[f"weight{i}"], v[f"bias{i}"]
            weight = weight if order is None else weight[:, order]
            order = torch.argsort(torch.argsort(linear.degrees, stable=True))
            if i < LAYERS:
                weight, bias = weight[order], bias[order]
            found |= {f"weight{i}": weight, f"bias{i}": bias}
        return found

    def run(v: Inputs, inverse: bool):
        layer, linears = layers(v["z"].shape[1], v["z"])
        for i, linear in enumerate(linears):
            linear._parameters.clear()
            linear.weight, linear.bias = v[f"weight{i}"], v[f"bias{i}"]
        return layer.inverse(v["z"])

    return Peer(run, adapt)


def cotangents(v: Inputs) -> list[Tensor]:
    return [torch.randn_like(v["z"]), torch.randn_like(v["z"][:, 0])]


def count(case: Case, direction: str) -> tuple[float, float]:
    """z and x, and each weight that the masks leave once for every sample."""
    kept = sum(int(mask.sum()) for mask in degrees_of(case.shape[1]).masks(params_of(case.variant)))
    return 2 * case.data_bytes, 2 * kept * case.shape[0]


def cases(kind: str) -> list[Case]:
    found = spread("autoregressive_inverse", (INVERSE,), SHAPES[kind])
    return found + spread("autoregressive_inverse", (INVERSE,), only(SHAPES[kind], STANDARD), variant=SPLINE)


def peers(variant: str) -> dict[str, Peer]:
    return {"nflows": nflows_passes(variant)} if variant != SPLINE and installed("nflows") else {}


OP = Op("autoregressive_inverse", inputs, call, plain, cotangents, count, cases, (), peers)
