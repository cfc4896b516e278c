"""``flow.check(x)``: every layer on the data it really meets, round trip and log-determinant against the truth."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .bijection import Bijection, Inverse

# A dense Jacobian is taken where one sample has at most this many elements.
JACOBIAN_ELEMENTS = 512

# Above these a layer is at fault. A round trip in float32 through a well-conditioned layer is near 1e-6.
ROUND_TRIP = 1e-3
LOGDET = 1e-6  # relative, in float64


@dataclass
class LayerCheck:
    """One row: what was found for one layer. ``nan`` where it was not measured."""

    name: str
    kind: str
    shape: tuple[int, ...]
    round_trip: float  # max |inverse(forward(x)) - x| / max(1, max |x|), in the layer's own precision
    logdet_sum: float  # max |logdet(forward) + logdet(inverse)|, relative
    logdet_jacobian: float = math.nan  # |logdet - slogdet(dense Jacobian)|, relative, in float64, of one sample
    condition: float = math.nan  # the Jacobian's largest over smallest singular value
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass
class CheckReport:
    """What :meth:`Flow.check` found: print it. ``ok``: all is well; ``faults``: the rows that are not."""

    layers: list[LayerCheck] = field(default_factory=list)
    whole: LayerCheck | None = None

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[LayerCheck]:
        return [row for row in (*self.layers, *([self.whole] if self.whole else ())) if not row.ok]

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "round trip", "logdet +-", "logdet J", "cond J", "")
        rows = [head]
        for row in (*self.layers, *([self.whole] if self.whole else ())):
            numbers = (row.round_trip, row.logdet_sum, row.logdet_jacobian, row.condition)
            shape = " x ".join(map(str, row.shape))
            rows.append((row.name, row.kind, shape, *map(_number, numbers), row.problem or "ok"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        faults = self.faults
        if not faults:
            lines.append(f"all {len(self.layers)} layers are well")
        else:
            lines.append(f"at fault first: {faults[0].name} ({faults[0].kind}): {faults[0].problem}")
        return "\n".join(lines)


def check(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> CheckReport:
    """See :meth:`Flow.check`. ``x [B, *event]`` is data as the flow takes it (images for an image flow).

    The flow itself is left as it is: a copy in eval mode is checked, with dropout off. Cost: one forward and one
    inverse per layer, and for layers of up to 512 elements one dense Jacobian in float64.
    """
    twin = copy.deepcopy(flow).eval()
    seen: dict[str, tuple[Tensor, Tensor | None, Tensor | None]] = {}
    leaves = {name: module for name, module in twin.bijection.named_modules() if _is_leaf(module)}

    def remember(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = args[1] if len(args) > 1 else kwargs.get("context")
            seen[name] = (args[0].detach(), given if given is None else given.detach(), kwargs.get("lengths"))

        return hook

    handles = [m.register_forward_pre_hook(remember(n), with_kwargs=True) for n, m in leaves.items()]
    handles.append(twin.bijection.register_forward_pre_hook(remember("(whole)"), with_kwargs=True))
    try:
        with torch.no_grad():
            twin.encode(x, context)  # an image flow takes the middle of each grey level: no random numbers are used
    finally:
        for handle in handles:
            handle.remove()
    report = CheckReport()
    for name, (data, given, lengths) in seen.items():
        if name != "(whole)":
            report.layers.append(_check_layer(name or "(whole)", leaves[name], data, given, lengths))
    if len(report.layers) != 1:
        report.whole = _check_layer("(whole)", twin.bijection, *seen["(whole)"])
    return report


def _is_leaf(module: nn.Module) -> bool:
    if not isinstance(module, Bijection):
        return False
    return isinstance(module, Inverse) or not any(isinstance(m, Bijection) for m in list(module.modules())[1:])


def _check_layer(name: str, layer: Bijection, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> LayerCheck:
    row = LayerCheck(name, type(layer).__name__, tuple(x.shape[1:]), math.nan, math.nan)
    try:
        with torch.no_grad():
            z, forward = layer(x, context, lengths=lengths)
            back, inverse = layer.inverse(z, context, lengths=layer.lengths_after(lengths))
        row.round_trip = _largest(back - x) / max(1.0, _largest(x))
        row.logdet_sum = _largest(forward + inverse) / max(1.0, _largest(forward))
        if x.shape[0] and 0 < x[0].numel() <= JACOBIAN_ELEMENTS:
            _against_jacobian(row, layer, x, context, lengths)
    except (ValueError, RuntimeError) as error:
        row.problem = f"raised: {str(error).splitlines()[0]}"
        return row
    row.problem = _problem(row, forward)
    return row


def _against_jacobian(row, layer, x, context, lengths) -> None:
    exact = copy.deepcopy(layer).double()
    one = x[:1].double()
    given = context[:1] if context is not None else None
    given = given.double() if given is not None and given.is_floating_point() else given
    valid = lengths[:1] if lengths is not None else None

    def flat(v: Tensor) -> Tensor:
        return exact(v.reshape(one.shape), given, lengths=valid)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, one.flatten())
    if valid is not None:
        keep = (torch.arange(one.shape[-1]) < valid.cpu()[:, None]).expand(one.shape[1:]).flatten().to(one.device)
        jacobian = jacobian[keep][:, keep]
    with torch.no_grad():
        logdet = exact(one, given, lengths=valid)[1].item()
    truth = torch.linalg.slogdet(jacobian).logabsdet.item()
    row.logdet_jacobian = abs(logdet - truth) / max(1.0, abs(truth))
    singular = torch.linalg.svdvals(jacobian)
    row.condition = (singular.max() / singular.min()).item() if singular.numel() else math.nan


def _problem(row: LayerCheck, logdet: Tensor) -> str:
    if not bool(torch.isfinite(logdet).all()):
        return "its log-determinant is not finite"
    if not row.round_trip <= ROUND_TRIP:
        return f"its inverse does not undo it (off by {row.round_trip:.1e})"
    if not row.logdet_sum <= ROUND_TRIP:
        return f"forward and inverse disagree on the log-determinant (by {row.logdet_sum:.1e})"
    if row.logdet_jacobian > LOGDET or (math.isinf(row.logdet_jacobian)):
        return f"its log-determinant is not that of its Jacobian (off by {row.logdet_jacobian:.1e})"
    return ""


def _largest(v: Tensor) -> float:
    return v.abs().max().item() if v.numel() else 0.0


def _number(v: float) -> str:
    return "-" if math.isnan(v) else f"{v:.1e}"
