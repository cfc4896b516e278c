"""``fit``: trains any flow on images or tensors. The command line uses exactly this."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from .checkpoint import read_facts
from .distributed import device_of, launched, started
from .errors import TrainingError
from .interrupt import Interrupt
from .progress import Reporter, reporter
from .recipe import Recipe
from .run_folder import RunFolder
from .samples import Data, as_samples, is_image_flow, unit_of
from .trainer import Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..nn import Flow
    from .recipe import RecipeChanges

# What a resumed run may be told anew; anything else would make it another run.
RESUMABLE = ("steps", "patience")
# Steps after which the time left is told.
_SETTLED = 10

Stopped = Literal["steps", "early", "signal", "callback"]


@dataclasses.dataclass
class Progress:
    """Where a run is, as reporters and callbacks see it. Losses are in ``unit``, ``"bits/dim"`` or ``"nats"``."""

    step: int
    steps: int
    unit: str
    loss: float | None = None  # mean over the steps since the last log
    validation: float | None = None  # latest
    best: float | None = None
    per_second: float | None = None  # samples trained on per second, validation and saving not counted
    seconds_left: float | None = None
    logged: bool = False  # this step brought a new loss
    validated: bool = False  # this step brought a new validation


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Args:
        step: steps done in all.
        stopped: ``"steps"`` (all done), ``"early"`` (patience ran out), ``"signal"`` or ``"callback"``.
        signal: the signal's number, where that stopped it.
        best: best validation loss, None without validation; the flow (and ``model.safetensors``) holds its weights.
        best_step: its step.
        validation: the latest validation loss.
        unit: of all losses, ``"bits/dim"`` or ``"nats"``.
        history: the entries of ``metrics.jsonl``.

    ``warnings`` are the sentences about what went wrong on the way, empty where nothing did: also in the history, under
    ``"warning"`` beside their ``"step"``, the kind of ``"fault"`` and the ``"layer"``.
    """

    step: int
    stopped: Stopped
    signal: int | None
    best: float | None
    best_step: int
    validation: float | None
    unit: str
    history: list[dict[str, Any]]

    @property
    def warnings(self) -> list[str]:
        return [entry["warning"] for entry in self.history if "warning" in entry]


