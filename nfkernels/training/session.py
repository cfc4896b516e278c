"""What the commands share: a device by name, a Glow by its description, the data and the flow of a finished run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._nearest import did_you_mean
from .data import DataError, ImageData, ImageStream, load_images, split
from .errors import TrainingError, is_out_of_memory
from .recipe import PRECISIONS, GlowShape, auto_levels
from .run_folder import RunFolder

if TYPE_CHECKING:
    from ..nn import Flow, ImageFlow

# The cut into train, validation and test does not follow --seed: runs with different seeds share one test part.
SPLIT_SEED = 0


# --- devices --------------------------------------------------------------------------------------------------------


def devices_here() -> list[str]:
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def why_no_cuda() -> str:
    """One phrase; for a machine where CUDA is not available."""
    if not torch.backends.cuda.is_built():
        return f"this PyTorch, {torch.__version__}, was built without it"
    return f"PyTorch {torch.__version__} finds no usable GPU and driver"


def pick_device(name: str | None) -> torch.device:
    """``"auto"`` (or None) is the first CUDA device, else the CPU. ``TrainingError`` for a device that is not here."""
    here = devices_here()
    if name in (None, "auto"):
        return torch.device("cuda:0" if "cuda:0" in here else "cpu")
    device = torch.device(name)
    exact = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    if exact not in here:
        why = f" ({why_no_cuda()})" if device.type == "cuda" and "cuda:0" not in here else ""
        raise TrainingError(f"there is no device {name} here{why}; this machine has {', '.join(here)}")
    return torch.device(exact)


def set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, the networks compute in ``"float32"`` or ``"bfloat16"``, as under that ``Recipe.precision``."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def precision_of(config: dict[str, Any]) -> str:
    """What the networks of a run were trained in; float32 where its configuration does not tell."""
    recipe = config.get("recipe")
    precision = recipe.get("precision") if isinstance(recipe, dict) else None
    return precision if precision in PRECISIONS else "float32"


# --- the flow of a run ----------------------------------------------------------------------------------------------


def describe_glow(data: ImageData | ImageStream, shape: GlowShape, *, conditional: bool) -> dict[str, Any]:
    """The arguments of ``Glow`` for these images, JSON-able. ``TrainingError`` for images it cannot halve."""
    depth, height, width = data.image_shape
    levels = auto_levels(height, width) if shape.levels is None else shape.levels
    if levels == 0 or height % 2**levels or width % 2**levels:
        need = f"halved {levels} times, as {levels} levels need" if levels > 1 else "halved, as a level needs"
        fits = auto_levels(height, width)
        fewer = f"--levels {fits} or " if fits else ""
        multiple = 2**levels if levels else 4
        nearest = "x".join(str(-(-side // multiple) * multiple) for side in (height, width))
        raise TrainingError(f"{data.name}: images of {height} x {width} cannot be {need}: try {fewer}--size {nearest}")
    if isinstance(shape.depth, tuple) and len(shape.depth) != levels:
        raise TrainingError(f"--depth has {len(shape.depth)} numbers for {levels} levels: give one, or one per level")
    if conditional and data.classes is None:
        raise TrainingError(f"--classes: {data.name} has no labels; class folders or a label file would give them")
    return {
        "shape": [depth, height, width],
        "levels": levels,
        "steps": list(shape.depth) if isinstance(shape.depth, tuple) else shape.depth,
        "hidden": shape.width,
        "dropout": shape.dropout,
        "dropout_of": shape.dropout_of,
        "kernel": shape.kernel,
        "last_kernel": shape.last_kernel,
        "scale_map": shape.scale_map,
        "order": shape.order,
        "class_width": shape.class_width,
        "memory": shape.memory,
        "dequantization": shape.dequantization,
        "grey_levels": data.grey_levels,
        "classes": len(data.classes) if conditional else None,
    }


def build_glow(description: dict[str, Any]) -> ImageFlow:
    """``TrainingError`` with Glow's own sentence where it refuses its arguments."""
    from ..models import Glow

    try:
        arguments = dict(description)
        return Glow(tuple(arguments.pop("shape")), **arguments)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(f"a Glow cannot be built: {error}") from error


@contextlib.contextmanager
def using(what: object) -> Iterator[None]:
    """Inside, what a flow itself refuses (a matrix that is singular, say) is a ``TrainingError`` that names it."""
    try:
        yield
    except (DataError, TrainingError):
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise TrainingError(f"the flow of {what} cannot be used: {error}") from error


