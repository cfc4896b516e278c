"""A run's whole state in one safetensors file: written atomically, read without executing anything."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._atomic import atomic_write
from .distributed import Ranks
from .errors import TrainingError
from .run_folder import is_whole

# Raised whenever the layout changes: ``_UPGRADES`` makes an older one's content the next version's, a newer one is
# refused. Version 2: among several ranks, each one's state of random numbers ("random/cpu.1"); "ranks" in the facts.
VERSION = 2
_KEY = "nfkernels_checkpoint"


def save_checkpoint(path: str | os.PathLike[str], tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Writes groups of named tensors and JSON-able facts to ``path``; until it is whole, ``path`` keeps what it held.

    Raises ``OSError`` (naming the file) where it cannot be written, a full disk included.
    """
    flat = {}
    for group, members in tensors.items():
        for name, tensor in members.items():
            # Copies: safetensors refuses tensors that share memory, and the CPU's would change under a slow write.
            flat[f"{group}/{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    metadata = {_KEY: json.dumps({"version": VERSION, **facts})}
    with atomic_write(path) as temporary:
        write_tensors(flat, temporary, metadata)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file`` whose input/output errors are ``OSError`` like everybody else's."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors (on the CPU) and the facts that ``save_checkpoint`` wrote, or an older version did.

    Raises ``TrainingError`` where the file is missing, damaged, of another program or of a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = _facts(path, file.metadata())
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise TrainingError(f"{path} is not there: nothing to resume; is this the folder of a run?") from None
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged or not a safetensors file ({error})") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, facts


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the facts of a checkpoint, without its tensors. Raises as ``load_checkpoint``."""
    try:
        with safe_open(path, framework="pt") as file:
            return _facts(path, file.metadata())
    except FileNotFoundError:
        raise TrainingError(f"{path} is not there: nothing to resume; is this the folder of a run?") from None
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged or not a safetensors file ({error})") from error


def rng_state(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """The states of torch's global generators that training on ``device`` draws from, of all ranks, on each."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["device"] = torch.cuda.get_rng_state(device)
    return {_of_rank(name, rank): state for name, part in own.items() for rank, state in enumerate(ranks.gather(part))}


def set_rng_state(state: dict[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    """This rank's share of an ``rng_state``. One that had no part in it keeps the state that it has."""
    cpu, own = _of_rank("cpu", ranks.rank), _of_rank("device", ranks.rank)
    if cpu in state or ranks.is_main:
        torch.set_rng_state(state[cpu])
    if device.type == "cuda" and own in state:
        torch.cuda.set_rng_state(state[own], device)


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _facts(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise TrainingError(f"{path} is a safetensors file but not a checkpoint of nfkernels training")
    try:
        facts = json.loads(text)
        version = facts.pop("version")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged: its description cannot be read ({error})") from error
    if not is_whole(version, 1):
        raise TrainingError(f"{path} is damaged: its description has no usable 'version'")
    if version > VERSION:
        raise TrainingError(
            f"{path} is of a newer nfkernels (checkpoint version {version}, this one reads up to {VERSION}): update "
            "nfkernels to resume it"
        )
    for older in range(version, VERSION):
        _UPGRADES[older](facts)
    wrong = next((name for name, fits in _FACTS.items() if not fits(facts.get(name))), None)
    if wrong:
        raise TrainingError(f"{path} is damaged: its description has no usable {wrong!r}")
    return facts


def _is_best(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    losses = value.get("loss"), value.get("latest")
    numbers = all(loss is None or (isinstance(loss, (int, float)) and not isinstance(loss, bool)) for loss in losses)
    return numbers and is_whole(value.get("step")) and is_whole(value.get("stale"))


def _is_order(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_whole(value.get("epoch"))
        and is_whole(value.get("images"), 1)
        and is_whole(value.get("position"), 0, value["images"])
    )


def _one_rank(facts: dict[str, Any]) -> None:
    facts.setdefault("ranks", 1)


# By version: what the facts lack to be those of the next one, added in place. What a recipe lacks gets its default.
_UPGRADES = {1: _one_rank}

# What a checkpoint's description holds, and whether a value can be that; tensors are compared with the flow's own.
_FACTS = {
    "step": is_whole,
    "recipe": lambda value: isinstance(value, dict),
    "best": _is_best,
    "order": _is_order,
    "data": lambda value: isinstance(value, dict),
    "metrics_size": is_whole,
    "config": lambda value: isinstance(value, dict),
    "ranks": lambda value: is_whole(value, 1),
}
