"""How a layer of unknown code is called and what it returns: read from its signature, then from one observed call."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..adapter import Call
from ..libraries import LAYER_BASES

# What an argument means, by the names in use for it. The first argument is the data.
ROLES: dict[str, str] = {
    **dict.fromkeys(("reverse", "inverse", "rev", "invert"), "undo"),
    **dict.fromkeys(("ldj", "sldj", "logdet", "log_det", "log_det_jacobian"), "running"),
    **dict.fromkeys(("x_mask", "mask"), "mask"),
    **dict.fromkeys(("context", "cond", "condition", "g", "seq_lens", "offset_mask"), "extra"),
}


@dataclass(frozen=True)
class Method:
    """One method's arguments, in their order; ``undoes``: whether it is the way back by its name."""

    name: str
    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    positional: int
    swallows: bool
    undoes: bool
    flag: str | None
    running: str | None
    mask: str | None

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """Arguments by name; None for what the method would refuse."""
        if len(args) > self.positional:
            return None
        given = {**dict(self.defaults), **dict(zip(self.names, args)), **kwargs}
        if len(given) < len(self.names) or (len(given) > len(self.names) and not self.swallows):
            return None
        return given

    def situation(self, given: dict[str, Any]) -> tuple:
        """Which way the call goes, and what it gives beside the data. Only what was proved is taken over."""
        undo = bool(given[self.flag]) if self.flag is not None else self.undoes
        beside = [n for n in self.names[1:] if n != self.flag and given[n] is not None]
        if len(given) > len(self.names):  # keywords that no argument is named after
            beside += sorted(n for n in given if n not in self.names)
        return (undo, *beside)


@dataclass(frozen=True)
class Convention:
    """forward, and what undoes it: a flag of it, or another method."""

    forward: Method
    undo: Method | None

    @property
    def methods(self) -> tuple[Method, ...]:
        return (self.forward,) if self.undo is None else (self.forward, self.undo)

    def method(self, name: str) -> Method:
        return self.forward if name == self.forward.name else self.undo

    def undoing(self, call: Call, out: Any) -> Call | None:
        """The call that goes the other way, from what ``call`` returned."""
        method = self.method(call.method)
        given = method.bind(call.args, call.kwargs)
        if given is None:
            return None
        undo = method.situation(given)[0]
        other = self.forward if self.undo is None or undo else self.undo
        first, second = (out[0], out[1]) if isinstance(out, tuple) and len(out) == 2 else (out, None)
        values = {n: v for n, v in given.items() if n in other.names or other.swallows}
        if other.running is not None and isinstance(second, Tensor) and values.get(other.running) is not None:
            values[other.running] = second
        values[other.names[0]] = first
        if other.flag is not None:
            values[other.flag] = not undo
        leading = values.pop(other.names[0])
        return replace(call, method=other.name, args=(leading,), kwargs=values)


_conventions: weakref.WeakKeyDictionary[type, Convention | None] = weakref.WeakKeyDictionary()


def convention_of(cls: type) -> Convention | None:
    """How a class's layers are called; None unless it goes both ways and every argument is one we know."""
    if cls not in _conventions:
        _conventions[cls] = _read(cls)
    return _conventions[cls]


def _read(cls: type) -> Convention | None:
    forward = _method(cls, "forward")
    if forward is None:
        return None
    if forward.flag is not None:
        return Convention(forward, None)
    undo = _method(cls, "reverse") or _method(cls, "inverse")
    return None if undo is None else Convention(forward, undo)


def _method(cls: type, name: str) -> Method | None:
    function = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(function):
        return None
    try:
        _self, *parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    swallows = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    if swallows:
        parameters = parameters[:-1]
    names = tuple(p.name for p in parameters)
    known = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if not names or any(p.kind not in known for p in parameters) or any(n not in ROLES for n in names[1:]):
        return None
    if parameters[0].default is not inspect.Parameter.empty:
        return None
    of = {role: [n for n in names[1:] if ROLES[n] == role] for role in ("undo", "running", "mask")}
    if any(len(found) > 1 for found in of.values()):
        return None
    defaults = tuple((p.name, p.default) for p in parameters if p.default is not inspect.Parameter.empty)
    if any(not (v is None or isinstance(v, (bool, int, float))) for _, v in defaults):
        return None
    flag, running, mask = (next(iter(of[role]), None) for role in ("undo", "running", "mask"))
    positional = sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    return Method(name, names, defaults, positional, swallows, name in ("reverse", "inverse"), flag, running, mask)


# --- what comes back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned:
    """What a call returns beside the data: nothing at all (``alone``), None, a ``number``, the ``elements``' own
    log-scales, or a ``logdet``, ``sign`` times the layer's, added to the running one or not. ``factor`` says which:
    ``"positions"`` (0-dimensional, of all positions of a sample), ``"batch"`` (``[B]``, of each sample),
    ``"batch_positions"`` (0-dimensional, of the batch), ``"one"``, ``"one_batch"`` (of one position) or ``"elements"``.

    ``detached``: the call makes no gradients.
    """

    kind: str
    factor: str = "none"
    sign: float = 1.0
    running: bool = False
    number: float = 0.0
    detached: bool = False

    def pack(self, y: Tensor, logdet: Tensor | None, running: Any) -> Any:
        if self.kind == "alone":
            return y
        if self.kind in ("none", "number"):
            return y, None if self.kind == "none" else running + self.number if self.running else self.number
        if not self.running:
            return y, logdet if self.sign > 0 else -logdet
        return y, running + logdet if self.sign > 0 else running - logdet


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Element by element: values far apart in size are all compared to their last digits."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def is_foreign(module: nn.Module) -> bool:
    """Whether the module's class is neither PyTorch's nor ours nor a known library's, and its forward is its own."""
    home = type(module).__module__.partition(".")[0]
    return home not in KNOWN and "forward" not in vars(module)


KNOWN = {"torch", "nfkernels", *LAYER_BASES.values()}
