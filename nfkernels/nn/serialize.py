"""A flow in one safetensors file: the weights, and in the metadata the constructor calls that make it again.

The configuration is JSON. A module is ``{"module": name, "args": {...}, "id": n}``, the name from a table of known
classes (:func:`register` adds to it); loading calls only those, with plain values. Nothing is unpickled. Saving makes
the same calls and compares, so that a file which could not be loaded, or only as another flow, is never written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .._atomic import atomic_write
from ..ops import ScaleMap, Spline
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
    Raises ``ValueError`` naming a class or argument that cannot be described, or a part that was changed after it was
    constructed; ``OSError`` if the disk refuses.
    """
    content = to_file_bytes(module)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def to_file_bytes(module: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """The file's bytes; ``metadata`` (strings) joins the header."""
    try:
        config, tensors = describe(module)
        text = json.dumps({"format": FORMAT, "config": config, "frozen": _frozen(module)})
    except RecursionError:
        raise ValueError(f"cannot save {type(module).__name__}: its parts are nested too deeply") from None
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"cannot save {type(module).__name__}: its state {name!r} is not a tensor")
        tensors[_STATE + name] = value
    # Cloned, since safetensors refuses tensors that share memory, and on the CPU.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    _check_rebuilt(module, json.loads(text)["config"], tensors)
    return to_bytes(tensors, {_META: text, **(metadata or {})})


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
    """The module saved at ``path``, in eval mode, in the dtype it had, on ``device`` (default: the CPU).

    Raises ``CheckpointError`` for a file that is foreign, damaged, newer than this package or made of classes that this
    program has not registered; ``FileNotFoundError`` if there is none.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(2, "no such file", name)
    if os.path.isdir(name):
        raise CheckpointError(f"{name} is a folder, not a file that nfkernels wrote")
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
        version, config, frozen = content["format"], content["config"], content.get("frozen")
    except RecursionError:
        raise CheckpointError(f"{name} has a damaged configuration: it is nested too deeply") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} has a damaged configuration: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{name} has format {version}, this nfkernels reads format {FORMAT}: update nfkernels")
    try:
        with _quietly():
            module = build(config, tensors)
        _restore(module, tensors, frozen)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error}") from None
    except RecursionError:
        raise CheckpointError(f"{name} has a damaged configuration: it is nested too deeply") from None
    except Exception as error:  # whatever a constructor makes of arguments that it was never meant to get
        raise CheckpointError(f"{name} does not describe a flow that this program can build: {error}") from error
    return module.to(device).eval() if device is not None else module.eval()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Building draws initial values that the file then replaces: the caller's random stream must not notice."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


def _restore(module: nn.Module, tensors: dict[str, Tensor], frozen: list[str] | None) -> None:
    state = {key.removeprefix(_STATE): value for key, value in tensors.items() if key.startswith(_STATE)}
    own = module.state_dict()
    state = with_index_permutations(state, own)
    for what, names in (
        ("lacks", own.keys() - state.keys()),
        ("has, unasked for,", state.keys() - own.keys()),
        ("has the wrong shape of", {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}),
    ):
        if names:  # torch would name all of them, a page long
            raise CheckpointError(f"{what} {len(names)} of its flow's {len(own)} tensors, {min(names)!r} among them")
    for name in own:
        known = name.rpartition(".")[2] == "permutation" and own[name].dtype == torch.int64
        if known and not _is_permutation(state[name]):
            raise CheckpointError(f"has a {name!r} that is no permutation")
    module.load_state_dict(state, assign=True)
    if frozen is not None:  # absent from older files
        for name, parameter in module.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)


def with_index_permutations(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with permutations as ``own`` has them, index vectors: once they were matrices of zeros and ones."""
    return {
        name: value.argmax(-1)
        if name in own
        and own[name].dtype == torch.int64
        and value.is_floating_point()
        and value.shape == (*own[name].shape, own[name].shape[-1])
        and bool(((value == 0) | (value == 1)).all() & (value.sum(-1) == 1).all())
        else value
        for name, value in state.items()
    }


def _is_permutation(order: Tensor) -> bool:
    """Whether an index outside would send a kernel into somebody else's memory, or two rows to one place."""
    every = torch.arange(order.shape[-1]).expand(order.shape)
    return order.dtype == torch.int64 and order.dim() > 0 and torch.equal(order.sort(-1).values, every)


def _frozen(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]


# --- is it the same module? -------------------------------------------------------------------------------------------


def _check_rebuilt(module: nn.Module, config: Any, tensors: dict[str, Tensor]) -> None:
    """Raises ``ValueError`` unless the configuration makes a module like ``module``, which its state fits."""
    who = f"cannot save {type(module).__name__}"
    try:
        with _quietly():
            again = build(config, tensors)
    except Exception as error:
        raise ValueError(f"{who}: its constructors refuse the arguments they were given ({error})") from error
    found = _difference(module, again)
    if found:
        raise ValueError(
            f"{who}: {found}; a file holds the arguments of the constructors, so construct a flow with the parts it "
            "is to have instead of changing them afterwards"
        )
    try:
        _restore(again, tensors, None)
    except Exception as error:
        raise ValueError(f"{who}: its state does not fit what its constructors make ({error})") from error


