"""What the couplings of a flow are told to do while data goes through it, seen where they all come by: at the ops."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..reference import affine_coupling, rational_quadratic_spline
from ..reference.affine_coupling import Form
from ..reference.scale_map import ScaleMap, log_scale, log_scale_derivatives

# A scale is saturated where its map's slope is below this share of its steepest.
_FLAT = 0.01
# Where each op has its options: name -> (map kind, place of the form's first number, place of gain or None).
_AFFINE = {"_affine_coupling_forward": (2, 3, 4, 6), "_coupling_mix_forward": (None, None, 4, 6)}
_SPLINE = "_rational_quadratic_spline_forward"


@dataclass(frozen=True)
class Scales:
    """Of one coupling (or other transform) in one pass.

    Args:
        finite: whether its output is.
        largest: the largest ``|log s|`` among its scales, 0 for splines.
        grown: the logarithm of how much larger its largest output is than its largest input (or than 1).
        saturated: the share of its scales on the flat part of their map.
        outside: the share of what a spline transforms that lies outside of its interval, where it does nothing.
        where: the map's kind, ``"spline"`` for splines.
    """

    finite: bool
    largest: float
    grown: float
    saturated: float
    outside: float
    where: str


class WatchScales(TorchDispatchMode):
    """Inside, ``tell`` gets a :class:`Scales` for every coupling op that runs. It waits for the device at each."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if getattr(function, "namespace", "") == "nfkernels":
            name = function._schema.name.removeprefix("nfkernels::")
            if name in _AFFINE:
                self._tell(_affine(args, _AFFINE[name], out[0]))
            elif name == _SPLINE:
                self._tell(_spline(args, out[0]))
        return out


def _affine(args: tuple, places: tuple, y: Tensor) -> Scales:
    at_map, at_mask, at_gain, at_form = places
    x, params, gain = args[0], args[1], args[at_gain]
    channel_map, mask = (None if at is None else args[at] for at in (at_map, at_mask))
    form = Form.unpack(*args[at_form : at_form + 6])
    finite, grown = _outcome(x, y)
    none = Scales(finite, 0.0, grown, 0.0, 0.0, form.map.kind)
    if not form.map.has_scale:
        return none
    _, where = affine_coupling._select(x, params, channel_map, mask, form)
    _, raw, factor = affine_coupling._params(params, channel_map, gain, where, x, form)
    assert raw is not None
    log_s = log_scale(form.map, raw, factor)
    slope = log_scale_derivatives(form.map, raw)[0].abs()
    if where is not None:
        chosen = where.expand_as(raw)
        log_s, slope = log_s[chosen], slope[chosen]
    if not slope.numel():
        return none
    flat = (slope < _FLAT * _steepest(form.map)).float().mean()
    return Scales(finite, float(log_s.abs().max()), grown, float(flat), 0.0, form.map.kind)


def _outcome(x: Tensor, y: Tensor) -> tuple[bool, float]:
    if not y.numel():
        return True, 0.0
    before, after = float(x.abs().max()), float(y.abs().max())
    finite = math.isfinite(after)  # max keeps NaN
    return finite, math.log(max(after, 1e-30) / max(before, 1.0)) if finite and math.isfinite(before) else math.inf


@functools.cache
def _steepest(scale_map: ScaleMap) -> float:
    a = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    prescale = scale_map.prescale if scale_map.prescale else 1.0
    slope = log_scale_derivatives(scale_map, (a - scale_map.offset) / prescale)[0].abs()
    return float(slope.max()) or math.inf


def _spline(args: tuple, y: Tensor) -> Scales:
    x, params, channel_map, mask = args[:4]
    form = rational_quadratic_spline.Form(*args[5:16])
    finite, grown = _outcome(x, y)
    if not form.identity_outside or form.derivatives.name == "periodic":
        return Scales(finite, 0.0, grown, 0.0, 0.0, "spline")
    low, high = (form.bottom, form.top) if form.inverse else (form.low, form.high)
    out = (x < low) | (x > high)
    moved = rational_quadratic_spline._moved(x, mask, channel_map, form, params)
    out = out if moved is None else out[moved.expand_as(out)]
    return Scales(finite, 0.0, grown, 0.0, float(out.float().mean()) if out.numel() else 0.0, "spline")
