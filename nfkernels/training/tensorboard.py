"""``nfkernels train --tensorboard``: the metrics of a run, and samples at each new best, for TensorBoard."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..plot.images import tiles
from . import session
from .data.image_data import DataError
from .errors import TrainingError
from .finished import draw
from .progress import Reporter
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .loop import Progress

_DRAWN = 16
# Entries of metrics.jsonl by what TensorBoard calls them.
_TAGS = {
    "bpd": "loss/training",
    "nll": "loss/training",
    "validation_bpd": "loss/validation",
    "validation_nll": "loss/validation",
    "lr": "lr",
    "gradient_norm": "gradient norm",
    "skipped": "skipped steps",
}


def need_tensorboard() -> Any:
    """``torch.utils.tensorboard``; a ``DataError`` that says how to get what is missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise DataError(
            '--tensorboard needs the package tensorboard, which is missing: pip install "nfkernels[tensorboard]"'
        ) from error


class Board:
    """A ``Reporter`` that passes everything on to another, and what is new in the run folder to TensorBoard.

    It reads the metrics and the kept model from their files, so that the run is the same, bit for bit, with it.

    Args:
        folder: of the run; the events go into its ``tensorboard``.
        device: to draw the samples on.
        reporter: the other.
    """

    _kind: type | None = None  # of the flow, as ``session.open_run`` takes it

    def __init__(self, folder: RunFolder, device: torch.device, reporter: Reporter) -> None:
        self._writer_of = need_tensorboard().SummaryWriter
        self._folder, self._device, self._reporter = folder, device, reporter
        self._writer: Any = None
        self._read = 0  # bytes of the metrics that are on the board
        self._drawn: float | None = None

    def start(self, step: int, steps: int) -> None:
        # What an earlier process wrote after the checkpoint that this one starts from is taken back.
        self._writer = self._writer_of(str(self._folder.tensorboard), purge_step=step + 1 if step else None)
        self._read = self._folder.metrics_size()
        self._reporter.start(step, steps)

    def step(self, progress: Progress) -> None:
        if progress.logged or progress.validated:
            entries, self._read = self._folder.entries_since(self._read)
            for entry in entries:
                for name, tag in _TAGS.items():
                    if isinstance(entry.get(name), (int, float)):
                        self._writer.add_scalar(tag, entry[name], entry["step"])
        if progress.validated and progress.best is not None and progress.best != self._drawn:
            self._drawn = progress.best
            try:
                self._draw(progress.step)
            except TrainingError as error:  # no picture is worth a run
                warnings.warn(f"no samples for TensorBoard at step {progress.step}: {error}", stacklevel=2)
        if progress.validated:
            self._writer.flush()
        self._reporter.step(progress)

    def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._reporter.stop()

    def _draw(self, step: int) -> None:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a flow that is loaded draws weights first
            flow, _, config = session.open_run(self._folder.path, self._device, self._kind)
            with session.using(self._folder.path), session.computing(session.precision_of(config), self._device):
                self._add_samples(flow, config, step)

    def _add_samples(self, flow: Any, config: dict[str, Any], step: int) -> None:
        images = draw(flow, _DRAWN, session.class_names(flow, config), None, 1.0, 0)
        pixels = tiles(images, grey_levels=flow.grey_levels)
        self._writer.add_image("samples", pixels, step, dataformats="HWC" if pixels.dim() == 3 else "HW")
