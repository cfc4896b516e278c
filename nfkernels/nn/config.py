"""Constructor arguments, remembered: what ``save`` needs to build the same module again.

Classes of this package remember them by inheriting :class:`Recorded`; anyone else's module does after
:func:`register`. Nothing is ever pickled: a file names classes from a table, and the table is filled by imports.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import KeysView, ValuesView
from types import GeneratorType
from typing import Any, TypeVar

from torch import nn

_KEY = "_nfkernels_arguments"
_CLASSES: dict[str, type] = {}
T = TypeVar("T", bound=type)


class Recorded:
    """Mixin: the arguments of the outermost constructor are kept on the instance, the class in the table."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            _record(cls)
        if cls.__module__.partition(".")[0] == "nfkernels":
            _CLASSES[cls.__name__] = cls


def register(cls: T | None = None, *, name: str | None = None) -> Any:
    """Lets :func:`save` and :func:`load` know a class of yours: ``@register`` above any ``nn.Module``.

    The file then holds the class's name (or ``name``) and its constructor's arguments, which must be numbers, strings,
    booleans, None, lists, tuples, dicts, tensors, scale maps, splines or modules of known classes. The program that
    loads must have imported (and so registered) the class too.

    Raises ``ValueError`` if the name is taken by another class.
    """
    if cls is None:
        return functools.partial(register, name=name)
    name = cls.__name__ if name is None else name
    taken = _CLASSES.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}: give another name=")
    # A constructor that is inherited from a class of yours is looked at too: its arguments count as much.
    init = vars(cls).get("__init__") or cls.__init__  # type: ignore[misc]
    if init is not nn.Module.__init__ and not hasattr(init, _KEY):
        _record(cls)
    _CLASSES[name] = cls
    return cls


def registered() -> dict[str, type]:
    return _CLASSES


def arguments(module: object) -> dict[str, Any] | None:
    """The recorded arguments by parameter name, or None; ``*args`` under ``"*"``, ``**kwargs`` under ``"**"``."""
    return module.__dict__.get(_KEY)


def replace_argument(module: object, given: Any, kept: Any) -> None:
    """Records ``kept``, which a file can hold, where the module's constructor was given ``given``, which it cannot."""
    recorded = arguments(module) or {}
    recorded.update({name: kept for name, value in recorded.items() if value is given})


def _record(cls: type) -> None:
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    kinds = {p.name: p.kind for p in signature.parameters.values()}

    @functools.wraps(init)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if _KEY not in self.__dict__:
            args, kwargs = tuple(_listed(v) for v in args), {k: _listed(v) for k, v in kwargs.items()}
            bound = signature.bind(self, *args, **kwargs).arguments
            names: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
            # Past Module.__setattr__, which would register the modules among the arguments a second time.
            self.__dict__[_KEY] = {names.get(kinds[k], k): _copied(v) for k, v in list(bound.items())[1:]}
        init(self, *args, **kwargs)

    setattr(recording, _KEY, True)
    cls.__init__ = recording  # type: ignore[misc]


def _listed(value: Any) -> Any:
    """A generator can be gone through once, by the constructor or by whoever remembers: both get a list."""
    return list(value) if isinstance(value, GeneratorType | map) else value


def _copied(value: Any) -> Any:
    """Containers are copied, so that what the caller does to theirs later does not change what was given."""
    if isinstance(value, list | range | KeysView | ValuesView):
        return [_copied(v) for v in value]
    if isinstance(value, tuple):
        return tuple(_copied(v) for v in value)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value
