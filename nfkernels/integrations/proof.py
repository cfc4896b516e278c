"""Proof by numbers: the original and the fused layer on the same inputs, both ways, with their gradients.

Both run on copies in float64, whose parameters have been moved off their starting values and whose conditioners'
outputs spread over [-4, 4]: two formulas that agree only at the start, or only where no clamp acts, do not agree
there. Then both run in the layer's own type, where the fused layer may be as far from float64 as the original is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .adapter import Adapter, Call
from .swap import fused_class, original_of

# Of the batch that was seen, at most so many rows and (above two rows) elements: a proof is a small part of a call.
ROWS, ELEMENTS = 32, 16384
TOLERANCE_64 = 1e-8  # of the largest value, in float64
SLACK = 4.0  # times the original's own error in its own type, plus this share of the largest value:
FLOOR = {torch.float32: 1e-5, torch.float64: TOLERANCE_64, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Verdict:
    agrees: bool
    text: str  # why not, or what had to be proved in another way
    adapter: Adapter  # the one that agrees: the adapter itself, or one of its candidates


class Differs(Exception):
    """The two layers do not agree; the message says where."""


def prove(module: nn.Module, adapter: Adapter, call: Call) -> Verdict:
    """Whether the adapter's layer computes what ``module`` computes, at this call and at its partner.

    ``module`` is left as it is: copies are run, with the random state restored, and autocast off.
    """
    with _aside(call):
        try:
            agreeing, notes = _compare(module, adapter, call)
            return Verdict(True, "; ".join(notes), agreeing)
        except Differs as error:
            return Verdict(False, str(error), adapter)
        except Exception as error:  # a layer that cannot be copied or run is a layer that stays as it is
            return Verdict(False, f"could not be proved ({_told(error)})", adapter)


def _compare(module: nn.Module, adapter: Adapter, call: Call) -> tuple[Adapter, list[str]]:
    """The candidate that agrees, and what had to be proved in another way."""
    call = call.map(Tensor.detach)
    small = call.map(_fewer(call))
    for disturbed in (True, False):
        whole = _duplicate(module, adapter, disturbed)
        try:
            plain = _with_stand_ins(whole, adapter, small) if disturbed else whole
            trials = _trials(plain, adapter, small if disturbed else call)
            break
        except Exception:
            if not disturbed:
                raise
    first: Differs | None = None
    for candidate in adapter.candidates(copy.deepcopy(plain).double(), trials[0][0]):
        found: list[str] = []
        try:
            _agree(plain, candidate, trials, _narrow(plain, call), found)
            _agree_in_use(whole, candidate, trials[0][0], _narrow(plain, call))
        except Differs as error:
            first = first or error
            continue
        return candidate, found + candidate.remarks(module)
    raise first or Differs(adapter.unknown)


def _agree(plain: nn.Module, adapter: Adapter, trials: list, narrow: torch.dtype, notes: list[str]) -> None:
    """Raises Differs unless the adapter's layer gives what the original gave on every trial."""
    for trial, expected in trials:
        fused = _fused(plain, adapter)
        if isinstance(expected, str):
            if not _agree_narrow(plain, adapter, trial, narrow):
                _round_trip(fused, adapter, trial)
                notes.append(f"{expected}: proved by the round trip")
            continue
        got = _run(fused.double(), trial, torch.float64)
        _same_structure(expected, got, trial)
        for name, e, g in _pairs(expected, got):
            _near(name, trial, e, g, TOLERANCE_64 * _size(e))
        own = _run(copy.deepcopy(plain).to(narrow), trial, narrow)
        got = _run(_fused(plain, adapter).to(narrow), trial, narrow)
        _same_structure(own, got, trial, dtypes=True)
        floor = FLOOR.get(narrow, 1e-5)
        for (name, e, g), (_, _, o) in zip(_pairs(expected, got), _pairs(expected, own)):
            if name.startswith("gradient"):
                # Gradients jump at knots and clamps, on whose other side a rounding may put an element: their mean.
                off, own_off = _mean_distance(e, g), _mean_distance(e, o)
                _judge(name, trial, off, SLACK * own_off + 1e3 * floor * _mean_distance(e, torch.zeros_like(e)) + floor)
            else:
                # The largest error of a few is the steepest spot's, and chance: the mean tells a lower precision.
                _near(name, trial, e, g, 4 * SLACK * _distance(e, o) + floor * _size(e))
                _judge(name, trial, _mean_distance(e, g), SLACK * _mean_distance(e, o) + floor * _size(e))


