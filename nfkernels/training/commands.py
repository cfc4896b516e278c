"""`nfkernels train`, once its options are known."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from . import image_task, session
from .as_json import print_json
from .checkpoint import read_facts
from .data.image_data import need
from .distributed import Ranks, device_of, launched, remember, remembered, started
from .errors import TrainingError
from .loop import FitResult, fit, resumed_recipe
from .progress import clock, reporter, unread_is_fine, wish_of
from .recipe import Recipe
from .run_folder import RunFolder, check_config, next_run
from .step import check_recipe
from .tables import task as table_task
from .tables.kind import is_table, is_table_config
from .tensorboard import need_tensorboard

if TYPE_CHECKING:
    from ..nn import Flow


def train(options: argparse.Namespace) -> int:
    """Trains as ``options`` say: every option of the table by name, None where it was not asked for, and ``json``."""
    task, old = _task(options)
    wanted = {**task.needs, **({"tqdm": "the progress bar"} if options.progress == "bar" else {})}
    for module, what in wanted.items():
        need(module, what)  # said now rather than after the training
    if options.tensorboard:
        need_tensorboard()
    began = time.monotonic()
    device = device_of(launched(), session.pick_device(options.device))
    with started(device) as ranks:
        folder, config, parts, flow, result = _fit(options, task, old, device, ranks)
    if not ranks.is_main:
        return 0 if result.signal is None else 128 + result.signal
    outcome = _outcome(result, folder)
    if result.stopped == "signal":
        if options.json:
            print_json(outcome)
        else:
            with unread_is_fine(sys.stdout):
                _print_stopped(result, folder)
        return 128 + result.signal

    told = None if options.json else lambda: clock(time.monotonic() - began)
    outcome |= task.finish(config, parts, flow, result, folder, device, told)
    if options.json:
        print_json(outcome | {"seconds": time.monotonic() - began})
    return 0


def _task(options: argparse.Namespace) -> tuple[ModuleType, RunFolder | None]:
    """What is particular to the kind of data, and the folder of the run to resume.

    ``image_task`` and ``tables.task`` have the same functions: ``new_run``, ``old_run``, ``build``, ...
    """
    if options.resume is None:
        return (table_task if is_table(options.data, options.model) else image_task), None
    old = session.checkpoint_of(options.resume)
    return (table_task if is_table_config(read_facts(old.checkpoint).get("config")) else image_task), old


def _fit(
    options: argparse.Namespace, task: ModuleType, old: RunFolder | None, device: torch.device, ranks: Ranks
) -> tuple[RunFolder, dict[str, Any], Any, Flow, FitResult]:
    """The training itself, on every rank alike."""
    # Processes that torchrun has started again go on with the run that their predecessors began.
    begun = remembered(ranks, "run") if options.resume is None else None
    if begun is not None and RunFolder(begun).checkpoint.exists():
        old = RunFolder(begun)
    changes = _recipe_changes(options)
    config, parts = task.new_run(options) if old is None else _old_run(options, task, old)
    torch.manual_seed(changes.get("seed", Recipe.seed))
    flow = task.build(config).to(device)
    training, validation = task.samples(parts)
    try:  # before there is a folder for it
        recipe = Recipe(**changes) if old is None else resumed_recipe(old, None, changes)
        check_recipe(recipe, flow, task.count(parts), ranks=ranks.world)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    folder = old
    if folder is None:
        path = begun or options.out
        with ranks.together():
            if ranks.is_main:
                path = path or next_run(re.sub(r"[^\w.+-]+", "_", task.name(parts)) or "run")
                RunFolder(path).begin()
        folder = RunFolder(ranks.from_main(str(path)))
        remember(ranks, "run", str(folder.path))
    if ranks.is_main and not options.json:
        with unread_is_fine(sys.stdout):
            task.print_head(config, parts, flow, device, folder, ranks)
    progress = reporter(wish_of(options.progress, json=options.json), task.unit)
    result = fit(
        flow,
        training,
        validation=validation,
        run=folder.path,
        resume=old is not None,
        progress=task.board(folder, device, progress, parts) if options.tensorboard and ranks.is_main else progress,
        signals=True,
        config=config,
        cuda_graph=options.cuda_graph is not False,
        **changes,
    )
    return folder, config, parts, flow, result


def _old_run(options: argparse.Namespace, task: ModuleType, folder: RunFolder) -> tuple[dict[str, Any], Any]:
    """The configuration and data of a run to resume; an option that would make it another run is refused."""
    config = read_facts(folder.checkpoint).get("config")
    if not isinstance(config, dict) or not {"data", "model"} <= config.keys():
        raise TrainingError(
            f"{folder.path} was not written by `nfkernels train`: resume it with nfkernels.training.fit"
        )
    if options.out is not None and options.resume is not None:
        raise TrainingError("--out: a resumed run stays in its folder; leave --out away")
    check_config(config, folder.checkpoint)
    resumed_recipe(folder, None, _recipe_changes(options), lambda name: "--" + name.replace("_", "-"))
    return task.old_run(options, config, folder)


def _recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that were asked for. ``TrainingError`` for two that do not go together."""
    changes = {name: getattr(options, name) for name in Recipe.names() if getattr(options, name) is not None}
    if options.resume is None:  # else the run's own fields come in between
        try:
            Recipe(**changes)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    return changes


def _outcome(result: FitResult, folder: RunFolder) -> dict[str, Any]:
    """What ``--json`` says of every run, whatever its data."""
    return {
        "run": folder.path,
        "stopped": result.stopped,
        "signal": None if result.signal is None else signal.Signals(result.signal).name,
        "steps": result.step,
        "unit": result.unit,
        "best_validation": result.best,
        "best_step": None if result.best is None else result.best_step,
        "validation": result.validation,
        "warnings": result.warnings,
    }


def _print_stopped(result: FitResult, folder: RunFolder) -> None:
    name = "Ctrl-C" if result.signal == signal.SIGINT else signal.Signals(result.signal).name
    print(f"\nstopped by {name} after {session.many(result.step, 'step')}; everything is saved. To go on:")
    print(f"  nfkernels train --resume {folder.path}", flush=True)