def fit(
    flow: Flow,
    data: Data,
    *,
    validation: Data | None = None,
    recipe: Recipe | None = None,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool | str | Reporter = False,
    callback: Callable[[Progress], Any] | None = None,
    signals: bool = False,
    config: dict[str, Any] | None = None,
    cuda_graph: bool = True,
    **changes: Unpack[RecipeChanges],
) -> FitResult:
    """Trains ``flow`` by maximum likelihood, and leaves the best averaged weights in it.

    An image flow is trained on uint8 images in bits per dimension, each step with fresh dequantisation noise; any other
    flow on float samples in nats. Equal arguments on equal machines (thread count included) give equal runs, bit for
    bit; the caller's global random state is left as it was::

        train, validation, test = split(load_images("digits"), seed=0)
        flow = Glow((1, 8, 8), levels=2, steps=8, hidden=64, grey_levels=17)
        fit(flow, train, validation=validation, steps=1000, run="runs/mine", progress=True)

    Args:
        flow: any ``Flow``; moved to ``device``. ActNorm and the like start from 512 random samples of ``data``.
        data: an ImageData or ImageStream, samples `[N, *event]`, or a pair of samples and contexts `[N, ...]`. Labels
            of images are the context of a flow that has ``classes``.
        validation: likewise, but no stream; without it the latest averaged weights are kept and nothing stops early.
        recipe: how to train; single fields can be given by name instead or on top (``steps=1000, lr=1e-3``).
        run: folder for metrics, checkpoint and model (see ``RunFolder``), which must not hold a run yet; None keeps all
            in memory.
        resume: continue the run in the folder ``run`` bit for bit, with its own recipe, of which only ``steps`` and
            ``patience`` may change. ``flow`` and data must be built as they were. A finished run returns at once.
        device: None leaves the flow where it is.
        progress: False, True (a bar on a terminal, lines elsewhere), ``"bar"``, ``"lines"`` or a ``Reporter``.
        callback: called after every step; a true answer stops the run, which can then be resumed.
        signals: treat the first Ctrl-C or SIGTERM as a wish to save and stop (in the main thread); a second one ends
            the program at once.
        config: anything JSON-able, kept in ``config.json`` and the checkpoint beside the recipe.
        cuda_graph: on a CUDA device, capture the whole training step in a graph and replay it (and the flow's passes
            in validation): the same numbers without the time that launches take. Where that is impossible a warning
            says why, and training goes on without. Not for a flow whose forward depends on Python values that change
            from step to step: only tensors are read anew.
        **changes: fields of ``Recipe``.

    A training that goes wrong (a loss that explodes, scales that saturate, a level that is dead: see
    :func:`nfkernels.diagnostics.diagnose`) is told in a warning that names the layer; it is looked for at validations
    and where the loss or a step is bad, never in a step itself.

    Under torchrun all processes call this alike and train one flow together (see ``distributed``): ``batch_size`` is
    that of all of them, which each takes its share of, and all end with the same weights and the same result. Rank 0
    reports and writes. A callback is called on every rank; a true answer on any stops all.

    Raises:
        TrainingError: ten steps in a row without a finite loss; a checkpoint that is damaged or does not fit; a folder
            that already holds a run; a file that cannot be written, a full disk included (the previous checkpoint
            survives).
        DataError: data that cannot be used. ValueError or TypeError: a recipe that cannot.
    """
    unknown = changes.keys() - set(Recipe.names())
    if unknown:
        raise TypeError(f"fit() has no option {', '.join(sorted(unknown))}; a recipe has {', '.join(Recipe.names())}")
    if resume and run is None:
        raise TypeError("fit(resume=True) needs the folder of the run: run=...")
    folder = None if run is None else RunFolder(run)
    recipe = resumed_recipe(folder, recipe, changes) if resume else dataclasses.replace(recipe or Recipe(), **changes)
    if next(flow.parameters(), None) is None:
        raise TypeError("the flow has no parameters to train")
    samples = as_samples(data, flow, streams=True)
    held_out = None if validation is None else as_samples(validation, flow, "validation data")
    device = device_of(launched(), next(flow.parameters()).device if device is None else device)
    device = next(flow.to(device).parameters()).device

    with started(device) as ranks, _own_randomness(device), Interrupt(active=signals, tell=ranks.is_main) as interrupt:
        trainer = Trainer(flow, samples, held_out, recipe, folder, ranks, cuda_graph=cuda_graph)
        watch = reporter(ranks.is_main and progress, "images" if is_image_flow(flow) else "samples")
        settings = {**(config or {}), "recipe": dataclasses.asdict(recipe)}
        with trainer.explained():
            if resume:
                trainer.config = read_facts(folder.checkpoint)["config"] | settings
                trainer.load()
                with ranks.together():
                    if trainer.writes:
                        folder.write_config(trainer.config)
            else:
                trainer.config = settings
                trainer.begin()
            stopped, number = _run(trainer, watch, callback, interrupt)
        trainer.restore_best()
    best = trainer.best
    return FitResult(
        trainer.at, stopped, number, best.loss, best.step, best.latest, unit_of(flow), list(trainer.history)
    )


