"""``flow.check(x)``: every layer on the data it really meets, round trip and log-determinant against the truth."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, Inverse

# A dense Jacobian is taken where one sample has at most this many elements.
JACOBIAN_ELEMENTS = 512
CHANNELS = 1024  # a matrix of more is not asked for its singular values, which would take seconds
JACOBIAN_SAMPLES = 3  # the first, the middle and the last of the batch

# Above these a layer is at fault. A round trip in float32 through a well-conditioned layer is near 1e-6.
ROUND_TRIP = 1e-3
LOGDET = 1e-6  # relative, in float64
# Half a unit in the last place: times a condition number, what an inverse cannot but lose.
EPS = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.bfloat16: 3.9e-3, torch.float16: 4.9e-4}


@dataclass
class LayerCheck:
    """One row: what was found for one layer. ``nan`` where it was not measured."""

    name: str
    kind: str
    shape: tuple[int, ...]
    round_trip: float  # max |inverse(forward(x)) - x| / max(1, max |x|), in the layer's own precision
    logdet_sum: float  # max |logdet(forward) + logdet(inverse)|, relative
    logdet_jacobian: float = math.nan  # max |logdet - slogdet(dense Jacobian)|, relative, in float64
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
    unreached: list[str] = field(default_factory=list)  # layers that met no data, since one before them raised

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
        if self.unreached:
            lines.append(f"not reached: {', '.join(self.unreached)}")
        return "\n".join(lines)


def check(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> CheckReport:
    """See :meth:`Flow.check`. ``x [B, *event]`` is data as the flow takes it (images for an image flow).

    The flow itself is left as it is: a copy in eval mode is checked, with dropout off. A layer that raises is reported,
    not raised; what is wrong with ``x`` itself is. Cost: two forwards and one inverse per layer, and for layers of up
    to 512 elements one dense Jacobian of three samples in float64.
    """
    twin = copy.deepcopy(flow).eval()
    calls: list[_Call] = []
    names: dict[nn.Module, list[str]] = {}  # a layer that stands in two places has two
    for name, module in twin.bijection.named_modules(remove_duplicate=False):
        if _is_leaf(module):
            names.setdefault(module, []).append(name or _WHOLE)
    waiting = {module: list(given) for module, given in names.items()}

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        data = args[0] if args else kwargs["x"]
        given = args[1] if len(args) > 1 else kwargs.get("context")
        given = given.detach() if isinstance(given, Tensor) else given
        if module is twin.bijection:
            whole.append(_Call(_WHOLE, module, data.detach(), given, kwargs.get("lengths")))
        if module in waiting:
            left = waiting[module]
            name = left.pop(0) if left else names[module][-1]
            calls.append(_Call(name, module, data.detach(), given, kwargs.get("lengths")))

    whole: list[_Call] = []
    failure: Exception | None = None
    hooked = dict.fromkeys([twin.bijection, *names])
    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in hooked]
    try:
        with torch.no_grad():
            twin.encode(x, context)  # an image flow takes the middle of each grey level: no random numbers are used
    except Exception as error:
        if not whole:  # no layer is to blame: the data or the context is not what this flow takes
            raise
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    report = CheckReport([_check_layer(call) for call in calls])
    if failure is not None:
        report.unreached = [name for left in waiting.values() for name in left]
    if report.ok and failure is not None:  # it raises between the layers, or now and then only
        report.whole = _check_layer(whole[0])
        report.whole.problem = report.whole.problem or _raised(failure)
    elif failure is None and len(calls) != 1:
        report.whole = _check_layer(whole[0])
    return report


_WHOLE = "(whole)"


class _Call(NamedTuple):
    """One use of one layer, and what it was given."""

    name: str
    layer: Bijection
    x: Tensor
    context: Tensor | None
    lengths: Tensor | None


def _is_leaf(module: nn.Module) -> bool:
    if not isinstance(module, Bijection):
        return False
    return isinstance(module, Inverse) or not any(isinstance(m, Bijection) for m in list(module.modules())[1:])


def _check_layer(call: _Call) -> LayerCheck:
    row = LayerCheck(call.name, type(call.layer).__name__, tuple(call.x.shape[1:]), math.nan, math.nan)
    try:
        row.problem = _problem(row, call)
    except Exception as error:  # whatever somebody's layer raises is what the report is for
        row.problem = _raised(error)
        if hasattr(call.layer, "condition_number"):
            with contextlib.suppress(Exception):  # what raised may raise again
                row.condition = call.layer.condition_number(row.shape)
                if not math.isnan(row.condition):
                    row.problem += f" (condition number {row.condition:.1e})"
    return row


def _raised(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValueError | RuntimeError) and text:
        return f"raised: {text}"
    return f"raised: {type(error).__name__}" + (f": {text}" if text else "")


def _problem(row: LayerCheck, call: _Call) -> str:
    """Fills the row and says what is wrong first: what later numbers rest on comes before them."""
    x, context, lengths, layer = call.x, call.context, call.lengths, call.layer
    if not _is_finite(x):
        return "its input is not finite"
    with torch.no_grad():
        z, forward = layer(x, context, lengths=lengths)
        problem = _output_problem(x, z, forward, "output", "log-determinant")
        if problem:
            return problem
        back, inverse = layer.inverse(z, context, lengths=layer.lengths_after(lengths))
    if back.shape != x.shape:
        return f"its inverse returns shape {tuple(back.shape)} where its data had {tuple(x.shape)}"
    problem = _output_problem(x, back, inverse, "inverse", "inverse's log-determinant")
    if problem:
        return problem
    row.round_trip = _largest(back - x) / max(1.0, _largest(x))
    row.logdet_sum = _largest(forward + inverse) / max(1.0, _largest(forward))
    if x.shape[0] and 0 < x[0].numel() <= JACOBIAN_ELEMENTS:
        problem = _against_jacobian(row, call)
    # Not "error > bound", which a NaN would pass.
    row.condition = _known_condition(row, layer, x)
    if not row.round_trip <= ROUND_TRIP:
        blame = f"; condition number {row.condition:.1e}" if row.condition * EPS[x.dtype] > ROUND_TRIP else ""
        return f"its inverse does not undo it (off by {row.round_trip:.1e}{blame})"
    if not row.logdet_sum <= ROUND_TRIP:
        return f"forward and inverse disagree on the log-determinant (by {row.logdet_sum:.1e})"
    return problem


def _output_problem(x: Tensor, y: Tensor, logdet: Tensor, what: str, whose: str) -> str:
    if y.shape[0] != x.shape[0] or y.numel() != x.numel():
        return f"its {what} has shape {tuple(y.shape)}: not as many numbers as its input, {tuple(x.shape)}"
    if logdet.shape != x.shape[:1]:
        return f"its {whose} has shape {tuple(logdet.shape)}, which should be {tuple(x.shape[:1])}"
    if logdet.dtype != compute_dtype(x):
        return f"its {whose} is {logdet.dtype}, which should be {compute_dtype(x)} for {x.dtype} data"
    if not _is_finite(y):
        return f"its {what} is not finite"
    if not _is_finite(logdet):
        return f"its {whose} is not finite"
    return ""


def _against_jacobian(row: LayerCheck, call: _Call) -> str:
    batch = call.x.shape[0]
    some = sorted({i * (batch - 1) // (JACOBIAN_SAMPLES - 1) for i in range(JACOBIAN_SAMPLES)})
    layer, x = copy.deepcopy(call.layer).double(), call.x[some].double().requires_grad_()
    context = call.context[some] if isinstance(call.context, Tensor) else call.context
    context = context.double() if isinstance(context, Tensor) and context.is_floating_point() else context
    lengths = call.lengths[some] if call.lengths is not None else None
    with torch.enable_grad():
        z, logdet = layer(x, context, lengths=lengths)
        jacobians = _jacobians(z, x)
    row.logdet_jacobian = row.condition = 0.0
    for i, jacobian in enumerate(jacobians):
        if lengths is not None:
            jacobian = _valid_part(jacobian, x.shape[1:], z.shape[1:], lengths[i], layer.lengths_after(lengths)[i])
        if not _is_finite(jacobian):
            row.logdet_jacobian = row.condition = math.inf
            return "its Jacobian is not finite"
        truth = torch.linalg.slogdet(jacobian).logabsdet.item()
        if truth == -math.inf:
            row.logdet_jacobian = row.condition = math.inf
            return "its Jacobian is singular: it loses information, or the gradient through it is cut"
        error = abs(logdet[i].item() - truth) / max(1.0, abs(truth))
        row.logdet_jacobian = max(row.logdet_jacobian, math.inf if math.isnan(error) else error)
        singular = torch.linalg.svdvals(jacobian)
        row.condition = max(row.condition, (singular.max() / singular.min()).item() if singular.numel() else 1.0)
    if not row.logdet_jacobian <= LOGDET:
        return f"its log-determinant is not that of its Jacobian (off by {row.logdet_jacobian:.1e})"
    return ""


def _known_condition(row: LayerCheck, layer: Bijection, x: Tensor) -> float:
    """What a layer whose Jacobian the data does not change knows of it, where no Jacobian was taken."""
    if math.isnan(row.condition) and hasattr(layer, "condition_number") and x.shape[0] and x.shape[1] <= CHANNELS:
        return layer.condition_number(tuple(x.shape[1:]))
    return row.condition


def _jacobians(z: Tensor, x: Tensor) -> Tensor:
    """``dz[i] / dx[i]``, ``[B, D, D]``, with one backward per element: samples do not depend on each other."""
    if not z.requires_grad:
        return z.new_zeros(z.shape[0], z[0].numel(), x[0].numel())
    rows = [
        torch.autograd.grad(element.sum(), x, retain_graph=True, materialize_grads=True)[0].flatten(1)
        for element in z.flatten(1).unbind(1)
    ]
    return torch.stack(rows, 1)


def _valid_part(jacobian: Tensor, before: torch.Size, after: torch.Size, n: Tensor, m: Tensor) -> Tensor:
    """The rows and columns of positions that count: padding is zero on both sides."""
    rows, columns = (
        (torch.arange(shape[-1], device=jacobian.device) < length).expand(shape).flatten()
        for shape, length in ((after, m), (before, n))
    )
    return jacobian[rows][:, columns]


def _is_finite(v: Tensor) -> bool:
    return bool(torch.isfinite(v).all())


def _largest(v: Tensor) -> float:
    return v.abs().max().item() if v.numel() else 0.0


def _number(v: float) -> str:
    return "-" if math.isnan(v) else f"{v:.1e}"
