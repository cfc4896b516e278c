"""Layers of other libraries as contenders, where they are installed: their own classes, given our params."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ..case import Inputs, Peer


class Given(nn.Module):
    """A conditioner that returns the params it was handed."""

    params: torch.Tensor

    def forward(self, identity, context=None):
        return self.params


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def normflows_coupling() -> Peer:
    """``normflows.flows.AffineCoupling``, ``exp`` map, with its split and merge; its z to x is our forward."""
    from normflows.flows import AffineCoupling, Merge, Split

    given = Given()
    split, merge, coupling = Split("channel"), Merge("channel"), AffineCoupling(given, scale_map="exp")

    def run(v: Inputs, inverse: bool):
        given.params = v["params"].to(v["x"].dtype)
        halves, _ = split.forward(v["x"])
        halves, logdet = coupling.inverse(halves) if inverse else coupling.forward(halves)
        return merge.forward(halves)[0], logdet

    return Peer(run)


def nflows_coupling() -> Peer:
    """``nflows.transforms.AffineCouplingTransform`` that keeps the first half."""
    from nflows.transforms import AffineCouplingTransform

    given, made = Given(), {}

    def run(v: Inputs, inverse: bool):
        x = v["x"]
        key = (x.shape[1], x.device)
        if key not in made:  # its masks are index buffers for one number of channels
            kept = x.shape[1] - x.shape[1] // 2
            mask = torch.cat([torch.zeros(kept), torch.ones(x.shape[1] // 2)])
            made[key] = AffineCouplingTransform(mask, lambda inputs, outputs: given).to(x.device)
        given.params = v["params"].to(x.dtype)
        return made[key].inverse(x) if inverse else made[key].forward(x)

    return Peer(run)


def nflows_lu_linear() -> Peer:
    """``nflows.transforms.LULinear``, its parameters ours: packed triangles, as it keeps them."""
    from nflows.transforms import LULinear

    made, last = {}, {}

    def adapt(v: Inputs) -> Inputs:
        below, above = (torch.ones_like(v["lower"], dtype=torch.bool).tril(-1) for _ in range(2))
        return {"x": v["x"], "lower": v["lower"][below], "upper": v["upper"][above.t()], "log_s": v["log_s"],
                "bias": v["bias"]}  # fmt: skip

    def run(v: Inputs, inverse: bool):
        key = (v["x"].shape[1], v["x"].device)
        if key not in made:
            made[key] = LULinear(v["x"].shape[1]).to(v["x"].device)
            made[key]._parameters.clear()
        layer = made[key]
        layer.lower_entries, layer.upper_entries = v["lower"], v["upper"]
        layer.unconstrained_upper_diag, layer.bias = v["log_s"], v["bias"]
        last["inverse"] = inverse
        return ((layer.inverse if inverse else layer.forward)(v["x"])[0],)

    def check(v: Inputs, outputs) -> bool:
        """The map alone: gradients of packed triangles have another shape."""
        from nfkernels.reference.lu_compose import Diagonal
        from nfkernels.reference.lu_linear import forward

        wide = {k: t.double() for k, t in v.items()}
        want = forward(wide["x"], wide["lower"], wide["upper"], wide["log_s"], None, None, wide["bias"],
                       int(Diagonal.softplus), 1e-3, last["inverse"])  # fmt: skip
        return bool((outputs[0].double() - want).norm() <= 1e-3 * want.norm())

    return Peer(run, adapt, check)


def _raw(v: Inputs, bins: int) -> tuple[torch.Tensor, ...]:
    """Widths, heights and slopes of every element, each along the last axis."""
    x = v["x"]
    each = v["params"].to(x.dtype).unflatten(1, (x.shape[1], -1)).movedim(2, -1)
    return each.split([bins, bins, each.shape[-1] - 2 * bins], -1)


def nflows_spline(bins: int, bound: float) -> Peer:
    """nflows' function with linear tails, and the sum that its transforms take of the logarithms."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def run(v: Inputs, inverse: bool):
        y, logs = unconstrained_rational_quadratic_spline(
            v["x"], *_raw(v, bins), inverse=inverse, tails="linear", tail_bound=bound
        )
        return y, logs.flatten(1).sum(1)

    return Peer(run)


def zuko_spline(bins: int, bound: float) -> Peer:
    """``zuko.transforms.MonotonicRQSTransform``."""
    from zuko.transforms import MonotonicRQSTransform

    def run(v: Inputs, inverse: bool):
        transform = MonotonicRQSTransform(*_raw(v, bins), bound=bound)
        y, logs = (transform.inv if inverse else transform).call_and_ladj(v["x"])
        return y, logs.flatten(1).sum(1)

    return Peer(run)


SPLINES = {"nflows": nflows_spline, "zuko": zuko_spline}
COUPLINGS = {"normflows": normflows_coupling, "nflows": nflows_coupling}
