"""The folder of one run: which file holds what, and how each is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._atomic import flush, flush_folder, remove_unfinished, write_text
from .as_json import plain
from .errors import TrainingError
from .recipe import most_threads


class RunFolder:
    """Paths and small files of a run.

    ``metrics.jsonl`` holds one JSON object per logged step and nothing that differs between two equal runs;
    ``timing.jsonl`` the clock; ``config.json`` what was asked for; ``model.safetensors`` the flow to use (best averaged
    weights); ``checkpoint.safetensors`` everything that ``--resume`` needs; ``loss.png``, ``samples.png``,
    ``corner.png`` (of a table) and ``interpolation.png`` pictures; ``tensorboard`` what ``--tensorboard`` wrote.

    Nothing is read or made before it is asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.config = self.path / "config.json"
        self.model = self.path / "model.safetensors"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.loss = self.path / "loss.png"
        self.samples = self.path / "samples.png"
        self.corner = self.path / "corner.png"
        self.interpolation = self.path / "interpolation.png"
        self.tensorboard = self.path / "tensorboard"

    def begin(self) -> None:
        """Makes the folder. ``TrainingError`` where that fails or it already holds a run: no run is overwritten."""
        taken = [file.name for file in (self.checkpoint, self.model, self.metrics) if file.exists()]
        if taken:
            raise TrainingError(
                f"{self.path} already holds a run ({', '.join(taken)}): resume it or choose another folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file: expected a folder for the run, new or empty")
        try:
            new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in new:  # a folder, too, is on the disk only when its parent is
                flush_folder(folder.parent)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "you may not write there")
        except OSError as error:
            raise TrainingError(f"the run folder {self.path} cannot be made: {error.strerror}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """``config.json``, written whole or not at all."""
        write_text(self.config, json.dumps(config, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """``TrainingError`` where ``config.json`` is missing or damaged."""
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TrainingError(f"{self.config} is not there: {self.path} is not the folder of a run") from None
        except (OSError, ValueError, RecursionError) as error:
            raise TrainingError(f"{self.config} cannot be read ({error})") from error
        return check_config(config, self.config)

    def log(self, entry: dict[str, Any]) -> None:
        """One line more in ``metrics.jsonl``."""
        _append(self.metrics, entry)

    def log_time(self, entry: dict[str, Any]) -> None:
        """One line more in ``timing.jsonl``."""
        _append(self.timing, entry)

    def metrics_size(self) -> int:
        """The bytes of ``metrics.jsonl``; 0 where there is none."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def flush_metrics(self) -> int:
        """Returns ``metrics_size`` when all of it is on the disk, so that a checkpoint may count on it."""
        if self.metrics.exists():
            flush(self.metrics)
            flush_folder(self.path)
        return self.metrics_size()

    def resume(self, size: int) -> None:
        """Forgets what was logged after a checkpoint that remembers ``metrics_size``: it will be logged again.

        Also what a killed process left of files that it had not finished.
        """
        if self.metrics_size() > size:
            os.truncate(self.metrics, size)
        for file in (self.checkpoint, self.model, self.config, self.loss, self.samples, self.corner):
            remove_unfinished(file)

    def history(self) -> list[dict[str, Any]]:
        """The entries of ``metrics.jsonl``, an unfinished last line (of a killed process) left out."""
        return self.entries_since(0)[0]

    def entries_since(self, start: int) -> tuple[list[dict[str, Any]], int]:
        """The whole entries from this byte of ``metrics.jsonl`` on, and the byte after them."""
        if not self.metrics.exists():
            return [], 0
        with open(self.metrics, "rb") as file:
            file.seek(start)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        entries = []
        for line in whole.decode(errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and is_whole(entry.get("step")):
                entries.append(entry)
        return entries, start + len(whole)


def check_config(config: Any, where: object) -> dict[str, Any]:
    """``config`` as it is, if it is what ``nfkernels train`` writes, as far as it goes; else ``TrainingError``."""

    def several(value: Any, kind: Callable[[Any], bool], count: int | None = None) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(map(kind, value))

    def size(value: Any) -> bool:
        return is_whole(value, 1)

    def word(value: Any) -> bool:
        return isinstance(value, str)

    def fits(part: dict[str, Any], wanted: dict[str, Callable[[Any], bool]]) -> str | None:
        return next((name for name, fit in wanted.items() if name in part and not fit(part[name])), None)

    if not isinstance(config, dict):
        raise TrainingError(f"{where} is damaged: the run's configuration is no JSON object")
    wrong = fits(
        config,
        {
            "data": lambda v: isinstance(v, dict),
            "model": lambda v: isinstance(v, dict),
            "threads": lambda v: v is None or is_whole(v, 1, most_threads()),
        },
    )
    wrong = wrong or fits(
        config.get("data", {}),
        {
            "source": word,
            "size": lambda v: v is None or several(v, size, 2),
            "channels": lambda v: v is None or size(v),
            "bits": lambda v: v is None or is_whole(v, 1, 8),
            "stream": lambda v: v is None or isinstance(v, bool),
            "split_seed": is_whole,
            "classes": lambda v: v is None or several(v, word),
            "kind": word,
            "columns": lambda v: v is None or several(v, word),
            "context": lambda v: v is None or several(v, word),
            "circular": lambda v: v is None or several(v, word),
            "header": lambda v: v is None or isinstance(v, bool),
            "missing": word,
        },
    )
    wrong = wrong or fits(
        config.get("model", {}),
        {
            "shape": lambda v: several(v, size, 3),
            "levels": size,
            "steps": lambda v: size(v) or several(v, size),
            "hidden": size,
            "classes": lambda v: v is None or size(v),
        },
    )
    if wrong:
        raise TrainingError(f"{where} is damaged: the run's configuration has no usable {wrong!r}")
    return config


def is_whole(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def next_run(name: str, root: str | os.PathLike[str] = "runs") -> Path:
    """Makes ``runs/<name>-<n>``, the first number larger than all there, and so nobody else's at the same time.

    Raises ``TrainingError`` where it cannot be made.
    """
    root = Path(root)
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            numbers = [0]
            for entry in root.iterdir():
                stem, _, number = entry.name.rpartition("-")
                if stem == name and number.isdecimal():
                    numbers.append(int(number))
            path = root / f"{name}-{max(numbers) + 1}"
            path.mkdir()
            return path
        except FileExistsError:
            if not root.is_dir():
                raise TrainingError(f"run folders go into {root}, which is a file: give --out") from None
        except OSError as error:
            raise TrainingError(f"a run folder in {root} cannot be made: {error.strerror}; give --out") from error


def _append(path: Path, entry: dict[str, Any]) -> None:
    # One write of a whole line, flushed to the kernel: readers see no halves while the run goes on.
    try:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(plain(entry), allow_nan=False) + "\n").encode())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