def open_run(
    path: str | os.PathLike[str], device: torch.device, kind: type[Flow] | None = None
) -> tuple[Any, RunFolder | None, dict[str, Any]]:
    """The flow of a run (or of a single ``.safetensors`` file), its folder and its configuration (else None and {}).

    Raises:
        TrainingError: there is no run, or what is there is no flow of this kind (None: of images). CheckpointError: the
            file is damaged.
    """
    from ..nn import ImageFlow, TableFlow, load

    path = Path(path)
    folder, config = None, {}
    file = path
    if path.is_dir():
        folder = RunFolder(path)
        file = folder.model
        if not file.exists():
            raise TrainingError(f"{path} holds no {file.name}: it is not the folder of a run")
        config = folder.read_config() if folder.config.exists() else {}
    elif not path.exists():
        raise TrainingError(f"{path} does not exist{_runs_nearby(path)}")
    elif path.name == RunFolder(path.parent).checkpoint.name:
        raise TrainingError(f"{path} is for --resume: give {path.parent} or its {RunFolder(path.parent).model.name}")
    flow = load(file)
    kind = ImageFlow if kind is None else kind
    if not isinstance(flow, kind):
        what = "over a table" if kind is TableFlow else "of images"
        raise TrainingError(f"{file} holds a {type(flow).__name__}, which is not a flow {what}")
    # Buffers may well hold infinities (masks); weights never.
    bad = sum(int((~torch.isfinite(weight)).sum()) for weight in flow.parameters())
    if bad:
        total = sum(weight.numel() for weight in flow.parameters())
        raise TrainingError(f"{file}: {bad} of {total} weights are not finite, so it is of no use: train again")
    return flow.to(device).eval(), folder, config


def checkpoint_of(path: str | os.PathLike[str]) -> RunFolder:
    """The folder of a run to resume. ``TrainingError`` where there is none."""
    folder = RunFolder(path)
    if not folder.path.exists():
        raise TrainingError(f"{path} does not exist{_runs_nearby(folder.path)}")
    if not folder.path.is_dir():
        raise TrainingError(f"{path} is not the folder of a run: give the folder, not a file in it")
    if folder.checkpoint.is_dir():
        raise TrainingError(f"{folder.checkpoint} is a folder: expected the file that nfkernels train wrote")
    if not folder.checkpoint.exists():
        raise TrainingError(f"{path} holds no {folder.checkpoint.name}: nothing to resume")
    return folder


def run_data(
    config: dict[str, Any], *, may_have_moved: bool = False, workers: int | None = None
) -> tuple[ImageData | ImageStream, ImageData, ImageData]:
    """The train, validation and test parts that a configuration describes. ``DataError`` where they are gone."""
    try:
        data = config["data"]
        source, size, channels, seed = data["source"], data["size"], data["channels"], data["split_seed"]
        how = {"channels": channels, "bits": data.get("bits"), "stream": data.get("stream"), "workers": workers}
    except (KeyError, TypeError) as error:
        raise TrainingError(f"the run's configuration does not say what data it used ({error})") from error
    if may_have_moved and source != "digits" and not Path(source).expanduser().exists():
        raise TrainingError(f"the run's data, {source}, is not there any more: if it moved, give --data PATH")
    size = None if size is None else tuple(size)
    return split(load_images(source, size=size, **how), seed=seed)


def class_names(flow: ImageFlow, config: dict[str, Any]) -> list[str] | None:
    """What the classes of a conditional flow are called; None for an unconditional one."""
    count = getattr(flow, "classes", None)
    if not count:
        return None
    names = (config.get("data") or {}).get("classes")
    return names if isinstance(names, list) and len(names) == count else [str(index) for index in range(count)]


def class_index(wish: str, names: list[str] | None) -> int:
    """A class by name or number. ``TrainingError`` that lists the classes where there is no such one."""
    if names is None:
        raise TrainingError("--class: this flow was trained without classes (nfkernels train --classes)")
    if wish in names:
        return names.index(wish)
    if wish.isdecimal() and int(wish) < len(names):
        return int(wish)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    near = did_you_mean(wish, names, "; ")
    raise TrainingError(f"--class {wish}: the flow has {len(names)} classes, numbered from 0: {listed}{near}")


def many(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def absolute(source: str) -> str:
    """Where the data lies, whatever folder a later command is run in; ``"digits"`` is no path.

    What is not there stays as it was given: that is the name to complain about.
    """
    path = Path(source).expanduser()
    return source if source == "digits" or not path.exists() else str(path.absolute())


def _runs_nearby(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path("runs")
    runs = sorted(str(file.parent) for file in parent.glob("*/model.safetensors")) if parent.is_dir() else []
    return f"; runs there: {', '.join(runs[-8:])}" if runs else ""
