"""Running a model once to see which of its layers are called, and with what; afterwards it is as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Call
from .swap import original_of


def watch(model: nn.Module, layers: dict[nn.Module, Adapter], run: Callable[[], Any]) -> dict[nn.Module, Call]:
    """The first call of each of ``layers`` while ``run()`` runs the model."""
    seen: dict[nn.Module, Call] = {}
    classes = {module: type(module) for module in layers}
    try:
        for module, adapter in layers.items():
            module.__class__ = _watching(type(module), adapter, seen)
        run()
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    return seen


def _watching(cls: type, adapter: Adapter, seen: dict[nn.Module, Call]) -> type:
    def watched(name: str):
        def method(self, *args: Any, **kwargs: Any) -> Any:
            if self not in seen and adapter.ready(self):
                seen[self] = Call(name, args, kwargs).map(lambda t: t.detach().clone())
                out = getattr(super(watching, self), name)(*args, **kwargs)
                return out
            out = getattr(super(watching, self), name)(*args, **kwargs)
            if self not in seen:  # this call has initialised it: the next may be the first that counts
                seen[self] = Call(name, args, kwargs).map(lambda t: t.detach().clone())
            return out

        return method

    members = {name: watched(name) for name in adapter.methods() if hasattr(cls, name)}
    original = original_of(cls)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__nfkernels_original__": original}
    watching = type(cls)(cls.__name__, (cls,), {**names, **members})
    return watching


@contextlib.contextmanager
def unchanged(model: nn.Module, *tensors: Any) -> Iterator[None]:
    """Parameters, buffers, plain attributes, modes, the random state: what a run changes is put back."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # whose dictionaries are views
    kept = [(m, dict(m._parameters), dict(m._buffers), _plain(m)) for m in modules]
    scripted = [t for m in model.modules() if isinstance(m, torch.jit.ScriptModule) for t in m.buffers(recurse=False)]
    own = [t for _, ps, bs, _ in kept for t in (*ps.values(), *bs.values()) if _live(t)]
    values = [(t, t.detach().clone()) for t in (*own, *scripted)]
    devices = sorted({t.device.index for t, _ in values if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, parameters, buffers, plain in kept:
                module._parameters.clear()
                module._parameters.update(parameters)
                module._buffers.clear()
                module._buffers.update(buffers)
                for name in [n for n in vars(module) if n not in plain and _is_plain(vars(module)[n])]:
                    del vars(module)[name]
                vars(module).update(plain)
            with torch.no_grad():
                for tensor, value in values:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Flags and cached tensors that a layer keeps outside its parameters and buffers."""
    return {name: value for name, value in vars(module).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _live(t: Any) -> bool:
    return isinstance(t, Tensor) and not torch.nn.parameter.is_lazy(t)