def _agree_in_use(whole: nn.Module, adapter: Adapter, trial: Call, narrow: torch.dtype) -> None:
    """With the networks themselves, once, in the layer's own type: they are called as they were, and get gradients."""
    own = _run(copy.deepcopy(whole).to(narrow), trial, narrow)
    got = _run(_fused(whole, adapter).to(narrow), trial, narrow)
    floor = 1e2 * FLOOR.get(narrow, 1e-5)
    for name, e, g in _pairs(own, got):
        size = _mean_distance(e, torch.zeros_like(e)) + floor if name.startswith("gradient") else _size(e)
        _judge(name, trial, _mean_distance(e, g), floor * size)


def _trials(plain: nn.Module, adapter: Adapter, call: Call) -> list[tuple[Call, Any]]:
    """Each call with what the original gives in float64 (values and gradients), partners included. A partner that
    fails in the original has its error for a result."""
    found: list[tuple[Call, Any]] = []
    for trial in adapter.trials(plain, call.map(_double)):
        wide = copy.deepcopy(plain).double()
        expected = _run(wide, trial, torch.float64)
        found.append((trial, expected))
        partner = adapter.partner(plain, trial, expected.out)
        if partner is None:
            continue
        partner = partner.map(Tensor.detach)
        try:
            found.append((partner, _run(copy.deepcopy(plain).double(), partner, torch.float64)))
        except Exception as error:
            found.append((trial, f"the original's {partner.method} fails here ({_told(error)})"))
    return found


@dataclass
class _Result:
    out: Any
    leaves: list[Any]
    spec: Any
    gradients: list[tuple[str, Tensor | None]]


