"""``flow.check(x)``: every layer on the data it really meets, round trip and log-determinant against the truth."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from .layer_calls import LayerCall, layer_calls

if TYPE_CHECKING:
    from .bijection import Bijection
    from .flow import Flow

# A dense Jacobian is taken where one sample has at most this many elements.
JACOBIAN_ELEMENTS = 512
CHANNELS = 1024  # a matrix of more is not asked for its singular values, which would take seconds
JACOBIAN_SAMPLES = 3  # the first, the middle and the last of the batch

# Above these a layer is at fault. A round trip in float32 through a well-conditioned layer is near 1e-6.
ROUND_TRIP = 1e-3
LOGDET = 1e-6  # relative, in float64
_UNITS = 16  # of the type's precision, where that is more: two bytes hold no 1e-3
# Half a unit in the last place: times a condition number, what an inverse cannot but lose.
EPS = {torch.float64: 1.1e-16, torch.float32: 6e-8, torch.bfloat16: 3.9e-3, torch.float16: 4.9e-4}


@dataclass
class LayerCheck:
    """One row: what was found for one layer. ``nan`` where it was not measured.

    Args:
        name: as in ``flow.named_modules()``.
        kind: the layer's class.
        shape: of one sample of its input.
        round_trip: ``max |inverse(forward(x)) - x| / max(1, max |x|)``, in the layer's own precision.
        logdet_sum: ``max |logdet of forward + logdet of inverse|``, relative.
        logdet_jacobian: ``max |logdet - slogdet(dense Jacobian)|``, relative, in float64.
        condition: the Jacobian's largest over its smallest singular value: the inverse loses about that many units in
            the last place.
        problem: one sentence, empty where all is well.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    round_trip: float
    logdet_sum: float
    logdet_jacobian: float = math.nan
    condition: float = math.nan
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


# Heading of each column, and the attribute of a row.
_COLUMNS = {
    "layer": "name",
    "kind": "kind",
    "input": "shape",
    "round-trip error": "round_trip",
    "logdet fwd+inv": "logdet_sum",
    "logdet-Jacobian": "logdet_jacobian",
    "condition": "condition",
    "verdict": "problem",
}
_LEGEND = """\
round-trip error: inverse(forward(x)) - x, relative to x     logdet fwd+inv: their sum, which should be 0
logdet-Jacobian: difference from autograd's, in float64      condition: of the Jacobian; its inverse loses that many
-: not measured (no dense Jacobian beyond 512 elements)      units in the last place, 1e7 all of float32's digits"""


