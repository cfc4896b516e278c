"""Changing a module's class and nothing else of it."""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..nn.hooks import hooked as has_hooks
from .adapter import Adapter, Call

# What became of layers that were to be proved at their first call: module -> (fused?, why).
_outcomes: weakref.WeakKeyDictionary[nn.Module, tuple[bool, str]] = weakref.WeakKeyDictionary()
# What is to be done once such a layer is fused.
_thens: weakref.WeakKeyDictionary[nn.Module, Callable] = weakref.WeakKeyDictionary()


class Swapped:
    """Marks a class made here and keeps copies as they should be. A deep copy is as fast as its model. A pickle
    (``torch.save(model)``, a spawned process) holds the original class, so that it loads where nfkernels is not
    installed; accelerate what was loaded again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """``type(layer)(...)`` builds a new layer, of which nothing is known yet: an original one."""
        object.__setattr__(self, "__class__", original_of(type(self)))
        self.__init__(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        return _copied(self, copy.deepcopy, memo)

    def __copy__(self) -> Any:
        return _copied(self, lambda state, _: dict(state), {})

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting, a buffer or a submodule that is replaced may ask for another layer, as what is loaded may."""
        super().__setattr__(name, value)
        if name not in _PLUMBING and not is_pending(self) and _is_setting(self, name, value) and not _elsewhere(self):
            respecialise(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What was loaded may ask for another layer: a mask in a buffer, a flag that says uninitialised."""
        adapter = None if is_pending(self) else type(self).__nfkernels_adapter__
        super()._load_from_state_dict(*args, **kwargs)
        if adapter is not None:
            if self._modules:
                _once_loaded(self, adapter)
            choose(self, adapter)

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, args, *rest = super().__reduce_ex__(protocol)
        args = tuple(original_of(a) if isinstance(a, type) else a for a in args)
        if function is copyreg.__newobj__:  # pickle refuses it for another class than the object's own
            function, args = copyreg._reconstructor, (args[0], object, None)
        return function, args, *rest


# What torch sets on any module.
_PLUMBING = {"__class__", "__dict__", "parametrizations", "_compiled_call_impl", "_is_replica", "_former_parameters"}
_PLUMBING |= set(vars(nn.Module()))


def _is_setting(module: nn.Module, name: str, value: Any) -> bool:
    """Not a parameter, a cached tensor or a method of the instance's own."""
    cls = type(module)
    if isinstance(value, Tensor):
        return name in module._buffers
    if callable(value) and not isinstance(value, nn.Module) and callable(getattr(original_of(cls), name, None)):
        return False
    return not cls.__nfkernels_adapter__.by_numbers


def _copied(module: Any, duplicate, memo: dict) -> Any:
    cls = type(module)
    own = getattr(original_of(cls), "__deepcopy__", None)
    if own is not None and duplicate is copy.deepcopy:
        new = own(module, memo)  # it may well build the class it finds, or its own
        new.__class__ = cls
        return new
    new = object.__new__(cls)
    memo[id(module)] = new
    # Parametrized modules refuse to tell their state, to stop pickling; copies are fine.
    tells = getattr(cls, "__getstate__", None) is not getattr(object, "__getstate__", None)
    state = module.__getstate__() if tells and not hasattr(module, "parametrizations") else vars(module)
    new.__setstate__(duplicate(state, memo))
    return new


def original_of(cls: type) -> type:
    """The class that a swapped class replaces; any other class itself."""
    if "__nfkernels_original__" in cls.__dict__:
        return cls.__dict__["__nfkernels_original__"]
    return _rebased(cls) if issubclass(cls, Swapped) else cls


@functools.cache
def _rebased(cls: type) -> type:
    """A class that something else derived from a swapped one (a parametrization), derived from the original instead."""
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(original_of(b) for b in cls.__bases__), members)


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def is_pending(module: nn.Module) -> bool:
    return "__nfkernels_pending__" in type(module).__dict__


@functools.cache
def fused_class(adapter: Adapter, layer: type, original: type) -> type:
    """``original`` with the methods of ``layer`` in front; one class for them, named and printed as the original."""
    return _make(original, (layer, Swapped, original), {"__nfkernels_adapter__": adapter})


@functools.cache
def pending_class(adapter: Adapter, original: type) -> type:
    """``original``, until its first call proves the adapter's layer or refutes it."""
    wrappers = {name: _proving(adapter, original, name) for name in adapter.methods() if hasattr(original, name)}
    return _make(original, (Swapped, original), {**wrappers, "__nfkernels_pending__": True})


