"""The options of ``nfkernels train`` in one table: the command line, a file and a preset are read by it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from .option import Option, depth, device, name, number, several, size, whole
from .presets import PRESETS
from .recipe import OPTIMIZERS, PRECISIONS, SCHEDULES, GlowShape, Recipe, most_threads
from .tables.kind import MODELS, is_table

# The names that ScaleMap.parse knows, told here because this module is read before torch is.
SCALE_MAPS = ("additive", "exp", "glow", "nflows", "nflows_softplus", "freia", "realnvp", "zuko")
PROGRESS = ("auto", "bar", "lines", "none")


# --- the table ------------------------------------------------------------------------------------------------------

# Rows are cheap and often many, and the flows over them small: larger batches, no decay of weights, more patience.
_TABLE_RECIPE = {
    "steps": 10_000,
    "batch_size": 512,
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup": 100,
    "weight_decay": 0.0,
    "clip": 10.0,
    "ema": 0.995,
    "validate_every": 250,
    "patience": 10,
    "log_every": 50,
}


def _table() -> dict[str, Option]:
    recipe, shape = asdict(Recipe()), asdict(GlowShape())
    rows: list[Option] = []

    def row(group: str, option: str, kind: Callable | None, text: str, metavar: str | None = "N", **rest: Any) -> None:
        rows.append(Option(option, group, text, kind, metavar=metavar, **rest))

    def choice(group: str, option: str, text: str, choices: tuple, **rest: Any) -> None:
        rows.append(Option(option, group, text, choices=choices, metavar=None, **rest))

    images, tables = "images", "tables"
    where = "data and folders"
    row(
        where,
        "data",
        name,
        "the digits (default); a folder of images, flat or one sub-folder per class; a folder of idx files (MNIST) or "
        "of CIFAR's python batches; an .npz or .npy file of uint8 images; or a table: .csv, .npy of [N, D], .parquet",
        "digits|PATH",
    )
    row(where, "size", size, "resize and crop the images to this size", "N|HxW", of=images)
    choice(where, "channels", "1 makes colour images grey, 3 grey ones RGB", (1, 3), of=images)
    row(where, "n_bits", whole(1, 8), "keep the upper bits of every pixel value: 5 leaves 32 grey levels", of=images)
    text = "read pictures while they are trained on (default: where they would take more than 4 GiB in memory)"
    row(where, "stream", None, text, of=images)
    text = "processes that decode a stream (default: the cores to spare, 8 at most)"
    row(where, "workers", whole(0, 1024), text, of=images)
    row(where, "columns", several(name), "of a table, those to model (default: all)", "A[,B...]", of=tables)
    row(where, "context", several(name), "columns of a table to condition the others on", "A[,B...]", of=tables)
    text = "columns that are angles, of period 2 pi or another, as in phi,hour=24: for --model nsf"
    row(where, "circular", several(name), text, "A[=P],...", of=tables)
    text = "whether the first line of a CSV file holds names (default: if one of its cells is no number)"
    row(where, "header", None, text, of=tables)
    text = "rows of a table that lack a value: an error, or left out"
    choice(where, "missing", text, ("refuse", "drop"), default="refuse", of=tables)
    row(where, "out", name, "run folder (default: the next free runs/<data>-<n>)", "DIR")
    row(where, "resume", name, "go on with the run in this folder, exactly where it stopped", "RUN", file=False)
    choice(where, "preset", "the options of a published model, see docs/training.md", tuple(PRESETS))

    model = "model"
    text = "the kind of flow (default: glow for images, nsf for tables)"
    choice(model, "model", text, ("glow", *MODELS))
    row(model, "levels", whole(1), "levels (default: by image size, 3 at most)", of=images)
    text = "Glow steps of every level, or of each; for tables hidden layers of the networks"
    row(model, "depth", depth, text, "N[,N...]", default=shape["depth"], table=2)
    row(model, "width", whole(1), "of the networks", default=shape["width"])
    row(model, "dropout", number(0, 1), "in the networks", "P", default=shape["dropout"], table=0.0)
    row(model, "layers", whole(1), "of a table's flow (default: 5, realnvp 8)", of=tables)
    row(model, "bins", whole(2, 64), "of nsf's splines", default=8, of=tables)
    text = "standard deviations to either side of a column's mean where nsf's splines act"
    row(model, "bound", number(0, above=True), text, "X", default=3.0, of=tables)
    choice(model, "dropout_of", "what is dropped", ("element", "channel"), default=shape["dropout_of"], of=images)
    row(model, "kernel", whole(1), "side of the networks' first convolution, odd", default=shape["kernel"], of=images)
    row(model, "last_kernel", whole(1), "of the last one (default: as --kernel)", of=images)
    choice(model, "scale_map", "of the couplings", SCALE_MAPS, default=shape["scale_map"], of=images)
    choice(model, "order", "of the couplings", ("scale_first", "shift_first"), default=shape["order"], of=images)
    kept = ("stored", "reversible")
    text = "what training keeps: all activations, or each level's output, from which it rebuilds them"
    choice(model, "memory", text, kept, default=shape["memory"], of=images)
    noise = ("uniform", "variational")
    text = "how images become continuous"
    choice(model, "dequantization", text, noise, default=shape["dequantization"], of=images)
    row(model, "classes", None, "condition on the class of each image", default=False, of=images)
    row(model, "class_width", whole(1), "numbers that a class becomes", default=shape["class_width"], of=images)

    how = "training"
    kinds: dict[str, tuple[Any, str, str]] = {
        "steps": (whole(1), "optimiser steps in all; on --resume, more stretch the schedule to the new end", "N"),
        "batch_size": (whole(1), "images or rows per step", "N"),
        "accumulate": (whole(1), "parts in which a step's batch is gone through, for less memory", "N"),
        "optimizer": (OPTIMIZERS, "torch's own", None),
        "lr": (number(0, above=True), "largest learning rate", "X"),
        "schedule": (SCHEDULES, "of the learning rate", None),
        "lr_end": (number(0, 1, up_to=True), "share of --lr left at the last step", "X"),
        "warmup": (whole(0), "steps over which the learning rate rises", "N"),
        "betas": (several(number(0, 1), 2), "of the optimiser", "X,X"),
        "weight_decay": (number(0), "of the networks' weights", "X"),
        "clip": (number(0), "largest gradient norm, 0 for any", "X"),
        "ema": (number(0, 1), "averaging of the weights, 0 for none", "X"),
        "precision": (PRECISIONS, "of the networks; all else is float32", None),
        "flip": (None, "mirror each training image left-right with probability one half", None),
        "validate_every": (whole(1), "steps between validations", "N"),
        "validation_draws": (whole(1), "dequantisation draws per image or row in validation", "N"),
        "patience": (whole(1), "validations without a new best that end the run", "N"),
        "log_every": (whole(1), "steps per line of metrics.jsonl", "N"),
        "seed": (whole(0), "of weights, data order, noise and dropout", "N"),
    }
    words = {"lr_end": "0, exponential 0.01"}
    for option, (kind, text, metavar) in kinds.items():
        rest: dict[str, Any] = {
            "default": recipe[option],
            "shown": words.get(option),
            "table": _TABLE_RECIPE.get(option),
        }
        rest["of"] = images if option == "flip" else None
        if isinstance(kind, tuple):
            choice(how, option, text, kind, **rest)
        else:
            row(how, option, kind, text, metavar, **rest)
    choice(how, "progress", "how to show it", PROGRESS, default="auto", shown="auto: a bar on a terminal, else lines")
    row(
        how, "tensorboard", None, "also write the metrics, and samples of each new best, for TensorBoard", default=False
    )

    machine = "machine"
    row(machine, "device", device, "cpu, cuda, cuda:1 (default: cuda if here)", "NAME")
    row(machine, "threads", whole(1, most_threads()), "CPU threads (default: PyTorch's own choice)")
    text = "replay each training step on a GPU as one captured graph"
    row(machine, "cuda_graph", None, text, default=True)
    return {option.name: option for option in rows}


TRAIN: dict[str, Option] = _table()
# Options of `train` by the argument of Glow that they set.
GLOW_ARGUMENTS = {
    **{field: field for field in asdict(GlowShape())},
    "depth": "steps",
    "width": "hidden",
}


# --- what holds in the end ------------------------------------------------------------------------------------------


def merged(given: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for: the command line's word before the file's, and that before the preset's.

    Options that nobody gave, and those given as None, are left out; but for a new run on a table those are in whose
    defaults are not what they are for images.
    """
    layers = {**file, **given}
    layers = {**PRESETS.get(layers.get("preset") or "", {}), **layers}
    if layers.get("resume") is None and is_table(layers.get("data"), layers.get("model")):
        layers = {**{option.name: option.table for option in TRAIN.values() if option.table is not None}, **layers}
    return {option: value for option, value in layers.items() if value is not None}


def foreign(options: Any, of: str) -> list[str]:
    """The flags of options that are only for the other kind of data than ``of`` and ask for something."""
    others = (option for option in TRAIN.values() if option.of not in (None, of))
    return [option.flag for option in others if getattr(options, option.name) not in (None, option.default)]


def as_text(asked: Mapping[str, Any], form: str) -> str:
    """All options with the values they come to, as a file that ``--config`` reads: ``form`` is "yaml" or "json"."""
    kept = [option for option in TRAIN.values() if option.file]
    values = {option.name: asked.get(option.name, option.default) for option in kept}
    if form == "json":
        return json.dumps(values, indent=2, ensure_ascii=False)
    lines, group = [], None
    for option in kept:
        if option.group != group:
            lines += [f"{'' if group is None else chr(10)}# {option.group}"]
            group = option.group
        lines.append(f"{option.name}: {_yaml(values[option.name])}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """JSON is YAML, but for numbers such as 1e-05: YAML 1.1 wants a dot in them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text
