"""Families of look-alikes: recognised by their keys, told apart by the numbers of one call, then proved like the rest.

A family knows which parameters (names, shapes) make a layer of its kind, and a list of :class:`Core`: formulas that
such a layer may compute. :meth:`Family.candidates` runs the module once in each direction, keeps the formulas that give
its numbers element by element, and reads off how it returns its log-determinant. What is left is proved as any
adapter's layer is. A call unlike those that were proved (a mask, a context, a running log-determinant more or less)
goes to the original.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..adapter import Adapter, Call
from ..swap import original_of, respecialise
from .convention import Convention, Method, Returned, convention_of, is_foreign, near

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Core:
    """One formula: ``apply`` computes it in place of the module, which it only reads."""

    factors: ClassVar[tuple[str, ...]] = ("positions", "batch", "batch_positions", "one", "one_batch")

    def fits(self, x: Tensor) -> bool:
        return x.dim() > 1

    def apply(
        self, module: nn.Module, x: Tensor, undo: bool, mask: Tensor | None, given: dict, wanted: str
    ) -> tuple[Tensor, Any]:
        """``(y, logdet)`` of the direction; a log-determinant that is not ``wanted`` may be None. ``wanted`` is a
        factor (see :class:`Returned`)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Form:
    """What a layer computes and how it is called: all that its methods need."""

    convention: Convention
    core: Core
    returns: tuple[tuple[tuple, Returned], ...]  # by the data's rank and the situation


@dataclass(frozen=True)
class Seen:
    """One call of the module: what it was given and what it returned."""

    module: nn.Module
    method: Method
    given: dict
    x: Tensor
    undo: bool
    mask: Tensor | None
    running: Any
    out: Any

    @property
    def situation(self) -> tuple:
        return self.x.dim(), *self.method.situation(self.given)

    @property
    def y(self) -> Tensor:
        return self.out[0] if isinstance(self.out, tuple) else self.out

    @property
    def second(self) -> Any:
        return self.out[1] if isinstance(self.out, tuple) else None


# --- the methods that take over ---------------------------------------------------------------------------------------


def _call(self: nn.Module, method: Method, args: tuple, kwargs: dict) -> Any:
    """NotImplemented where the call is unlike those that were proved."""
    given = method.bind(args, kwargs)
    if given is None:
        return NotImplemented
    situation = method.situation(given)
    x = given[method.names[0]]
    returned = self._returns.get((x.dim(), *situation)) if isinstance(x, Tensor) else None
    if returned is None or not self._core.fits(x):
        return NotImplemented
    mask = None if method.mask is None else given[method.mask]
    running = None if method.running is None else given[method.running]
    if returned.detached:
        with torch.no_grad():
            y, logdet = self._core.apply(self, x, situation[0], mask, given, returned.factor)
    else:
        y, logdet = self._core.apply(self, x, situation[0], mask, given, returned.factor)
    return returned.pack(y, logdet, running)


class Forward:
    def forward(self, *args, **kwargs):
        made = _call(self, self._methods["forward"], args, kwargs)
        return super().forward(*args, **kwargs) if made is NotImplemented else made


class Reverse:
    def reverse(self, *args, **kwargs):
        made = _call(self, self._methods["reverse"], args, kwargs)
        return super().reverse(*args, **kwargs) if made is NotImplemented else made


class Inverse:
    def inverse(self, *args, **kwargs):
        made = _call(self, self._methods["inverse"], args, kwargs)
        return super().inverse(*args, **kwargs) if made is NotImplemented else made


_PARTS = {"forward": Forward, "reverse": Reverse, "inverse": Inverse}


@functools.cache
def _layer_of(form: Form) -> type:
    methods = {m.name: m for m in form.convention.methods}
    members = {"_methods": methods, "_core": form.core, "_returns": dict(form.returns)}
    return type("Layer", tuple(_PARTS[name] for name in methods), members)


@functools.cache
def _waiting_layer(names: tuple[str, ...]) -> type:
    """For a layer that its first batch initialises, by its own code: then it becomes what it was proved to be."""

    def waiting(name: str):
        def method(self, *args, **kwargs):
            out = getattr(super(layer, self), name)(*args, **kwargs)
            if not torch.compiler.is_compiling() and type(self).__nfkernels_adapter__.ready(self):
                respecialise(self)
            return out

        method.__name__ = name
        return method

    layer = type("Layer", (), {name: waiting(name) for name in names})
    return layer


