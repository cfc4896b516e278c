"""The options of ``nfkernels demo`` in one table. Nothing here imports torch."""

from __future__ import annotations

from typing import Any

from ..._nearest import did_you_mean
from ..option import Option, device, name, whole
from ..options import PROGRESS
from ..recipe import most_threads

DENSITIES = ("moons", "rings", "checkerboard", "pinwheel")
VARIABLES = "change-of-variables"
NAMES = (*DENSITIES, VARIABLES)
MODELS = {"nsf": "NSF", "realnvp": "RealNVP", "maf": "MAF"}  # by their names in nfkernels.models


def demo_name(text: Any) -> str:
    if text in NAMES:
        return text
    raise ValueError(f"expected one of {', '.join(NAMES)}{did_you_mean(text, NAMES, '; ')}")


def _table() -> dict[str, Option]:
    model, training, where = "model", "training", "folder and machine"
    rows = (
        Option("model", model, "the kind of flow", choices=tuple(MODELS), default="nsf", metavar=None),
        Option("layers", model, "couplings, or autoregressive layers", whole(1, 64), 6),
        Option("width", model, "of their networks", whole(1, 4096), 64),
        Option("steps", training, "optimiser steps", whole(1), 1000),
        Option("batch_size", training, "points per step", whole(1, 2**20), 512),
        Option("seed", training, "of weights and points", whole(0), 0),
        Option("progress", training, "how to show it", choices=PROGRESS, default="auto", metavar=None,
               shown="auto: a bar on a terminal, else lines"),
        Option("out", where, "folder for the pictures (default: demo-<name>)", name, metavar="DIR"),
        Option("device", where, "cpu, cuda, cuda:1 (default: cuda if here)", device, metavar="NAME"),
        Option("threads", where, "CPU threads (default: PyTorch's own choice)", whole(1, most_threads())),
    )  # fmt: skip
    return {option.name: option for option in rows}


DEMO: dict[str, Option] = _table()
# What a demo that trains nothing has no use for.
OF_TRAINING = tuple(name for name in DEMO if name not in ("out", "threads"))