def _run(module: nn.Module, call: Call, dtype: torch.dtype) -> _Result:
    """Outputs, and the gradients of one fixed random combination of them."""
    inputs: list[Tensor] = []
    constants = [call.kwargs.get(name) for name in call.constants]

    def as_input(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.clone()
        if any(t is c for c in constants):
            return t.detach().to(dtype)
        inputs.append(t.detach().to(dtype).clone().requires_grad_())
        return inputs[-1]

    torch.manual_seed(0)  # dropout and the like draw the same
    # An output may be an input (the half that passes through), which some callers then add to: hand over copies.
    out = call.map(lambda t: as_input(t).clone() if t.is_floating_point() else as_input(t)).on(module)
    leaves, spec = tree_flatten(out)
    live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    gradients: list[tuple[str, Tensor | None]] = []
    if live:
        draw = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in live]
        named = [(f"gradient of input {i}", t) for i, t in enumerate(inputs)]
        named += [(f"gradient of {n}", p) for n, p in module.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(live, [t for _, t in named], weights, allow_unused=True)
        gradients = [(n, None if g is None else g.detach()) for (n, _), g in zip(named, grads)]
    return _Result(_detached(out), [t.detach() if isinstance(t, Tensor) else t for t in leaves], spec, gradients)


def _agree_narrow(plain: nn.Module, adapter: Adapter, trial: Call, narrow: torch.dtype) -> bool:
    """Compares the partner of ``trial`` in the layer's own type, where float64 fails; False where that fails too."""
    trial = trial.map(lambda t: t.to(narrow) if t.is_floating_point() else t)
    own = copy.deepcopy(plain).to(narrow)
    try:
        partner = adapter.partner(plain, trial, _run(own, trial, narrow).out)
        expected = _run(own, partner, narrow)
    except Exception:
        return False
    got = _run(_fused(plain, adapter).to(narrow), partner, narrow)
    _same_structure(expected, got, partner, dtypes=True)
    floor = FLOOR.get(narrow, 1e-5)
    for name, e, g in _pairs(expected, got):
        _near(name, partner, e, g, (1e3 if name.startswith("gradient") else 10) * floor * _size(e))
    return True


def _round_trip(fused: nn.Module, adapter: Adapter, trial: Call) -> None:
    """Where the original's other direction fails today: there and back, and the log-determinants cancel."""
    fused = fused.double()
    with torch.no_grad():
        out = trial.on(fused)
        back = adapter.partner(fused, trial, out).on(fused)
    there, here = tree_flatten(out)[0], tree_flatten(back)[0]
    wanted = [t for t in tree_flatten(trial.args)[0] if isinstance(t, Tensor)][:1] + [-t for t in there[1:2]]
    for name, e, g in zip(("the round trip", "the log-determinant of the round trip"), wanted, here):
        _near(name, trial, e, g, 1e3 * TOLERANCE_64 * _size(e))


# --- copies -----------------------------------------------------------------------------------------------------------


def _duplicate(module: nn.Module, adapter: Adapter, disturbed: bool) -> nn.Module:
    """A copy of original classes, without the caller's hooks, its conditioners' outputs spread."""
    # What a layer keeps of an earlier call (a cached inverse) may have a graph, which cannot be copied.
    kept = (v for m in module.modules() for v in _held(m) if isinstance(v, Tensor) and not v.is_leaf)
    twin = copy.deepcopy(module, {id(v): v.detach().clone() for v in kept})
    for part in twin.modules():
        part.__class__ = original_of(type(part))
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            for key in [k for k, hook in hooks.items() if not _of_torch(hook)]:
                del hooks[key]
    if disturbed:
        adapter.disturb(twin, torch.Generator().manual_seed(2))
        for network in adapter.conditioners(twin):
            network.register_forward_hook(functools.partial(_spread, adapter.spread))
    return twin


def _held(module: nn.Module) -> Iterator[Any]:
    """What a module's attributes are, and the plain objects among them hold."""
    for value in vars(module).values():
        yield value
        if not isinstance(value, (Tensor, nn.Module, type)) and isinstance(getattr(value, "__dict__", None), dict):
            yield from vars(value).values()


def _of_torch(hook: Any) -> bool:
    """Weight and spectral normalization compute the weights in a hook: theirs stay."""
    return getattr(hook, "__module__", type(hook).__module__).startswith("torch.")


def _spread(width: float, network: nn.Module, args: Any, out: Any) -> Any:
    """``out`` plus fixed numbers over [-width, width]; a network that returns a tuple gets its tensors spread."""

    def one(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            return t
        draw = torch.rand(t.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return t + ((2 * draw - 1) * width).to(t)

    return tuple(map(one, out)) if isinstance(out, tuple) else one(out)


def _with_stand_ins(whole: nn.Module, adapter: Adapter, call: Call) -> nn.Module:
    """A copy whose conditioners, often most of the work and the same in both layers, are simple functions of what they
    are given, with outputs of the same shape."""
    plain, probe = copy.deepcopy(whole), copy.deepcopy(whole).double()
    shapes: dict[int, list] = {}
    for i, network in enumerate(adapter.conditioners(probe)):
        network.register_forward_hook(lambda _, args, out, i=i: shapes.setdefault(i, []).append(out))
    with torch.no_grad():
        call.map(_double).on(probe)
    for i, network in enumerate(adapter.conditioners(plain)):
        outs = shapes.get(i, [])
        if len(outs) == 1 and isinstance(outs[0], Tensor) and outs[0].is_floating_point():
            network.forward = _StandIn(outs[0].shape)
    return plain


class _StandIn:
    """Smooth in every tensor it is given, and different for every order of their channels."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point()]
        total = given[0].new_zeros(self.shape[0], 1)
        for t in given:
            if t.dim() > 1 and t.shape[0] == self.shape[0]:
                weights = torch.arange(t[0].numel(), dtype=t.dtype, device=t.device).cos()
                total = total + (t.flatten(1).tanh() * weights).mean(1, keepdim=True)
            else:
                total = total + t.tanh().mean()
        return total.reshape(-1, *[1] * (len(self.shape) - 1)).expand(self.shape).clone()


def _fused(plain: nn.Module, adapter: Adapter) -> nn.Module:
    twin = copy.deepcopy(plain)
    twin.__class__ = fused_class(adapter, adapter.layer(twin), type(plain))
    return twin


def _fewer(call: Call):
    """Keeps the first rows of every tensor that has as many rows as the first one."""
    tensors = [t for t in tree_flatten((call.args, call.kwargs))[0] if isinstance(t, Tensor) and t.dim()]
    rows = tensors[0].shape[0] if tensors else 0
    most = min(ROWS, max(2, ELEMENTS // max(1, tensors[0][0].numel()))) if rows else 0
    return lambda t: t[:most] if t.dim() and t.shape[0] == rows else t


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _detached(out: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)


def _narrow(module: nn.Module, call: Call) -> torch.dtype:
    """The layer's own type: that of its parameters, else of what it was called with."""
    tensors = [*module.parameters(), *tree_flatten((call.args, call.kwargs))[0]]
    return next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)


# --- comparing --------------------------------------------------------------------------------------------------------


def _same_structure(expected: _Result, got: _Result, trial: Call, dtypes: bool = False) -> None:
    if expected.spec != got.spec:
        raise Differs(f"{trial.method} returns another structure than the original's")
    for e, g in zip(expected.leaves, got.leaves):
        if isinstance(e, Tensor) != isinstance(g, Tensor):
            raise Differs(f"{trial.method} returns {type(g).__name__} where the original returns {type(e).__name__}")
        if isinstance(e, Tensor):
            if e.shape != g.shape:
                raise Differs(
                    f"{trial.method} returns a tensor of shape {tuple(g.shape)}, the original {tuple(e.shape)}"
                )
            if dtypes and e.dtype != g.dtype:
                raise Differs(f"{trial.method} returns {g.dtype}, the original {e.dtype}")
        elif e is not g and e != g:
            raise Differs(f"{trial.method} returns {g!r} where the original returns {e!r}")
    if bool(expected.gradients) != bool(got.gradients):
        raise Differs(f"{trial.method} and the original do not agree on whether there are gradients")


def _pairs(expected: _Result, got: _Result) -> Iterator[tuple[str, Tensor, Tensor]]:
    for i, (e, g) in enumerate(zip(expected.leaves, got.leaves)):
        if isinstance(e, Tensor):
            yield f"output {i}", e, g
    for (name, e), (_, g) in zip(expected.gradients, got.gradients):
        if e is not None or g is not None:
            yield name, torch.zeros_like(g) if e is None else e, torch.zeros_like(e) if g is None else g


def _near(name: str, trial: Call, expected: Tensor, got: Tensor, allowed: float) -> None:
    _judge(name, trial, _distance(expected, got), allowed)


def _judge(name: str, trial: Call, distance: float, allowed: float) -> None:
    if math.isnan(allowed):
        raise Differs(f"{trial.method}: the original's {name} is not finite on these inputs, which proves nothing")
    if not distance <= allowed:
        raise Differs(f"{trial.method}: {name} differs from the original's by {distance:.1e} (allowed {allowed:.1e})")


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN where only one is NaN, infinities agree with themselves."""
    return float(_differences(a, b).max()) if a.numel() else 0.0


def _mean_distance(a: Tensor, b: Tensor) -> float:
    return float(_differences(a, b).mean()) if a.numel() else 0.0


def _differences(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double().to(a.device)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs())


def _size(t: Tensor) -> float:
    finite = t.double().nan_to_num(0.0, 0.0, 0.0)
    return 1.0 + (float(finite.abs().max()) if t.numel() else 0.0)


def _told(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


@contextlib.contextmanager
def _aside(call: Call) -> Iterator[None]:
    """The random state is the caller's again afterwards; autocast is off, gradients are on."""
    tensors = [t for t in tree_flatten((call.args, call.kwargs))[0] if isinstance(t, Tensor)]
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(t.device.type for t in tensors)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
