"""What a run tells while it runs: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .data.image_data import need

if TYPE_CHECKING:
    from .loop import Progress


class Reporter(Protocol):
    """Anything with these three methods can watch a run; ``Progress`` says where it is."""

    def start(self, step: int, steps: int) -> None: ...

    def step(self, progress: Progress) -> None:
        """After every step; ``progress.logged`` or ``progress.validated`` where a number is new."""

    def stop(self) -> None: ...


class Silent:
    def start(self, step: int, steps: int) -> None:
        pass

    def step(self, progress: Progress) -> None:
        pass

    def stop(self) -> None:
        pass


class Bar:
    """A tqdm bar: step, training and validation loss, samples per second, time left. Needs tqdm."""

    def __init__(self, file: TextIO | None = None, unit: str = "images") -> None:
        self._tqdm = need("tqdm", "the progress bar").tqdm
        self._file = sys.stderr if file is None else file
        self._unit = unit
        self._bar: Any = None

    def start(self, step: int, steps: int) -> None:
        self._bar = self._tqdm(
            total=steps,
            initial=step,
            file=self._file,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc} {remaining} left",
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def step(self, progress: Progress) -> None:
        if progress.logged or progress.validated:
            self._bar.set_description_str(", ".join(_numbers(progress, self._unit)) + ",", refresh=False)
        self._bar.update()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


class Lines:
    """A line at each validation and after the first logged steps: for log files and pipes."""

    def __init__(self, file: TextIO | None = None, unit: str = "images") -> None:
        self._file = sys.stderr if file is None else file
        self._unit = unit
        self._any = False

    def start(self, step: int, steps: int) -> None:
        self._any = False

    def step(self, progress: Progress) -> None:
        if progress.validated or (progress.logged and not self._any):
            self._any = True
            parts = [f"step {progress.step}/{progress.steps}", *_numbers(progress, self._unit)]
            if progress.seconds_left is not None:
                parts.append(f"{clock(progress.seconds_left)} left")
            print(", ".join(parts), file=self._file, flush=True)

    def stop(self) -> None:
        pass


def reporter(wish: bool | str | Reporter, unit: str = "images") -> Reporter:
    """What ``fit(progress=...)`` means: False is silent, True or ``"auto"`` a bar on a terminal, lines elsewhere."""
    if wish is False:
        return Silent()
    if wish in (True, "auto"):
        wish = "bar" if sys.stderr.isatty() else "lines"
    if wish == "bar":
        return Bar(unit=unit)
    if wish == "lines":
        return Lines(unit=unit)
    if isinstance(wish, str):
        raise ValueError(f'progress is {wish!r}: expected True, False, "auto", "bar", "lines" or a reporter')
    return wish


def clock(seconds: float) -> str:
    """3:07 or 1:02:45."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _numbers(progress: Progress, unit: str) -> list[str]:
    name = "bpd" if progress.unit == "bits/dim" else "nats"
    parts = []
    if progress.loss is not None:
        parts.append(f"{name} {progress.loss:.3f}")
    if progress.validation is not None:
        parts.append(f"validation {progress.validation:.3f}")
    if progress.per_second is not None:
        parts.append(f"{progress.per_second:.0f} {unit}/s")
    return parts