def _difference(module: nn.Module, again: nn.Module) -> str:
    """What the constructors make otherwise than ``module`` is now, in words; empty if nothing."""
    parts, made = (dict(m.named_modules(remove_duplicate=False)) for m in (module, again))
    for name, part in parts.items():
        if name not in made:
            return f"{_called(name)} ({type(part).__name__}) was added after construction"
        if is_parametrized(part) and not is_parametrized(made[name]):
            return f"{_called(name)} got parametrizations after construction (remove_parametrizations makes it plain)"
        now, then = (type_before_parametrizations(m) for m in (part, made[name]))
        if now is not then:
            return f"{_called(name)} is a {now.__name__}, but was constructed as a {then.__name__}"
        changed = _changed(part, made[name])
        if changed:
            return (
                f"{f'{changed!r} of its part {name!r}' if name else f'its {changed!r}'} was changed after construction"
            )
    for name, part in made.items():
        if name not in parts:
            return f"{_called(name)} ({type(part).__name__}) was taken out after construction"
    state, expected = module.state_dict(), again.state_dict()
    for name in [*state, *expected]:
        if name not in expected:
            return f"the tensor {name!r} was added after construction"
        if name not in state:
            return f"the tensor {name!r} was taken out after construction"
        if state[name].shape != expected[name].shape:
            shapes = f"{tuple(state[name].shape)}, but was constructed as {tuple(expected[name].shape)}"
            return f"the tensor {name!r} has shape {shapes}"
    return ""


def _changed(part: nn.Module, made: nn.Module) -> str:
    """The first plain value in which two modules of one class differ; parts and tensors are compared elsewhere."""
    found, expected = _options(part), _options(made)
    for key in {**found, **expected}:
        values = [_json_value(options[key]) for options in (found, expected) if key in options]
        if not all(map(_is_plain, values)):
            continue
        # By repr too, since NaN is not equal to itself; not by repr only, since a float may be numpy's.
        if len(values) == 1 or (values[0] != values[1] and repr(values[0]) != repr(values[1])):
            return key
    return ""


def _options(module: nn.Module) -> dict[str, Any]:
    if type(module).__module__.partition(".")[0] == "nfkernels":
        return {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"}
    try:  # the attributes of somebody else's class may count calls
        return _name_and_arguments(module, "")[1]
    except ValueError:  # an unknown class, which the constructor of a known one made
        return {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | ScaleMap | Spline)


def _called(name: str) -> str:
    return f"its part {name!r}" if name else "it"


# --- to and from plain values -----------------------------------------------------------------------------------------


def _json_value(value: Any) -> Any:
    """numpy's numbers as Python's; anything else as it is."""
    if not isinstance(value, Tensor) and hasattr(value, "item") and getattr(value, "shape", None) == ():
        number = value.item()
        return number if isinstance(number, bool | int | float | str) else value
    return value


def describe(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """``(config, tensors)``: JSON values, and the tensors among the constructor arguments, by name."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, int] = {}

    def encode(value: Any, where: str) -> Any:
        value = _json_value(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, ScaleMap):
            return {"scale_map": {**dataclasses.asdict(value), "clamp": str(value.clamp)}}
        if isinstance(value, Spline):
            return {"spline": dataclasses.asdict(value)}
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
        if "spline" in value:
            return Spline(**value["spline"])
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
        maker = _MAKERS.get(name) or (_TORCH[name][0] if name in _TORCH else registered().get(name))
        if maker is None:
            # The package's own models register when they are imported, which nobody may have done yet.
            importlib.import_module("nfkernels.models")
            maker = registered().get(name)
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
    if is_parametrized(module):
        raise ValueError(
            f"cannot save {where}: it got parametrizations after construction; make it plain with torch.nn.utils."
            "parametrize.remove_parametrizations, or put them on in the constructor of a class of yours"
        )
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


def _norm(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    """``bias`` is named only where it was refused: not every norm of every torch has that argument."""

    def describe_arguments(module: nn.Module) -> dict[str, Any]:
        no_bias = getattr(module, "weight", None) is not None and module.bias is None
        return {**{name: getattr(module, name) for name in names}, **({"bias": False} if no_bias else {})}

    return describe_arguments


# ``_modules`` and not ``children()``, which leaves out a module that stands in two places.


def _sequence(module: nn.Module) -> dict[str, Any]:
    names = list(module._modules)
    numbered = names == [str(i) for i in range(len(names))]
    return {"*": list(module._modules.values()), **({} if numbered else {"names": names})}


def _sequential(*modules: nn.Module, names: Sequence[str] | None = None) -> nn.Sequential:
    return nn.Sequential(*modules) if names is None else nn.Sequential(OrderedDict(zip(names, modules, strict=True)))


def _module_list(module: nn.Module) -> dict[str, Any]:
    return {"modules": list(module._modules.values())}


_EMBEDDING = (
    "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
)  # fmt: skip
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_TORCH: dict[str, tuple[type[nn.Module], Callable[[nn.Module], dict[str, Any]]]] = {
    f"torch.nn.{cls.__name__}": (cls, describe_arguments)
    for cls, describe_arguments in (
        (nn.Linear, _with_bias("in_features", "out_features")),
        (nn.Conv1d, _with_bias(*_CONV)),
        (nn.Conv2d, _with_bias(*_CONV)),
        (nn.Embedding, _attributes(*_EMBEDDING)),
        (nn.LayerNorm, _norm("normalized_shape", "eps", "elementwise_affine")),
        (nn.GroupNorm, _norm("num_groups", "num_channels", "eps", "affine")),
        (nn.BatchNorm1d, _norm(*_BATCH_NORM)),
        (nn.BatchNorm2d, _norm(*_BATCH_NORM)),
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
        (nn.Sequential, _sequence),
        (nn.ModuleList, _module_list),
    )
}
_MAKERS: dict[str, Callable[..., nn.Module]] = {"torch.nn.Sequential": _sequential}
