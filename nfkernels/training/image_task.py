"""`nfkernels train` on images: what is particular to them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, plot
from . import session
from .data import ImageData, ImageStream
from .distributed import Ranks
from .errors import TrainingError
from .evaluation import Evaluation, independent_pixel_bits, uniform_bits
from .evaluation import evaluate as measure
from .finished import draw
from .image_file import write_grid
from .loop import FitResult
from .options import GLOW_ARGUMENTS, TRAIN, foreign
from .presets import SOURCES
from .progress import Reporter, unread_is_fine
from .recipe import GlowShape
from .run_folder import RunFolder
from .tensorboard import Board

if TYPE_CHECKING:
    from ..nn import ImageFlow

Parts = tuple[ImageData | ImageStream, ImageData, ImageData]  # train, validation, test

needs = {"matplotlib": "the loss curve", "PIL": "the sample grid"}
unit = "images"

_SAMPLES_DRAWN = 64
_TEST_DRAWS = 20


def new_run(options: argparse.Namespace) -> tuple[dict[str, Any], Parts]:
    wrong = foreign(options, "images")
    if wrong:
        source = options.data or "digits"
        told = f"--model {options.model} is for images" if options.model else f"{source} is not taken for a table"
        raise TrainingError(f"{wrong[0]} is for tables, and {told}: expected .csv, .tsv, .txt, .npy [N, D] or .parquet")
    if options.data is None and options.preset in SOURCES:
        raise TrainingError(f"--preset {options.preset} needs images: {SOURCES[options.preset]}")
    data: dict[str, Any] = {
        "source": session.absolute("digits" if options.data is None else options.data),
        "size": options.size,
        "channels": options.channels,
        "bits": options.n_bits,
        "stream": options.stream,
        "split_seed": session.SPLIT_SEED,
    }
    parts = session.run_data({"data": data}, workers=options.workers)
    data |= {"name": parts[0].name, "images": [len(part) for part in parts]}
    data["classes"] = None if parts[0].classes is None else list(parts[0].classes)
    shape = {name: getattr(options, name) for name in GLOW_ARGUMENTS if getattr(options, name) is not None}
    model = session.describe_glow(parts[0], GlowShape(**shape), conditional=bool(options.classes))
    session.set_threads(options.threads)
    versions = {"nfkernels": __version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "data": data, "model": model}, parts


def old_run(options: argparse.Namespace, config: dict[str, Any], folder: RunFolder) -> tuple[dict[str, Any], Parts]:
    """The configuration and data of a run to resume; an option that would make it another run is refused."""
    wrong = foreign(options, "images")
    if wrong:
        raise TrainingError(f"{wrong[0]} is for tables, and {folder.path} is a run on images")
    data, model = config["data"], config["model"]
    missing = {"shape", "levels", "steps", "hidden", "classes"} - model.keys()
    if missing:
        raise TrainingError(f"{folder.checkpoint} is damaged: its model has no {', '.join(sorted(missing))}")
    # What the run's configuration does not tell is older than the option, and so its default.
    asked = {
        TRAIN[option].flag: (getattr(options, option), model.get(name, TRAIN[option].default))
        for option, name in GLOW_ARGUMENTS.items()
    }
    asked["--model"] = (options.model, "glow")
    asked["--classes"] = (options.classes, bool(model.get("classes")))
    asked["--channels"] = (options.channels, data.get("channels"))
    asked["--size"] = (options.size, data.get("size"))
    asked["--stream"] = (options.stream, data.get("stream"))
    asked["--n-bits"] = (options.n_bits, data.get("bits"))
    refuse_changes(asked)
    if options.data is not None:  # the data may have moved; the checkpoint knows whether it is the same
        data = {**data, "source": session.absolute(options.data)}
    # Sums run in another order on another number of threads: the run's own, unless told otherwise.
    session.set_threads(options.threads or config.get("threads"))
    parts = session.run_data({"data": data}, may_have_moved=options.data is None, workers=options.workers)
    return {**config, "data": data}, parts


def refuse_changes(asked: dict[str, tuple[Any, Any]]) -> None:
    """``TrainingError`` for the first option whose wish is not what the run to resume has; a wish of None is none."""
    for option, (wish, has) in asked.items():
        wish = list(wish) if isinstance(wish, tuple) else wish
        if wish is not None and wish != has:
            raise TrainingError(
                f"{_differs(option, wish, has)}: a resumed run keeps its model, data and recipe; only --steps and "
                "--patience may change"
            )


def _differs(option: str, wish: Any, has: Any) -> str:
    if wish is True:
        return f"the run has no {option}"
    if wish is False:
        return f"the run has {option}"
    by = "x" if option == "--size" else ","
    wish, has = (by.join(map(str, value)) if isinstance(value, list) else value for value in (wish, has))
    none = has is None or has == ""
    return f"{option} {wish}: the run has none" if none else f"{option} {wish} differs from the run's {has}"


def count(parts: Parts) -> int:
    return len(parts[0])


def name(parts: Parts) -> str:
    return parts[0].name


def build(config: dict[str, Any]) -> ImageFlow:
    return session.build_glow(config["model"])


def samples(parts: Parts) -> tuple[ImageData | ImageStream, ImageData]:
    """What ``fit`` trains on and validates with."""
    return parts[0], parts[1]


def board(folder: RunFolder, device: torch.device, progress: Reporter, parts: Parts) -> Board:
    return Board(folder, device, progress)


def print_head(
    config: dict[str, Any], parts: Parts, flow: ImageFlow, device: torch.device, folder: RunFolder, ranks: Ranks
) -> None:
    model = config["model"]
    training, validation, test = parts
    depth, height, width = training.image_shape
    colour = {1: "grey", 3: "RGB"}.get(depth, f"{depth} channels")
    streamed = " as a stream" if isinstance(training, ImageStream) else ""
    classes = f", {model['classes']} classes" if model["classes"] else ""
    parameters = sum(p.numel() for p in flow.parameters())
    counts = model["steps"]
    steps = session.many(counts, "step") if isinstance(counts, int) else f"{', '.join(map(str, counts))} steps"
    threads = f", {session.many(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    threads += f", in {ranks.world} processes" if ranks.world > 1 else ""
    print(
        f"data   {training.name}: {session.many(len(training), 'image')} to train on{streamed}, "
        f"{len(validation)} for validation, {len(test)} for the test "
        f"({height} x {width}, {colour}, {training.grey_levels} levels)\n"
        f"model  Glow: {session.many(model['levels'], 'level')} of {steps}, width {model['hidden']}"
        f"{classes}; {parameters:,} parameters, on {device}{threads}\n"
        f"run    {folder.path} (Ctrl-C saves and stops)",
        flush=True,
    )


def finish(
    config: dict[str, Any],
    parts: Parts,
    flow: ImageFlow,
    result: FitResult,
    folder: RunFolder,
    device: torch.device,
    duration: Callable[[], str] | None,
) -> dict[str, Any]:
    """The test, the pictures and what there is to say at the end; nothing is printed without ``duration``."""
    training, validation, test = parts
    precision = session.precision_of(folder.read_config())
    with session.using(folder.path), session.computing(precision, device):
        outcome = measure(flow, test, draws=_TEST_DRAWS)
        samples = draw(flow, _SAMPLES_DRAWN, session.class_names(flow, config), None, 1.0, 0)
    uniform = uniform_bits(training.grey_levels)
    # Of a stream nobody counts the pixels: that takes a pass over all its pictures.
    pixels = None if isinstance(training, ImageStream) else independent_pixel_bits(training, validation, test)
    entry = {"test_bpd": outcome.mean, "test_standard_error": outcome.standard_error}
    entry |= {} if pixels is None else {"independent_pixels_bpd": pixels.mean}
    entry |= {"uniform_bpd": uniform}
    folder.log({"step": result.step, **entry})
    baselines = {} if pixels is None else {"independent pixels": pixels.mean}
    curve = plot.training_curve(
        result.history,
        baselines=baselines | {"uniform": uniform},
        best=None if result.best is None else (result.best_step, result.best),
        title=f"{training.name}: {outcome.mean:.3f} bits per dimension on the test part",
    )
    plot.save(curve, folder.loss)
    write_grid(folder.samples, samples, grey_levels=flow.grey_levels)
    if duration is not None:
        with unread_is_fine(sys.stdout):
            _print_result(result, outcome, pixels, uniform, folder, duration())
    return entry | {"test_images": outcome.samples, "written": written(folder, folder.samples)}


def written(folder: RunFolder, picture: Path) -> list[Path]:
    """The files of a run that has ended, those to look at first in front."""
    return [picture, folder.loss, folder.model, folder.checkpoint, folder.metrics, folder.timing, folder.config]


def _print_result(
    result: FitResult, outcome: Evaluation, pixels: Evaluation | None, uniform: float, folder: RunFolder, duration: str
) -> None:
    early = " (stopped early: validation got no better)" if result.stopped == "early" else ""
    print(f"\n{session.many(result.step, 'step')}{early}, {duration}", end="")
    if result.best is not None:
        print(f"; best validation {result.best:.3f} at step {result.best_step}, last {result.validation:.3f}", end="")
    for sentence in result.warnings:
        print(f"\nwarning: {sentence}", end="")
    counted = "" if pixels is None else f"  independent pixels  {pixels.mean:.3f} +- {pixels.standard_error:.3f}\n"
    print(
        f"\n\nbits per dimension on {session.many(outcome.samples, 'test image')}, lower is better\n"
        f"  this flow           {outcome.mean:.3f} +- {outcome.standard_error:.3f}   "
        f"(mean of {outcome.draws} dequantisation draws; standard error over images)\n"
        f"{counted}"
        f"  uniform             {uniform:.3f}\n"
        f"\nin {folder.path}: {', '.join(file.name for file in written(folder, folder.samples))}\n"
        f"\nnext\n"
        f"  nfkernels sample {folder.path} --temperatures 0.5,0.7,0.9,1.0\n"
        f"  nfkernels interpolate {folder.path}\n"
        f"  nfkernels evaluate {folder.path}",
        flush=True,
    )
