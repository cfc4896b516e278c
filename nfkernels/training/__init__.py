"""Training flows: data, the loop, checkpoints, evaluation and pictures.

``fit`` trains any flow and is what the command line itself uses; ``load_images`` and ``split`` read image sets,
``load_table`` tables.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batches
    from .data import DataError, ImageData, ImageStream, load_images, split
    from .errors import TrainingError
    from .evaluation import Evaluation, evaluate, independent_pixel_bits, round_trip_error, uniform_bits
    from .loop import FitResult, Progress, fit
    from .recipe import GlowShape, Recipe, auto_levels
    from .run_folder import RunFolder, next_run
    from .tables.columns import load_table

# Name -> module: each is imported at first use, so that the command line can print its help without torch.
_HOMES = {
    "Batches": "batches",
    "DataError": "data",
    "Evaluation": "evaluation",
    "FitResult": "loop",
    "GlowShape": "recipe",
    "ImageData": "data",
    "ImageStream": "data",
    "Progress": "loop",
    "Recipe": "recipe",
    "RunFolder": "run_folder",
    "TrainingError": "errors",
    "auto_levels": "recipe",
    "evaluate": "evaluation",
    "fit": "loop",
    "independent_pixel_bits": "evaluation",
    "load_images": "data",
    "load_table": "tables.columns",
    "next_run": "run_folder",
    "round_trip_error": "evaluation",
    "split": "data",
    "uniform_bits": "evaluation",
}
__all__ = [
    "Batches",
    "DataError",
    "Evaluation",
    "FitResult",
    "GlowShape",
    "ImageData",
    "ImageStream",
    "Progress",
    "Recipe",
    "RunFolder",
    "TrainingError",
    "auto_levels",
    "evaluate",
    "fit",
    "independent_pixel_bits",
    "load_images",
    "load_table",
    "next_run",
    "round_trip_error",
    "split",
    "uniform_bits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
