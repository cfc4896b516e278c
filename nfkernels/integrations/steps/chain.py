"""Which modules are chains of parts, in the order in which data meets them, and how a list of them becomes runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...nn.hooks import hooked
from ..registry import changed, qualified
from ..swap import original_of
from .parts import AffineCoupling, Elementwise, NotUnderstood, Part, linear_pattern

Path = tuple[str, ...]

# A layer by its qualified name: what part it is. A container: the paths of its layers in data order.
_PARTS: dict[str, Callable[[nn.Module], Part]] = {}
_CHAINS: dict[str, Callable[[nn.Module], Sequence[Path]]] = {}
# By structure: None for what is not recognised.
_SHAPES: list[Callable[[nn.Module], Part | None]] = []


def part(name: str):
    """Decorator: a function that says which :class:`Part` a layer of this qualified name is."""
    return lambda function: _PARTS.setdefault(name, function)


def chain(name: str):
    """Decorator: a function that gives the paths of the layers of a container of this name, in data order."""
    return lambda function: _CHAINS.setdefault(name, function)


def is_step(module: nn.Module) -> bool:
    """Whether a module looks like a step of a Glow port: three layers by these names, and a way back."""
    names = set(module._modules)
    return names == {"actnorm", "invconv", "coupling"} and callable(getattr(module, "reverse", None))


def shape(function: Callable[[nn.Module], Part | None]):
    """Decorator: a function that recognises a layer by its structure."""
    _SHAPES.append(function)
    return function


@dataclass(frozen=True)
class Run:
    """K equal steps: their linear parts, their coupling, its inverse by signs, and where every layer is."""

    linear: tuple[Part, ...]
    coupling: AffineCoupling
    turned: AffineCoupling
    places: tuple[tuple[Path, ...], ...]


@dataclass(frozen=True)
class Stage:
    """Consecutive elements ``start`` to ``stop`` of a list as runs, in data order; ``layers`` are all modules whose
    call is left out, with their classes."""

    start: int
    stop: int
    runs: tuple[Run, ...]
    layers: tuple[tuple[Path, type], ...]


def at(module: nn.Module, path: Path) -> nn.Module:
    for name in path:
        module = module._modules[name]
    return module


def flattened(module: nn.Module, path: Path = ()) -> tuple[list[tuple[Part, Path]], list[tuple[Path, type]]]:
    """The parts of a module in data order with their paths, and the modules whose call they replace; raises
    NotUnderstood."""
    cls = original_of(type(module))
    for name, base in ((qualified(base), base) for base in cls.__mro__):
        if name in _PARTS or name in _CHAINS:
            other = changed(module, base)
            if other:
                raise NotUnderstood(other)
            break
    else:
        name = None
    inside = _CHAINS[name](module) if name in _CHAINS else None
    if name is None and is_step(module):
        inside = [("actnorm",), ("invconv",), ("coupling",)]
    if inside is not None:
        parts, layers = [], [(path, cls)]
        for inner in inside:
            own, passed = flattened(at(module, inner), path + inner)
            parts += own
            layers += passed
        return parts, layers
    found = _PARTS[name](module) if name in _PARTS else next((p for s in _SHAPES if (p := s(module))), None)
    if found is None:
        raise NotUnderstood(f"{cls.__name__} is no part of a step")
    network = path + found.network if isinstance(found, AffineCoupling) else None
    inside = [tuple(n.split(".")) for n, m in module.named_modules() if n and not isinstance(m, nn.ModuleList)]
    skipped = [path + p for p in inside if network is None or (path + p)[: len(network)] != network]
    return [(found, path)], [(path, cls), *((p, original_of(type(at(module, p[len(path) :])))) for p in skipped)]


def stages(elements: Sequence[nn.Module], reverse: bool) -> tuple[list[Stage], str | None]:
    """The stages of a list of layers, which data meets from the last to the first if ``reverse``, and why there are
    none where there are none."""
    order = list(range(len(elements)))[:: -1 if reverse else 1]
    found: list[Stage] = []
    reasons: list[str] = []
    together: list[tuple[int, list, list]] = []
    for i in [*order, None]:
        flat = None
        if i is not None:
            try:
                flat = flattened(elements[i], (str(i),))
                hook = next((p for p, _ in flat[1] if hooked(at_of(elements, p))), None)
                if hook:
                    flat = None
                    raise NotUnderstood(f"a hook on {'.'.join(hook)}, which would not be called")
            except NotUnderstood as why:
                reasons.append(str(why))
        if flat is not None:
            together.append((i, *flat))
            continue
        found += _staged(together, reasons)
        together = []
    hook = next((r for r in reasons if r.startswith("a hook")), None)
    return found, hook or (None if found else next(iter(reasons), "there is no layer in it"))


def stage_of(module: nn.Module) -> Stage:
    """A module that is a chain by itself; its paths begin at it. Raises NotUnderstood."""
    parts, layers = flattened(module)
    hook = next((p for p, _ in layers if p and hooked(at(module, p))), None)
    if hook:
        raise NotUnderstood(f"a hook on {'.'.join(hook)}, which would not be called")
    reasons: list[str] = []
    made = _staged([(0, parts, [layer for layer in layers if layer[0]])], reasons)
    if not made:
        raise NotUnderstood(next(iter(reasons), "it does not end in a coupling"))
    return made[0]


def at_of(elements: Sequence[nn.Module], path: Path) -> nn.Module:
    return at(elements[int(path[0])], path[1:])


def _staged(together: list, reasons: list[str]) -> list[Stage]:
    """Elements that are understood, as one stage; those from which on no step is complete are left alone."""
    while together and not isinstance(together[-1][1][-1][0], AffineCoupling):
        together = together[:-1]
    if not together:
        return []
    steps: list[tuple[tuple, tuple]] = []
    linear: list = []
    for placed, path in (p for _, parts, _ in together for p in parts):
        linear.append((placed, path))
        if isinstance(placed, AffineCoupling):
            parts, places = zip(*linear, strict=True)
            if not linear_pattern(parts[:-1]):
                reasons.append("between two couplings there is not one 1x1 convolution with its actnorm")
                return []
            if len({p.channels for p in parts}) != 1:
                reasons.append("its layers have different numbers of channels")
                return []
            steps.append((parts, places))
            linear = []
    runs: list[tuple[tuple, list]] = []
    for parts, places in steps:
        if runs and runs[-1][0] == parts:
            runs[-1][1].append(places)
        else:
            runs.append((parts, [places]))
    numbers = [i for i, _, _ in together]
    layers = tuple(layer for _, _, own in together for layer in own)
    made = tuple(Run(parts[:-1], parts[-1], parts[-1].negated(), tuple(places)) for parts, places in runs)
    return [Stage(min(numbers), max(numbers) + 1, made, layers)]


def flags(run: Run) -> list[tuple[Path, str]]:
    """Where the buffers are that say whether a first batch has come."""
    return [
        (path, part.flag)
        for places in run.places
        for part, path in zip(run.linear, places)
        if isinstance(part, Elementwise) and part.flag
    ]
