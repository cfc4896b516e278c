"""`nfkernels train | sample | evaluate`: what each does once its options are parsed."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from .._atomic import atomic_write
from . import session
from .checkpoint import read_facts
from .data import ImageData, load_images
from .data.image_data import need
from .errors import TrainingError
from .evaluation import Evaluation, independent_pixel_bits, round_trip_error, uniform_bits
from .evaluation import evaluate as measure
from .loop import FitResult, fit, resumed_recipe
from .plots import image_grid, loss_curve
from .progress import clock, unread_is_fine
from .recipe import GlowShape, Recipe
from .run_folder import RunFolder, check_config, next_run

if TYPE_CHECKING:
    from ..nn import ImageFlow

Parts = tuple[ImageData, ImageData, ImageData]  # train, validation, test

# Options of `train` by the argument of Glow that they set.
_MODEL_OPTIONS = {"levels": "levels", "depth": "steps", "width": "hidden", "dropout": "dropout"}
_SAMPLES_DRAWN = 64
_SAMPLES_AT_ONCE = 256
_TEST_DRAWS = 20


# --- train ----------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    wanted = {"matplotlib": "the loss curve", "PIL": "the sample grid"}
    if options.progress == "bar":
        wanted["tqdm"] = "the progress bar"
    for module, what in wanted.items():
        need(module, what)  # said now rather than after the training
    began = time.monotonic()
    device = session.pick_device(options.device)
    old = None if options.resume is None else session.checkpoint_of(options.resume)
    config, parts = _new_run(options) if old is None else _old_run(options, old)
    training, validation, test = parts
    changes = _recipe_changes(options)
    torch.manual_seed(changes.get("seed", Recipe.seed))
    flow = session.build_glow(config["model"]).to(device)
    if old is not None:
        folder = old
    elif options.out is not None:
        folder = RunFolder(options.out)
    else:
        folder = RunFolder(next_run(re.sub(r"[^\w.+-]+", "_", training.name) or "run"))
    if old is None:
        folder.begin()
    with unread_is_fine(sys.stdout):
        _print_head(config["model"], parts, flow, device, folder)

    result = fit(
        flow,
        training,
        validation=validation,
        run=folder.path,
        resume=old is not None,
        progress=options.progress != "none" and options.progress,
        signals=True,
        config=config,
        **changes,
    )
    if result.stopped == "signal":
        with unread_is_fine(sys.stdout):
            _print_stopped(result, folder)
        return 128 + result.signal

    with session.using(folder.path):
        outcome = measure(flow, test, draws=_TEST_DRAWS)
        samples = draw(flow, _SAMPLES_DRAWN, session.class_names(flow, config), None, 1.0, 0)
    pixels = independent_pixel_bits(training, validation, test)
    uniform = uniform_bits(training.grey_levels)
    test_entry = {"step": result.step, "test_bpd": outcome.mean, "test_standard_error": outcome.standard_error}
    folder.log(test_entry | {"independent_pixels_bpd": pixels.mean, "uniform_bpd": uniform})
    loss_curve(
        folder.loss,
        result.history,
        baselines={"independent pixels": pixels.mean, "uniform": uniform},
        best=None if result.best is None else (result.best_step, result.best),
        title=f"{training.name}: {outcome.mean:.3f} bits per dimension on the test part",
    )
    image_grid(folder.samples, samples, grey_levels=flow.grey_levels)
    with unread_is_fine(sys.stdout):
        _print_result(result, outcome, pixels, uniform, folder, clock(time.monotonic() - began))
    return 0


def _recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Recipe.names() if getattr(options, name, None) is not None}


def _new_run(options: argparse.Namespace) -> tuple[dict[str, Any], Parts]:
    data: dict[str, Any] = {
        "source": _absolute("digits" if options.data is None else options.data),
        "size": options.size,
        "channels": options.channels,
        "split_seed": session.SPLIT_SEED,
    }
    parts = session.run_data({"data": data})
    data |= {"name": parts[0].name, "images": [len(part) for part in parts]}
    data["classes"] = None if parts[0].classes is None else list(parts[0].classes)
    shape = {name: getattr(options, name) for name in _MODEL_OPTIONS if getattr(options, name) is not None}
    model = session.describe_glow(parts[0], GlowShape(**shape), conditional=options.classes)
    set_threads(options.threads)
    versions = {"nfkernels": __version__, "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), "data": data, "model": model}, parts


def _old_run(options: argparse.Namespace, folder: RunFolder) -> tuple[dict[str, Any], Parts]:
    """The configuration and data of a run to resume; an option that would make it another run is refused."""
    config = read_facts(folder.checkpoint).get("config")
    if not isinstance(config, dict) or not {"data", "model"} <= config.keys():
        raise TrainingError(
            f"{folder.path} was not written by `nfkernels train`: resume it with nfkernels.training.fit"
        )
    if options.out is not None:
        raise TrainingError("--out: a resumed run stays in its folder; leave --out away")
    check_config(config, folder.checkpoint)
    data, model = config["data"], config["model"]
    missing = {"shape", "levels", "steps", "hidden", "classes"} - model.keys()
    if missing:
        raise TrainingError(f"{folder.checkpoint} is damaged: its model has no {', '.join(sorted(missing))}")
    asked = {f"--{option}": (getattr(options, option), model.get(name)) for option, name in _MODEL_OPTIONS.items()}
    asked["--depth"] = (list(options.depth) if isinstance(options.depth, tuple) else options.depth, model.get("steps"))
    asked["--classes"] = (options.classes or None, bool(model.get("classes")))
    asked["--channels"] = (options.channels, data.get("channels"))
    asked["--size"] = (options.size, data.get("size"))
    for option, (wish, has) in asked.items():
        if wish is not None and wish != has:
            by = "x" if option == "--size" else ","
            wish, has = (by.join(map(str, v)) if isinstance(v, list) else v for v in (wish, has))
            none = f"{option} {wish}: the run has none" if wish is not True else f"the run has no {option}"
            differs = f"{option} {wish} differs from the run's {has}" if has else none
            raise TrainingError(
                f"{differs}: a resumed run keeps its model, data and recipe; only --steps and --patience may change"
            )
    resumed_recipe(folder, None, _recipe_changes(options), lambda name: "--" + name.replace("_", "-"))
    if options.data is not None:  # the data may have moved; the checkpoint knows whether it is the same
        data = {**data, "source": _absolute(options.data)}
    # Sums run in another order on another number of threads: the run's own, unless told otherwise.
    set_threads(options.threads or config.get("threads"))
    return {**config, "data": data}, session.run_data({"data": data}, may_have_moved=options.data is None)


def _print_head(model: dict[str, Any], parts: Parts, flow: ImageFlow, device: torch.device, folder: RunFolder) -> None:
    training, validation, test = parts
    depth, height, width = training.images.shape[1:]
    colour = {1: "grey", 3: "RGB"}.get(depth, f"{depth} channels")
    classes = f", {model['classes']} classes" if model["classes"] else ""
    parameters = sum(p.numel() for p in flow.parameters())
    counts = model["steps"]
    steps = many(counts, "step") if isinstance(counts, int) else f"{', '.join(map(str, counts))} steps"
    threads = f", {many(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    print(
        f"data   {training.name}: {many(len(training), 'image')} to train on, {len(validation)} for validation, "
        f"{len(test)} for the test ({height} x {width}, {colour}, {training.grey_levels} levels)\n"
        f"model  Glow: {many(model['levels'], 'level')} of {steps}, width {model['hidden']}"
        f"{classes}; {parameters:,} parameters, on {device}{threads}\n"
        f"run    {folder.path} (Ctrl-C saves and stops)",
        flush=True,
    )


def _print_result(
    result: FitResult, outcome: Evaluation, pixels: Evaluation, uniform: float, folder: RunFolder, duration: str
) -> None:
    early = " (stopped early: validation got no better)" if result.stopped == "early" else ""
    print(f"\n{many(result.step, 'step')}{early}, {duration}", end="")
    if result.best is not None:
        print(f"; best validation {result.best:.3f} at step {result.best_step}, last {result.validation:.3f}", end="")
    print(
        f"\n\nbits per dimension on {many(outcome.samples, 'test image')}, lower is better\n"
        f"  this flow           {outcome.mean:.3f} +- {outcome.standard_error:.3f}   "
        f"(mean of {outcome.draws} dequantisation draws; standard error over images)\n"
        f"  independent pixels  {pixels.mean:.3f} +- {pixels.standard_error:.3f}\n"
        f"  uniform             {uniform:.3f}\n"
        f"\nin {folder.path}: {folder.samples.name}, {folder.loss.name}, {folder.model.name}, "
        f"{folder.checkpoint.name}, {folder.metrics.name}, {folder.timing.name}, {folder.config.name}\n"
        f"\nnext\n"
        f"  nfkernels sample {folder.path} --temperature 0.7\n"
        f"  nfkernels evaluate {folder.path}",
        flush=True,
    )


def _print_stopped(result: FitResult, folder: RunFolder) -> None:
    name = "Ctrl-C" if result.signal == signal.SIGINT else signal.Signals(result.signal).name
    print(f"\nstopped by {name} after {many(result.step, 'step')}; everything is saved. To go on:")
    print(f"  nfkernels train --resume {folder.path}", flush=True)


# --- sample ---------------------------------------------------------------------------------------------------------


def sample(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    flow, folder, config = session.open_run(options.run, session.pick_device(options.device))
    names = session.class_names(flow, config)
    label = None if options.label is None else session.class_index(options.label, names)
    out = Path(options.out) if options.out is not None else folder.samples if folder else Path("samples.png")
    for file in (out, options.npz and Path(options.npz)):  # seen now rather than after the sampling
        if file is not None:
            _check_can_be_written(file)
    with session.using(options.run):
        images = draw(flow, options.count, names, label, options.temperature, options.seed)
    image_grid(out, images, grey_levels=flow.grey_levels)
    of_class = "" if label is None else f" of class {names[label]}"
    print(f"{many(options.count, 'sample')}{of_class} at temperature {options.temperature:g}: {out}")
    if options.npz is not None:
        numpy = need("numpy", "writing .npz files")
        with atomic_write(options.npz) as temporary, open(temporary, "wb") as file:
            numpy.savez_compressed(file, images=images.permute(0, 2, 3, 1).numpy())
        print(f"the same as uint8 [N, H, W, C], 0 to {flow.grey_levels - 1}: {options.npz}")
    return 0


def draw(
    flow: ImageFlow, count: int, names: list[str] | None, label: int | None, temperature: float, seed: int
) -> Tensor:
    """uint8 images `[count, C, H, W]` on the CPU; of a conditional flow (``names``) one class, or all in turn."""
    device = next(flow.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    how = {"temperature": temperature, "generator": generator, "batch_size": _SAMPLES_AT_ONCE}
    if names is None:
        return flow.sample(count, **how).cpu()
    labels = torch.arange(count) % len(names) if label is None else torch.full((count,), label)
    return flow.sample(1, labels.to(device), **how)[0].cpu()


# --- evaluate -------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    flow, _, config = session.open_run(options.run, session.pick_device(options.device))
    own = (config.get("data") or {}).get("source")
    source = own if options.data is None else _absolute(options.data)
    if source is None:
        raise TrainingError(f"{options.run} does not say what data it was trained on: give --data")
    if source == own:
        data, part = session.run_data(config, may_have_moved=True)[2], "test part"
    else:
        depth, height, width = flow.event_shape
        data = load_images(source, size=(height, width), channels=depth)
        data, part = (data, "all images") if data.test is None else (data.test, "test part")
    if data.grey_levels != flow.grey_levels:
        raise TrainingError(
            f"{data.name} has {data.grey_levels} grey levels and the flow {flow.grey_levels}: bits per dimension "
            "of one mean nothing for the other"
        )
    names = session.class_names(flow, config)
    if names is not None and data.classes is not None and list(data.classes) != names[: len(data.classes)]:
        raise TrainingError(
            f"the classes of {data.name} ({_listed(data.classes)}) are not those of the flow ({_listed(names)}): "
            "expected the same names, in the same order"
        )
    with session.using(options.run):
        outcome = measure(flow, data, draws=options.draws, seed=options.seed)
        largest = round_trip_error(flow, data, seed=options.seed)
    if options.json:
        facts = {"data": data.name, "part": part, "images": outcome.samples, "draws": outcome.draws}
        facts |= {"bits_per_dim": outcome.mean, "standard_error": outcome.standard_error}
        facts |= {"uniform_bits_per_dim": uniform_bits(flow.grey_levels), "round_trip_error": largest}
        print(json.dumps(facts, indent=2))
        return 0
    print(
        f"{data.name}, {part}, {many(outcome.samples, 'image')}\n"
        f"  bits per dimension  {outcome.mean:.3f} +- {outcome.standard_error:.3f}   "
        f"(mean of {many(outcome.draws, 'dequantisation draw')}; standard error over images)\n"
        f"  uniform             {uniform_bits(flow.grey_levels):.3f}\n"
        f"  round-trip error    {largest:.1e} at most (one grey level is {1 / flow.grey_levels:.1e})"
    )
    return 0


# --- small things ---------------------------------------------------------------------------------------------------


def set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


def many(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _absolute(source: str) -> str:
    """Where the data lies, whatever folder a later command is run in; ``"digits"`` is no path.

    What is not there stays as it was given: that is the name to complain about.
    """
    path = Path(source).expanduser()
    return source if source == "digits" or not path.exists() else str(path.absolute())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _check_can_be_written(file: Path) -> None:
    if not file.parent.is_dir():
        raise TrainingError(f"{file} cannot be written: there is no folder {file.parent}, make it first")
    if file.is_dir():
        raise TrainingError(f"{file} is a folder: give the name of a file in it")
    if not os.access(file.parent, os.W_OK):
        raise TrainingError(f"{file} cannot be written: you may not write in {file.parent}")
