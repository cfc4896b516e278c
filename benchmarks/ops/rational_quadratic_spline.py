"""The rational-quadratic spline of every element: 8 bins, on tables and images, and the forms of other libraries."""

from __future__ import annotations

import torch

from ..case import BACKWARD, EXTRA, FORWARD, HEADLINE, INVERSE, STANDARD, STEP, Case, Inputs, Op, Peer
from ..peers.layers import SPLINES, installed
from .shapes import demoted, only, spread

# Params are 23 times the data: the headline's 400 MB of them are past any cache.
SHAPES = {
    "cuda": [
        ((262144, 16), HEADLINE),
        ((512, 5), STANDARD),
        ((65536, 16), STANDARD),
        ((64, 24, 32, 32), STANDARD),
        ((64, 12, 16, 16), EXTRA),
    ],
    "cpu": [((8192, 8), HEADLINE), ((512, 5), STANDARD), ((64, 6, 16, 16), STANDARD), ((65536, 2), EXTRA)],
    "quick": [((8, 6), HEADLINE), ((2, 4, 4, 4), STANDARD)],
}
VARIANTS = ("", "10 bins", "16 bins", "zuko", "circular")


def spline_of(variant: str):
    from nfkernels import Spline

    forms = {"": Spline(), "10 bins": Spline(10), "16 bins": Spline(16), "circular": Spline(tails="circular")}
    return forms[variant] if variant in forms else Spline.parse(variant)


def inputs(case: Case, device: torch.device) -> Inputs:
    """Bins alike but for noise, and every element in the middle of one: beside a knot gradients jump, and which bin is
    meant is a matter of rounding."""
    spline, (batch, channels, *spatial) = spline_of(case.variant), case.shape
    params = torch.randn(batch, channels, spline.params_per_element, *spatial, device=device, dtype=case.params)
    params[:, :, : 2 * spline.bins].mul_(0.02)
    params = params.flatten(1, 2)
    if case.channels_last:
        params = params.contiguous(memory_format=torch.channels_last)
    place = torch.randint(spline.bins, case.shape, device=device) + 0.2 + 0.6 * torch.rand(case.shape, device=device)
    x = spline.low + (spline.high - spline.low) / spline.bins * place
    return {"x": x.to(case.dtype), "params": params}


def call(variant: str):
    from nfkernels import rational_quadratic_spline

    spline = spline_of(variant)
    return lambda v, inverse: rational_quadratic_spline(v["x"], v["params"], spline=spline, inverse=inverse)


def plain(variant: str):
    from nfkernels.reference.rational_quadratic_spline import Form, forward

    both = [Form.pack(spline_of(variant), inverse, False) for inverse in (False, True)]
    return lambda v, inverse: forward(v["x"], v["params"], None, None, None, both[inverse])


def cotangents(v: Inputs):
    x = v["x"]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [torch.randn_like(x), torch.randn(x.shape[0], device=x.device, dtype=dtype)]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x, params and y; the backward reads x, params and dy and writes dx and dparams."""
    data, raw = case.data_bytes, spline_of(case.variant).params_per_element * case.elements * case.params.itemsize
    forward, backward = 2 * data + raw, 3 * data + 2 * raw
    return {FORWARD: forward, INVERSE: forward, BACKWARD: backward, STEP: forward + backward}[direction], 0


def cases(kind: str) -> list[Case]:
    name, shapes = "rational_quadratic_spline", SHAPES[kind]
    found = spread(name, (FORWARD, BACKWARD, INVERSE, STEP), shapes)
    head = demoted(only(shapes), STANDARD)
    found += spread(name, (FORWARD, BACKWARD), head, params=torch.bfloat16)
    for variant in VARIANTS[1:]:
        found += spread(name, (FORWARD, BACKWARD), demoted(head, EXTRA), variant=variant)
    if installed("zuko"):
        found += spread(name, (INVERSE, STEP), demoted(head, EXTRA), variant="zuko")
    images = [(shape, EXTRA) for shape, level in shapes if len(shape) == 4 and level == STANDARD]
    return found + spread(name, (FORWARD, BACKWARD), images, params=torch.bfloat16, channels_last=True)


def peers(variant: str) -> dict[str, Peer]:
    """Who computes exactly this."""
    library = variant or "nflows"
    if library not in SPLINES or not installed(library):
        return {}
    spline = spline_of(variant)
    return {library: SPLINES[library](spline.bins, spline.high)}


OP = Op("rational_quadratic_spline", inputs, call, plain, cotangents, count, cases, ("x", "params"), peers)
