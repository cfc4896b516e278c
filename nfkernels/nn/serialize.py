"""A flow in one safetensors file: the weights, and in the metadata the constructor calls that make it again.

The configuration is JSON. A module is ``{"module": name, "args": {...}, "id": n}``, the name from a table of known
classes (:func:`register` adds to it); loading calls only those, with plain values. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .._atomic import atomic_write
from ..ops import ScaleMap
from .config import Recorded, arguments, registered

FORMAT = 1
_META = "nfkernels"
_CONFIG_TENSOR = "config."
_STATE = "state."


class CheckpointError(ValueError):
    """A file that is not, or not any more, a flow this program can load; the sentence says why."""


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes ``module`` (a flow, or any module of known classes) to ``path``: whole, or not at all.

    The file is written beside ``path``, flushed, and renamed over it, so a full disk or a crash leaves what was there.
    Raises ``ValueError`` naming a class or argument that cannot be described, ``OSError`` if the disk refuses.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(to_file_bytes(module))


def to_file_bytes(module: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """The file's bytes; ``metadata`` (strings) joins the header."""
    config, tensors = describe(module)
    for name, value in module.state_dict().items():
        tensors[_STATE + name] = value
    # Cloned, since safetensors refuses tensors that share memory, and on the CPU.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {_META: json.dumps({"format": FORMAT, "config": config}), **(metadata or {})}
    return to_bytes(tensors, header)


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
    """The module saved at ``path``, in eval mode, in the dtype it had, on ``device`` (default: the CPU).

    Raises ``CheckpointError`` for a file that is foreign, damaged, newer than this package or made of classes that this
    program has not registered; ``FileNotFoundError`` if there is none.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(2, "no such file", name)
    try:
        with safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            if _META not in header:
                raise CheckpointError(f"{name} is a safetensors file, but not one that nfkernels wrote")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name} is not a whole safetensors file: {error}") from error
    try:
        content = json.loads(header[_META])
        version, config = content["format"], content["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} has a damaged configuration: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{name} has format {version}, this nfkernels reads format {FORMAT}: update nfkernels")
    try:
        # Building draws initial values that the file then replaces: the caller's random stream must not notice.
        with torch.random.fork_rng(devices=[]):
            module = build(config, tensors)
        state = {key.removeprefix(_STATE): value for key, value in tensors.items() if key.startswith(_STATE)}
        module.load_state_dict(state, assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{name} does not describe a flow that this program can build: {error}") from error
    return module.to(device).eval() if device is not None else module.eval()


# --- to and from plain values -----------------------------------------------------------------------------------------


def describe(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """``(config, tensors)``: JSON values, and the tensors among the constructor arguments, by name."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, int] = {}

    def encode(value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, ScaleMap):
            return {"scale_map": {**vars(value), "clamp": str(value.clamp)}}
        if isinstance(value, Tensor):
            name = f"{_CONFIG_TENSOR}{len(tensors)}"
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, nn.Module):
            return encode_module(value, where)
        if isinstance(value, list | tuple):
            items = [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {"dict": {k: encode(v, f"{where}[{k!r}]") for k, v in value.items()}}
        raise ValueError(f"cannot save {where}: no way to write a {type(value).__name__} to a file")

    def encode_module(value: nn.Module, where: str) -> Any:
        if id(value) in seen:
            return {"same": seen[id(value)]}
        seen[id(value)] = number = len(seen)
        name, given = _name_and_arguments(value, where)
        return {"module": name, "id": number, "args": {k: encode(v, f"{where}.{k}") for k, v in given.items()}}

    return encode_module(module, type(module).__name__), tensors


def build(config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """The module that :func:`describe` described, freshly initialised."""
    made: dict[int, nn.Module] = {}

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "scale_map" in value:
            return ScaleMap(**{**value["scale_map"], "clamp": float(value["scale_map"]["clamp"])})
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(decode(v) for v in value["tuple"])
        if "dict" in value:
            return {k: decode(v) for k, v in value["dict"].items()}
        if "same" in value:
            return made[value["same"]]
        return decode_module(value)

    def decode_module(value: dict[str, Any]) -> nn.Module:
        name = value["module"]
        given = {k: decode(v) for k, v in value["args"].items()}
        positional, named = given.pop("*", ()), given.pop("**", {})
        maker = _TORCH[name][0] if name in _TORCH else registered().get(name)
        if maker is None:
            raise CheckpointError(
                f"is made of a class {name!r} that this program does not know: import the module that defines "
                "it and calls nfkernels.nn.register on it"
            )
        made[value["id"]] = module = maker(*positional, **given, **named)
        return module

    module = decode(config)
    if not isinstance(module, nn.Module):
        raise CheckpointError("has a configuration that describes no module")
    return module


def _name_and_arguments(module: nn.Module, where: str) -> tuple[str, dict[str, Any]]:
    cls = type(module)
    name = f"torch.nn.{cls.__name__}"
    if name in _TORCH and _TORCH[name][0] is cls:
        return name, _TORCH[name][1](module)
    for known, registered_class in registered().items():
        if registered_class is cls:
            given = arguments(module)
            return known, {} if given is None else given
    kind = "a flow part of yours" if isinstance(module, Recorded) else "a module"
    raise ValueError(
        f"cannot save {where}: {cls.__module__}.{cls.__qualname__} is {kind} that nfkernels does not know; put "
        "@nfkernels.nn.register above its class"
    )


# --- torch's own modules ----------------------------------------------------------------------------------------------


def _attributes(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names}


def _with_bias(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda module: {**{name: getattr(module, name) for name in names}, "bias": module.bias is not None}


def _children(module: nn.Module) -> dict[str, Any]:
    return {"*": list(module.children())}


def _child_list(module: nn.Module) -> dict[str, Any]:
    return {"modules": list(module.children())}


def _layer_norm(module: nn.Module) -> dict[str, Any]:
    return {**_attributes("eps", "elementwise_affine")(module), "normalized_shape": list(module.normalized_shape)}


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_TORCH: dict[str, tuple[type[nn.Module], Callable[[nn.Module], dict[str, Any]]]] = {
    f"torch.nn.{cls.__name__}": (cls, describe_arguments)
    for cls, describe_arguments in (
        (nn.Linear, _with_bias("in_features", "out_features")),
        (nn.Conv1d, _with_bias(*_CONV)),
        (nn.Conv2d, _with_bias(*_CONV)),
        (nn.Embedding, _attributes("num_embeddings", "embedding_dim", "padding_idx")),
        (nn.LayerNorm, _layer_norm),
        (nn.GroupNorm, _attributes("num_groups", "num_channels", "eps", "affine")),
        (nn.BatchNorm1d, _attributes("num_features", "eps", "momentum", "affine", "track_running_stats")),
        (nn.BatchNorm2d, _attributes("num_features", "eps", "momentum", "affine", "track_running_stats")),
        (nn.Dropout, _attributes("p", "inplace")),
        (nn.Dropout2d, _attributes("p", "inplace")),
        (nn.ReLU, _attributes("inplace")),
        (nn.LeakyReLU, _attributes("negative_slope", "inplace")),
        (nn.ELU, _attributes("alpha", "inplace")),
        (nn.SiLU, _attributes("inplace")),
        (nn.GELU, _attributes("approximate")),
        (nn.Tanh, _attributes()),
        (nn.Sigmoid, _attributes()),
        (nn.Softplus, _attributes("beta", "threshold")),
        (nn.Identity, _attributes()),
        (nn.Flatten, _attributes("start_dim", "end_dim")),
        (nn.Unflatten, lambda m: {"dim": m.dim, "unflattened_size": tuple(m.unflattened_size)}),
        (nn.Sequential, _children),
        (nn.ModuleList, _child_list),
    )
}