@dataclass
class CheckReport:
    """What :meth:`Flow.check` found: print it. ``ok``: all is well; ``faults``: the rows that are not.

    Args:
        layers: a row for each use of each layer, in the order that data met them.
        whole: all layers together; None for a flow of one layer, and where one before the end raised.
        unreached: layers that met no data, since one before them raised.
        dtype: of the data, which the layers computed in.
    """

    layers: list[LayerCheck] = field(default_factory=list)
    whole: LayerCheck | None = None
    unreached: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[LayerCheck]:
        return [row for row in self._rows if not row.ok]

    @property
    def _rows(self) -> list[LayerCheck]:
        return [*self.layers, *([self.whole] if self.whole else ())]

    def __str__(self) -> str:
        table = [tuple(_COLUMNS), *([_cell(getattr(row, key)) for key in _COLUMNS.values()] for row in self._rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += ["", _LEGEND, "", self._verdict()]
        if self.unreached:
            lines.append(f"not reached: {', '.join(self.unreached)}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        """The last line: the first fault, or how much is lost and where."""
        faults = self.faults
        if faults:
            first, others = faults[0], len(faults) - 1
            more = f" ({others} more row{' is' if others == 1 else 's are'} at fault)" if others else ""
            return f"at fault first: {first.name} ({first.kind}): {first.problem}{more}"
        kind = str(self.dtype).removeprefix("torch.")
        told = f"all {len(self.layers)} layers are well" if len(self.layers) != 1 else "the layer is well"
        trip = max(self._rows, key=lambda row: row.round_trip)
        told += f": the largest round-trip error in {kind} is {trip.round_trip:.1e} ({trip.name.strip('()')})"
        measured = [row for row in self.layers if not math.isnan(row.condition)]
        if measured:
            worst = max(measured, key=lambda row: row.condition)
            told += f", the largest condition number {worst.condition:.1e} ({worst.name})"
        return told


_WHOLE = "(whole)"


def check(flow: Flow, x: Tensor, context: Tensor | None = None) -> CheckReport:
    """Round trip, log-determinant and conditioning of every layer, on data ``x [B, *event]`` as the flow takes it.

    For an image flow ``x`` is uint8 images. The flow itself is left as it is: a copy in eval mode is checked, with
    dropout off. A layer that raises is reported, not raised; what is wrong with ``x`` or the context itself is raised
    (``ValueError``). Cost: two forwards and one inverse per layer, and for layers of up to 512 elements one dense
    Jacobian of three samples in float64.
    """
    twin = copy.deepcopy(flow).eval()
    calls = layer_calls(twin, x, context)
    report = CheckReport([_check_layer(call) for call in calls.layers], unreached=calls.unreached)
    if calls.layers:
        report.dtype = calls.layers[0].x.dtype
    if calls.whole is None:
        return report
    whole = calls.whole._replace(name=_WHOLE)
    if report.ok and calls.failure is not None:  # it raises between the layers, or now and then only
        report.whole = _check_layer(whole)
        report.whole.problem = report.whole.problem or _raised(calls.failure)
    elif calls.failure is None and len(calls.layers) != 1:
        report.whole = _check_layer(whole)
    return report


def _check_layer(call: LayerCall) -> LayerCheck:
    row = LayerCheck(call.name, type(call.layer).__name__, tuple(call.x.shape[1:]), math.nan, math.nan)
    try:
        row.problem = _problem(row, call)
    except Exception as error:  # whatever somebody's layer raises is what the report is for
        row.problem = _raised(error)
        with contextlib.suppress(Exception):  # what raised may raise again
            row.condition = known_condition(call.layer, row.shape)
            if not math.isnan(row.condition):
                row.problem += f" (condition number {row.condition:.1e})"
    return row


def _raised(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValueError | RuntimeError) and text:
        return f"raised: {text}"
    return f"raised: {type(error).__name__}" + (f": {text}" if text else "")


def _problem(row: LayerCheck, call: LayerCall) -> str:
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
    bound = max(ROUND_TRIP, _UNITS * EPS[x.dtype])
    # Not "error > bound", which a NaN would pass.
    if math.isnan(row.condition) and x.shape[0] and x.shape[1] <= CHANNELS:  # no Jacobian was taken
        row.condition = known_condition(layer, row.shape)
    if not row.round_trip <= bound:
        blame = f"; condition number {row.condition:.1e}" if row.condition * EPS[x.dtype] > bound else ""
        return f"its inverse does not undo it (off by {row.round_trip:.1e}{blame})"
    if not row.logdet_sum <= bound:
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


def _against_jacobian(row: LayerCheck, call: LayerCall) -> str:
    batch = call.x.shape[0]
    some = sorted({i * (batch - 1) // (JACOBIAN_SAMPLES - 1) for i in range(JACOBIAN_SAMPLES)})
    layer, x = copy.deepcopy(call.layer).double(), call.x[some].double().requires_grad_()
    context = call.context[some] if isinstance(call.context, Tensor) else call.context
    context = context.double() if isinstance(context, Tensor) and context.is_floating_point() else context
    lengths = call.lengths[some] if call.lengths is not None else None
    with torch.enable_grad():
        z, logdet = layer(x, context, lengths=lengths)
        jacobians = dense_jacobians(z, x)
    row.logdet_jacobian, row.condition, after = 0.0, 0.0, layer.lengths_after(lengths)
    for i, jacobian in enumerate(jacobians):
        if lengths is not None and after is not None:
            jacobian = _valid_part(jacobian, x.shape[1:], z.shape[1:], lengths[i], after[i])
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


def known_condition(layer: Bijection, shape: tuple[int, ...]) -> float:
    """What a layer whose Jacobian the data does not change knows of it, on samples of this shape; else NaN."""
    own: Any = getattr(layer, "condition_number", None)
    return math.nan if own is None else own(shape)


def dense_jacobians(z: Tensor, x: Tensor) -> Tensor:
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


def _cell(v: object) -> str:
    if isinstance(v, tuple):
        return " x ".join(map(str, v))
    if isinstance(v, float):
        return "-" if math.isnan(v) else f"{v:.1e}"
    return str(v) or "ok"