def _make(original: type, bases: tuple, members: dict) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original)(original.__name__, bases, {**names, **members, "__nfkernels_original__": original})


def swap(module: nn.Module, adapter: Adapter) -> None:
    module.__class__ = fused_class(adapter, adapter.layer(module), original_of(type(module)))


def respecialise(module: nn.Module) -> None:
    """Chooses a fused layer's class anew after its first batch has changed its state. Not in a checkpoint, which runs
    this call once more and counts what is saved: a later call will do."""
    if _counted():
        return
    choose(module, type(module).__nfkernels_adapter__)


def choose(module: nn.Module, adapter: Adapter) -> None:
    if adapter.refuse(module) is None:
        swap(module, adapter)
    else:
        module.__class__ = original_of(type(module))


def _once_loaded(module: nn.Module, adapter: Adapter) -> None:
    """Once more when the submodules are loaded too, which hold the masks of some layers. The hook leaves no trace: for
    the time of this load the module has another dictionary of hooks."""
    hooks = module._load_state_dict_post_hooks

    def loaded(module: nn.Module, _: Any) -> None:
        module._load_state_dict_post_hooks = hooks
        choose(module, adapter)

    module._load_state_dict_post_hooks = OrderedDict(hooks, nfkernels=loaded)


def swap_at_first_call(module: nn.Module, adapter: Adapter, then: Callable | None = None) -> None:
    """``then(module, adapter)`` is called once the module is fused."""
    _outcomes.pop(module, None)
    _thens.pop(module, None)
    if then is not None:
        _thens[module] = then
    module.__class__ = pending_class(adapter, original_of(type(module)))


def restore(model: nn.Module) -> int:
    """Gives every swapped layer of ``model`` its original class back, and returns how many there were."""
    swapped = [m for m in model.modules() if is_swapped(m)]
    for module in swapped:
        module.__class__ = original_of(type(module))
    return len(swapped)


def outcome(module: nn.Module) -> tuple[bool, str] | None:
    """What the first call of a pending layer found: ``(fused, why)``; None while it is pending."""
    return _outcomes.get(module)


def _proving(adapter: Adapter, original: type, name: str):
    by_itself = getattr(original, name)

    def method(self, *args: Any, **kwargs: Any) -> Any:
        # What is not ready is initialised by its first batch, in its own code.
        if _elsewhere(self) or not adapter.ready(self) or not _telling((args, kwargs)):
            return by_itself(self, *args, **kwargs)
        if adapter.too_small(self, Call(name, args, kwargs)):  # a later call may not be
            return by_itself(self, *args, **kwargs)
        from .proof import Verdict, prove

        hook = hooked(self, adapter)  # put there since
        verdict = Verdict(False, hook, adapter) if hook else prove(self, adapter, Call(name, args, kwargs))
        _outcomes[self] = verdict.agrees, verdict.text
        found = verdict.adapter
        self.__class__ = fused_class(found, found.layer(self), original) if verdict.agrees else original
        then = _thens.pop(self, None)
        if then is not None and verdict.agrees:
            then(self, found)
        return getattr(self, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _elsewhere(module: nn.Module) -> bool:
    """Whether this call is no place for a proof: traced, transformed, captured, checkpointed, or a replica's."""
    return (
        torch.compiler.is_compiling()
        or _counted()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or getattr(module, "_is_replica", False)
        or (torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _counted() -> bool:
    """Whether somebody keeps what is saved for the backward in another way. A checkpoint does: it repeats the call and
    compares, so that a layer may not change its class between."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _telling(arguments: Any) -> bool:
    """Whether a call with these arguments can prove anything: an empty batch or one with a NaN does not."""
    tensors = [t for t in tree_flatten(arguments)[0] if isinstance(t, Tensor)]
    try:
        return all(t.numel() and (not t.is_floating_point() or bool(t.isfinite().all())) for t in tensors)
    except Exception:  # a tensor without values
        return False


def hooked(module: nn.Module, adapter: Adapter) -> str | None:
    """A hook on a submodule that the fused layer reads but does not call would never fire."""
    parts = set(adapter.parts(module))
    for name, inner in module.named_modules():
        if inner in parts and has_hooks(inner):
            return f"a hook on {name}, which the fused layer does not call"
    for name in adapter.bypassed:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            for part_name, part in inner.named_modules(prefix=name):
                if has_hooks(part):
                    return f"a hook on {part_name}, which the fused layer does not call"
    return None
