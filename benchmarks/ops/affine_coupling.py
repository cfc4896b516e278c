"""Affine coupling: Glow's form with a full output, the transformed half alone, and RealNVP's ``x s + t``."""

from __future__ import annotations

import torch

from ..case import BACKWARD, EXTRA, FORWARD, INVERSE, STANDARD, STEP, Case, Inputs, Op, Peer
from ..peers.layers import COUPLINGS, installed
from .shapes import IMAGES, ROWS, demoted, only, spread

FORMS = {
    "": {"scale_map": "glow", "order": "shift_first", "identity": "first"},
    "halves": {"scale_map": "glow", "order": "shift_first", "identity": "none"},
    "realnvp": {"scale_map": "realnvp", "order": "scale_first", "identity": "first"},
    # What these libraries compute, measured where they are installed.
    "normflows": {"scale_map": "exp", "order": "scale_first", "identity": "first", "layout": "shift_scale_interleaved"},
    "nflows": {"scale_map": "nflows", "order": "scale_first", "identity": "first"},
}


def inputs(case: Case, device: torch.device) -> Inputs:
    batch, channels, *spatial = case.shape
    width = channels * 2 if case.variant == "halves" else channels // 2 * 2
    params = torch.randn(batch, width, *spatial, device=device).to(case.params)
    if case.channels_last:
        params = params.contiguous(memory_format=torch.channels_last)
    return {"x": torch.randn(case.shape, device=device).to(case.dtype), "params": params}


def call(variant: str):
    from nfkernels import affine_coupling

    form = FORMS[variant]
    return lambda v, inverse: affine_coupling(v["x"], v["params"], inverse=inverse, **form)


def plain(variant: str):
    from nfkernels import ScaleMap
    from nfkernels.reference.affine_coupling import Form, Identity, Layout, Order, forward

    form = FORMS[variant]
    scale_map, order = ScaleMap.parse(form["scale_map"]), Order[form["order"]]
    layout, identity = Layout[form.get("layout", "shift_scale")], Identity[form["identity"]]
    both = [Form(scale_map, layout, order, identity, inverse) for inverse in (False, True)]
    return lambda v, inverse: forward(v["x"], v["params"], None, None, None, None, both[inverse])


def hand_written(v: Inputs, inverse: bool):
    """The coupling as every Glow port writes it."""
    x1, x2 = v["x"].chunk(2, 1)
    shift, raw = v["params"].to(x1.dtype).chunk(2, 1)
    scale = torch.sigmoid(raw + 2)
    logdet = torch.log(scale).flatten(1).sum(1)
    if inverse:
        return torch.cat([x1, x2 / scale - shift], 1), -logdet
    return torch.cat([x1, (x2 + shift) * scale], 1), logdet


def cotangents(v: Inputs):
    x = v["x"]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [torch.randn_like(x), torch.randn(x.shape[0], device=x.device, dtype=dtype)]


def count(case: Case, direction: str) -> tuple[float, float]:
    """x, params and y; the backward reads the transformed half of y, dy and the raw scale (``x s + t``: the shift too)
    and writes dx and dparams."""
    n, s, p = case.elements, case.dtype.itemsize, case.params.itemsize
    whole = 2 if case.variant == "halves" else 1  # params per element of x
    if direction in (FORWARD, INVERSE):
        return n * (2 * s + whole * p), 0
    if direction == STEP:
        return sum(count(case, d)[0] for d in (FORWARD, BACKWARD)), 0
    read = whole if FORMS[case.variant]["order"] == "scale_first" else whole / 2
    return n * ((2.5 if whole == 1 else 3) * s + (read + whole) * p), 0


def cases(kind: str) -> list[Case]:
    images, rows = IMAGES[kind], ROWS[kind]
    found = spread("affine_coupling", (FORWARD, BACKWARD, INVERSE, STEP), images + rows)
    head = demoted(only(images), STANDARD)
    narrow = {"params": torch.bfloat16, "channels_last": True}
    found += spread("affine_coupling", (FORWARD, BACKWARD), head, **narrow)
    for variant in ("halves", "realnvp"):
        found += spread("affine_coupling", (FORWARD, BACKWARD), demoted(head, EXTRA), variant=variant)
    for library in others():
        found += spread("affine_coupling", (FORWARD, INVERSE, STEP), demoted(head, EXTRA), variant=library)
    return found


def others() -> list[str]:
    """The libraries that are here to be compared with."""
    return [library for library in COUPLINGS if installed(library)]


def peers(variant: str) -> dict[str, Peer]:
    if variant in COUPLINGS:
        return {variant: COUPLINGS[variant]()} if installed(variant) else {}
    return {"hand-written": Peer(hand_written)} if variant == "" else {}


OP = Op("affine_coupling", inputs, call, plain, cotangents, count, cases, ("x", "params"), peers)
