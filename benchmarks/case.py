"""What is measured: an op's table, one case of it, the data it runs on, and who runs it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Run = Callable[[Inputs, bool], tuple[Tensor, ...]]  # (inputs, inverse) -> outputs

FORWARD, INVERSE, BACKWARD, STEP = "forward", "inverse", "backward", "forward+backward"
HEADLINE, STANDARD, EXTRA = 0, 1, 2  # importance: what a short run must reach first


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the same numbers. ``adapt`` turns the inputs into theirs outside any timing; ``check``
    judges outputs that cannot be compared number by number (their noise is their own)."""

    run: Run
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs
    check: Callable[[Inputs, tuple[Tensor, ...]], bool] | None = None


@dataclass(frozen=True)
class Op:
    """One op: how its inputs are made, called and counted. ``variant`` names one set of its options."""

    name: str
    inputs: Callable[[Case, torch.device], Inputs]  # drawn from torch's generator
    call: Callable[[str], Run]  # variant -> the public function
    plain: Callable[[str], Run]  # variant -> the same in plain PyTorch, for torch.compile
    cotangents: Callable[[Inputs], list[Tensor]]  # random gradients, one per output
    count: Callable[[Case, str], tuple[float, float]]  # case, direction -> bytes and flops
    cases: Callable[[str], list[Case]]  # device type -> what is measured there
    differentiable: tuple[str, ...] = ()
    peers: Callable[[str], dict[str, Peer]] = lambda variant: {}
    upcast: tuple[str, ...] = ()  # integer inputs that the float64 run takes as float64


@dataclass(frozen=True)
class Case:
    """One op on one shape in one direction."""

    op: str
    direction: str
    shape: tuple[int, ...]
    variant: str = ""
    importance: int = STANDARD
    dtype: torch.dtype = torch.float32
    params: torch.dtype = torch.float32
    channels_last: bool = False  # of the params

    @property
    def id(self) -> str:
        notes = [self.variant] if self.variant else []
        for what, dtype in (("", self.dtype), ("params ", self.params)):
            if dtype != torch.float32:
                notes.append(what + str(dtype).removeprefix("torch."))
        notes += ["channels-last params"] if self.channels_last else []
        text = f"{self.op} {self.direction} {'x'.join(map(str, self.shape))}"
        return text + (f" ({', '.join(notes)})" if notes else "")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def data_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def facts(self) -> dict[str, Any]:
        return {"op": self.op, "direction": self.direction, "shape": list(self.shape), "variant": self.variant,
                "dtype": str(self.dtype), "params_dtype": str(self.params), "channels_last": self.channels_last,
                "data_bytes": self.data_bytes, "headline": self.importance == HEADLINE}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A name in the results, the function it stands for, and the backend that is forced while it runs."""

    name: str
    run: Run
    backend: str | None = None
    ours: bool = False
    compiled: bool = False
    peer: Peer | None = None

    @contextlib.contextmanager
    def context(self, grad: bool) -> Iterator[None]:
        from nfkernels import use_backend

        forced = use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with forced, torch.set_grad_enabled(grad):
            yield


@dataclass
class Sample:
    """One set of inputs and output gradients of a case."""

    inputs: Inputs
    cotangents: list[Tensor] = field(default_factory=list)


def draw(op: Op, case: Case, device: torch.device | str, seed: int = 0) -> Sample:
    torch.manual_seed(seed)
    inputs = op.inputs(case, torch.device(device))
    return Sample(inputs, op.cotangents(inputs) if case.direction in (BACKWARD, STEP) else [])


def exact(op: Op, sample: Sample) -> Sample:
    """The same numbers in float64."""
    wide = {k: v.double() if v.is_floating_point() or k in op.upcast else v for k, v in sample.inputs.items()}
    return Sample(wide, [t.double() for t in sample.cotangents])


def prepare(op: Op, case: Case, run: Run, sample: Sample) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments that does the case's work once. The backward alone keeps its graph and runs again."""
    inverse = case.direction == INVERSE
    if case.direction in (FORWARD, INVERSE):
        return lambda: run(sample.inputs, inverse)
    inputs = {k: v.detach() for k, v in sample.inputs.items()}
    leaves = [inputs[k].requires_grad_() for k in op.differentiable if k in inputs]

    outputs = run(inputs, inverse)
    given = [g.to(o.dtype) for g, o in zip(sample.cotangents, outputs, strict=True)]
    if case.direction == STEP:
        del outputs
        return lambda: (*(fresh := run(inputs, inverse)), *torch.autograd.grad(fresh, leaves, given))
    return lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True)


def needs_grad(case: Case) -> bool:
    return case.direction in (BACKWARD, STEP)


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
