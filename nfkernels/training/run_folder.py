"""The folder of one run: which file holds what, and how each is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._atomic import write_text
from .errors import TrainingError


class RunFolder:
    """Paths and small files of a run.

    ``metrics.jsonl`` holds one JSON object per logged step and nothing that differs between two equal runs;
    ``timing.jsonl`` the clock; ``config.json`` what was asked for; ``model.safetensors`` the flow to use (best averaged
    weights); ``checkpoint.safetensors`` everything that ``--resume`` needs; ``loss.png`` and ``samples.png`` pictures.

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

    def begin(self) -> None:
        """Makes the folder. ``TrainingError`` where that fails or it already holds a run: no run is overwritten."""
        taken = [file.name for file in (self.checkpoint, self.model, self.metrics) if file.exists()]
        if taken:
            raise TrainingError(
                f"{self.path} already holds a run ({', '.join(taken)}): resume it or choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "you may not write there")
        except OSError as error:
            raise TrainingError(f"the run folder {self.path} cannot be made: {error.strerror}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self.config, json.dumps(config, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """``TrainingError`` where ``config.json`` is missing or damaged."""
        try:
            config = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise TrainingError(f"{self.config} is not there: {self.path} is not the folder of a run") from None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.config} cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise TrainingError(f"{self.config} is not the configuration of a run")
        return config

    def log(self, entry: dict[str, Any]) -> None:
        _append(self.metrics, entry)

    def log_time(self, entry: dict[str, Any]) -> None:
        _append(self.timing, entry)

    def metrics_size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Forgets what was logged after a checkpoint that remembers ``metrics_size``: it will be logged again."""
        if self.metrics_size() > size:
            os.truncate(self.metrics, size)

    def history(self) -> list[dict[str, Any]]:
        """The entries of ``metrics.jsonl``, an unfinished last line (of a killed process) left out."""
        if not self.metrics.exists():
            return []
        entries = []
        for line in self.metrics.read_text().split("\n")[:-1]:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries


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
            file.write((json.dumps(entry) + "\n").encode())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