def _run(
    trainer: Trainer, watch: Reporter, callback: Callable[[Progress], Any] | None, interrupt: Interrupt
) -> tuple[Stopped, int | None]:
    """Steps until something ends the run: what, and the signal's number where it was one."""
    recipe = trainer.recipe
    now = Progress(trainer.at, recipe.steps, unit_of(trainer.flow), best=trainer.best.loss)
    now.validation = trainer.best.latest
    clock = _Clock(trainer)
    wish = False
    watch.start(trainer.at, recipe.steps)
    try:
        while True:
            # Looked at before each step, so that a resumed run stops where its predecessor did. Every rank sees the
            # same numbers, and hears of a signal or a wish that came to another: all stop at one step.
            if trainer.best.stale >= recipe.patience:
                return "early", None
            if trainer.at >= recipe.steps:
                return "steps", None
            number, wished = trainer.ranks.most([interrupt.requested or 0, int(wish)])
            if number or wished:
                if trainer.folder is not None and trainer.saved_at != trainer.at:
                    _checkpoint(trainer, now, validate=False)
                return ("signal", number) if number else ("callback", None)
            trainer.step()
            now.step, last = trainer.at, trainer.at >= recipe.steps
            now.logged = trainer.at % recipe.log_every == 0 or last
            now.validated = False
            if now.logged:
                now.loss = trainer.log()[trainer.loss_key]
                now.per_second, now.seconds_left = clock.read()
            wish = callback is not None and bool(callback(now))
            if trainer.at % recipe.validate_every == 0 or last:
                with clock.pause():
                    _checkpoint(trainer, now, validate=True)
            watch.step(now)
    finally:
        watch.stop()


def _checkpoint(trainer: Trainer, now: Progress, *, validate: bool) -> None:
    if trainer.validation is None:
        trainer.keep_averaged()
    elif validate:
        trainer.validate()
        now.validated, now.validation, now.best = True, trainer.best.latest, trainer.best.loss
    if trainer.best_weights is None:
        trainer.keep_averaged()
    if validate:
        trainer.look()
    trainer.save()


class _Clock:
    """Samples per second since the last reading, pauses left out; also written to ``timing.jsonl``."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._first, self._began = trainer.at, time.monotonic()
        self._step, self._since, self._paused = trainer.at, self._began, 0.0

    def read(self) -> tuple[float, float | None]:
        trainer, now = self._trainer, time.monotonic()
        steps, seconds = trainer.at - self._step, max(now - self._since - self._paused, 1e-9)
        rate = steps * trainer.batch_size / seconds
        done, steps_left = trainer.at - self._first, trainer.recipe.steps - trainer.at
        # The first steps are slower than the rest (allocations, kernels that are compiled): no guess from those.
        left = steps_left * (now - self._began) / done if done >= _SETTLED or not steps_left else None
        self._step, self._since, self._paused = trainer.at, now, 0.0
        if trainer.writes:
            elapsed = round(now - self._began, 3)
            trainer.folder.log_time({"step": trainer.at, "seconds": elapsed, "samples_per_second": round(rate, 1)})
        return rate, left

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Global generators are put back afterwards; cuDNN's convolutions give the same bits every time."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        cudnn.deterministic = before


def resumed_recipe(
    folder: RunFolder, recipe: Recipe | None, changes: Mapping[str, Any], spelled: Callable[[str], str] = str
) -> Recipe:
    """The recipe of the run in ``folder`` with what may be told anew; ``TrainingError`` for anything else.

    ``spelled`` gives the name of a field as the user knows it.
    """
    facts = read_facts(folder.checkpoint)
    try:
        stored = Recipe(**facts["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{folder.checkpoint} holds a recipe that cannot be used ({error})") from error
    wanted = {**({} if recipe is None else dataclasses.asdict(recipe)), **changes}
    for name, value in wanted.items():
        value = tuple(value) if name == "betas" else value
        if name not in RESUMABLE and value != getattr(stored, name):
            raise TrainingError(
                f"{spelled(name)} {value!r} differs from the run's {getattr(stored, name)!r}: a resumed run keeps its "
                f"recipe, only {' and '.join(map(spelled, RESUMABLE))} may change"
            )
    resumed = dataclasses.replace(stored, **{name: wanted[name] for name in RESUMABLE if name in wanted})
    if resumed.steps < facts["step"]:
        raise TrainingError(
            f"{spelled('steps')} {resumed.steps}: {folder.path} already has {facts['step']} steps; ask for more"
        )
    return resumed
