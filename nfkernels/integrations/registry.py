"""Which adapter serves which module."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable

from torch import nn

from .adapter import Adapter
from .swap import original_of

_BY_NAME: dict[str, Adapter] = {}
_BY_STRUCTURE: list[Adapter] = []

# What a subclass may define without changing what the layer computes.
_HARMLESS = {
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__", "__repr__",
    "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__static_attributes__",
    "__firstlineno__", "__annotate_func__", "__annotations_cache__", "extra_repr", "_get_name", "__setstate__",
    "__getstate__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__slots__",
}  # fmt: skip


def register(*targets: str | type) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: the :class:`Adapter` serves these classes, given as classes or as ``"package.module.Class"``.

    Without targets it is structural: its ``recognise`` is asked about every module that no name matches, and what it
    recognises is swapped only after ``accelerate(verify=True)`` has proved it by numbers. A later registration
    for the same class takes the earlier one's place. Raises ``TypeError`` for what is not an Adapter with a Layer.
    """

    def decorate(adapter: type[Adapter]) -> type[Adapter]:
        if not (isinstance(adapter, type) and issubclass(adapter, Adapter) and hasattr(adapter, "Layer")):
            raise TypeError(f"register expects a subclass of Adapter with a Layer of methods, got {adapter!r}")
        one = adapter()
        for target in targets:
            _BY_NAME[target if isinstance(target, str) else qualified(target)] = one
        if not targets:
            one.structural = True
            _BY_STRUCTURE.insert(0, one)
        return adapter

    return decorate


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def class_of(module: nn.Module) -> str:
    """The qualified name of a module's class, swapped or not."""
    return qualified(original_of(type(module)))


def find(module: nn.Module) -> tuple[Adapter | None, str | None]:
    """The adapter for a module and why it must be kept all the same: ``(adapter, None)``, ``(adapter, reason)`` or
    ``(None, None)`` for what no adapter knows."""
    _load()
    cls = type(module)
    for base in cls.__mro__:
        adapter = _BY_NAME.get(qualified(base))
        if adapter is not None:
            return adapter, changed(module, base)
    for adapter in _BY_STRUCTURE:
        if adapter.recognise(module):
            return adapter, None
    return None, None


def served() -> list[str]:
    """The qualified names of every class that an adapter serves."""
    _load()
    return sorted(_BY_NAME)


def adapter_for(name: str) -> Adapter:
    """The adapter that serves the class of this qualified name (``KeyError`` if none does)."""
    _load()
    return _BY_NAME[name]


def changed(module: nn.Module, base: type) -> str | None:
    """What a subclass or an instance has changed of the class that the adapter knows."""
    for cls in original_of(type(module)).__mro__:
        if cls is base:
            break
        # A parametrization (weight norm and the like) gives the module a class of its own with properties only.
        for name, value in vars(cls).items():
            if name not in _HARMLESS and hasattr(base, name) and not isinstance(value, property):
                return f"subclass: {cls.__name__} overrides {name} of {base.__name__}"
    for name, value in vars(module).items():
        if callable(getattr(base, name, None)) and callable(value):
            return f"its {name} has been replaced on the instance"
    return None


@functools.cache
def _load() -> None:
    """Imports our own adapters, once. They name their classes and never import the libraries."""
    for package in PACKAGES:
        home = importlib.import_module(f"{__package__}.{package}")
        for module in pkgutil.iter_modules(home.__path__):
            importlib.import_module(f"{home.__name__}.{module.name}")


# One package for each library; what is recognised by structure comes last.
PACKAGES = ("nflows", "normflows", "freia", "zuko", "structures")