# --- the adapter ------------------------------------------------------------------------------------------------------


class Family(Adapter):
    """A family, or with a ``form`` one of its candidates."""

    Layer = Forward
    form: Form | None = None
    by_numbers = True

    # What a family says.

    def looks_like(self, module: nn.Module) -> bool:
        """By the names and shapes of parameters, buffers and submodules. Runs no code of the module's."""
        raise NotImplementedError

    def cores(self, module: nn.Module, seen: list[Seen]) -> Iterable[Core]:
        """The formulas to try, the likeliest first."""
        raise NotImplementedError

    caches: tuple[str, ...] = ()  # attributes that a layer keeps for itself and the formulas do without

    def stretch(self, module: nn.Module, generator: torch.Generator) -> None:
        """Moves a copy's parameters so far that a clamp on them would be seen."""

    # What it gets for it.

    def recognise(self, module):
        return is_foreign(module) and self.looks_like(module) and _convention(module) is not None

    def methods(self):
        return ("forward", "reverse", "inverse")

    def layer(self, module):
        if not self.ready(module):
            return _waiting_layer(tuple(m.name for m in self.form.convention.methods))
        return _layer_of(self.form)

    def trials(self, module, call):
        method = _convention(module).method(call.method)
        given = method.bind(call.args, call.kwargs)
        mask = None if given is None or method.mask is None else given[method.mask]
        if not isinstance(mask, Tensor) or mask.dim() < 2:
            return [call]
        # A mask of ones is no test of what a layer does with one.
        thin = mask.clone()
        thin[::2, ..., mask.shape[-1] // 2 :] = 0
        given = {**given, method.mask: thin}
        leading = given.pop(method.names[0])
        return [replace(call, args=(leading,), kwargs=given, constants=(method.mask,))]

    def partner(self, module, call, out):
        return _convention(module).undoing(call, out)

    def candidates(self, module, call):
        convention = _convention(module)
        for network in self.conditioners(module):
            network.forward = _Wide(network.forward)
        copies = copy.deepcopy(module), copy.deepcopy(module)
        seen = list(self._observe(module, convention, call))
        others = list(self._elsewhere(module, *copies, convention, call))
        for core in self.cores(module, seen):
            returns = _returns(core, seen + others)
            if returns is not None:
                yield _bound(type(self), Form(convention, core, returns))

    def _observe(self, module: nn.Module, convention: Convention, call: Call) -> Iterator[Seen]:
        there = _fresh(call)
        out = self._keeping_nothing(module, there)
        yield _seen(module, convention, there, out)
        other = convention.undoing(call, _detached(out))
        if other is None:
            return
        # Some layers can go back in float32 only: that is where they invert their matrix.
        for one, dtype in ((module, torch.float64), (copy.deepcopy(module).float(), torch.float32)):
            back = _fresh(other.map(lambda t, d=dtype: t.to(d) if t.is_floating_point() else t))
            with contextlib.suppress(Exception):
                yield _seen(one, convention, back, back.on(one))
                return

    def _elsewhere(
        self, module: nn.Module, mode: nn.Module, far: nn.Module, convention: Convention, call: Call
    ) -> Iterator[Seen]:
        """The same call where a layer may do otherwise: in the other mode, far out, with parameters far out, and (no
        network in the way) with more rows and positions. Where the module fails, there is nothing to compare."""
        x = call.args[0] if call.args and isinstance(call.args[0], Tensor) else None
        calls = [(module, call.map(lambda t: 20 * t if t is x else t))]
        self.stretch(far, torch.Generator().manual_seed(5))
        calls += [(mode.train(not mode.training), call), (far, call)]
        if x is not None and x.dim() > 1 and not self.conditioners(module):
            rows, last = x.shape[0], x.shape[-1]
            calls.append((module, call.map(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == rows else t)))
            if x.dim() > 2:
                calls.append(
                    (module, call.map(lambda t: torch.cat([t, t], -1) if t.dim() > 2 and t.shape[-1] == last else t))
                )
        for one, other in calls:
            there = _fresh(other)
            try:
                seen = _seen(one, convention, there, self._keeping_nothing(one, there))
            except (RuntimeError, ValueError, IndexError, AssertionError):
                continue
            yield seen

    def _keeping_nothing(self, module: nn.Module, call: Call) -> Any:
        before = dict(vars(module))
        out = call.on(module)
        for name, value in vars(module).items():
            if name not in self.caches and not (name in before and _same(before[name], value)):
                raise TypeError(f"{call.method} keeps {name} as an attribute, which a fused layer would not")
        return out


def _same(before: Any, now: Any) -> bool:
    return before is now or (isinstance(now, (bool, int, float, str, tuple)) and before == now)


def _returns(core: Core, seen: list[Seen]) -> tuple | None:
    """By situation, how the module returns what this formula gives; None if one call gave something else."""
    returns: dict[tuple, list[Returned]] = {}
    for one in seen:
        found = list(_returned(core, one))
        if one.situation in returns:
            found = [r for r in returns[one.situation] if r in found]
        if not found:
            return None
        returns[one.situation] = found
    return tuple((situation, found[0]) for situation, found in returns.items())


@functools.cache
def _bound(family: type[Family], form: Form) -> Family:
    one = family()
    one.form = form
    return one


def _convention(module: nn.Module) -> Convention | None:
    return convention_of(original_of(type(module)))


def _returned(core: Core, seen: Seen) -> Iterator[Returned]:
    """The ways in which the module may have returned its log-determinant in this call, the likeliest first (one row or
    one position is no proof of how they count); none if the formula is not the module's."""
    tolerance = TOLERANCE.get(seen.y.dtype, 1e-9)
    if not core.fits(seen.x):
        return
    undo = seen.undo
    try:
        with torch.no_grad():
            y, _ = core.apply(seen.module, seen.x, undo, seen.mask, seen.given, "none")
    except (RuntimeError, ValueError, TypeError):
        return
    if not near(y, seen.y, tolerance):
        return
    detached = seen.x.requires_grad and not seen.y.requires_grad
    added = seen.method.running is not None and seen.running is not None
    kinds = Returned("alone", "none", running=added, detached=detached)
    if not isinstance(seen.out, tuple):
        yield kinds
        return
    second, running = seen.second, seen.running
    if second is None:
        yield replace(kinds, kind="none")
        return
    if not isinstance(second, Tensor):
        number = second - running if isinstance(running, (int, float)) else second
        yield replace(kinds, kind="number", number=number)
        return
    for factor in core.factors:
        try:
            with torch.no_grad():
                _, logdet = core.apply(seen.module, seen.x, undo, seen.mask, seen.given, factor)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            continue
        if not isinstance(logdet, Tensor) or logdet.dtype != second.dtype:
            continue
        for sign in (1.0, -1.0):
            expected = sign * logdet + running if added else sign * logdet
            if near(expected, second, tolerance):
                yield Returned("logdet", factor, sign, added, 0.0, detached)


def _seen(module: nn.Module, convention: Convention, call: Call, out: Any) -> Seen:
    method = convention.method(call.method)
    given = method.bind(call.args, call.kwargs)
    if given is None or not isinstance(given[method.names[0]], Tensor):
        raise TypeError(f"{call.method} was called with arguments that its signature does not name")
    if not (isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor))):
        raise TypeError(f"{call.method} returns neither a tensor nor a tensor and its log-determinant")
    mask = None if method.mask is None else given[method.mask]
    running = None if method.running is None else given[method.running]
    return Seen(module, method, given, given[method.names[0]], method.situation(given)[0], mask, running, out)


def _fresh(call: Call) -> Call:
    """Fresh inputs that ask for gradients: whether the outputs do tells a way back without them."""
    return call.map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t.clone())


def _detached(out: Any) -> Any:
    return tuple(map(_detached, out)) if isinstance(out, tuple) else out.detach() if isinstance(out, Tensor) else out


class _Wide:
    """In the place of a network: the same numbers at every call, half of them over [-4, 4] and half over [-20, 20], so
    that a clamp at 15 is seen as well as one at 1. What the network is given is the proof's affair."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward, self.made = forward, None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.made is None:
            shape = self.forward(*args, **kwargs).shape
            draw = torch.rand((2, *shape), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            self.made = (2 * draw[0] - 1) * torch.where(draw[1] < 0.5, 4.0, 20.0)
        given = next(t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point())
        return self.made.to(given)
