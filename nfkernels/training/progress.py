"""What a run tells while it runs: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .data.image_data import need

if TYPE_CHECKING:
    from .loop import Progress


# Columns of a terminal that is none, and those that the bar itself gets at least.
_ENOUGH_COLUMNS, _BAR_COLUMNS = 1000, 5


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
    """A tqdm bar: step, training loss, time left, samples per second, validation loss. Needs tqdm.

    On a narrow terminal the latter of these are left out, whole.
    """

    def __init__(self, file: TextIO | None = None, unit: str = "images") -> None:
        self._tqdm = need("tqdm", "the progress bar").tqdm
        self._file = sys.stderr if file is None else file
        self._unit = unit
        self._bar: Any = None

    def start(self, step: int, steps: int) -> None:
        with unread_is_fine(self._file):
            self._bar = self._tqdm(
                total=steps,
                initial=step,
                file=self._file,
                bar_format="step {n_fmt}/{total_fmt} |{bar}|{desc}",
                dynamic_ncols=True,
                mininterval=0.2,
            )

    def step(self, progress: Progress) -> None:
        if self._bar is None:
            return
        with unread_is_fine(self._file):
            if progress.logged or progress.validated:
                self._bar.set_description_str(self._text(progress), refresh=False)
            self._bar.update()

    def stop(self) -> None:
        if self._bar is not None:
            with unread_is_fine(self._file):
                self._bar.refresh()
                self._bar.close()
            self._bar = None

    def _text(self, progress: Progress) -> str:
        left = _columns(self._file) - len(f"step {progress.steps}/{progress.steps} ||") - _BAR_COLUMNS
        text = ""
        for part in _numbers(progress, self._unit):
            more = (", " if text else " ") + part
            if len(text + more) > left:
                break
            text += more
        return text


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
            with unread_is_fine(self._file):
                print(", ".join(parts), file=self._file, flush=True)

    def stop(self) -> None:
        pass


def wish_of(option: str | None, *, json: bool) -> bool | str:
    """What ``--progress`` comes to, for ``reporter``: beside ``--json`` nothing but a bar on a terminal."""
    if option in (None, "auto"):
        return "auto" if not json or sys.stderr.isatty() else False
    return option != "none" and option


def reporter(wish: bool | str | Reporter, unit: str = "images") -> Reporter:
    """What ``fit(progress=...)`` means: False is silent, True or ``"auto"`` a bar on a terminal, lines elsewhere."""
    if wish is False:
        return Silent()
    if wish in (True, "auto"):
        # tqdm is only for looks: nobody is stopped for want of it, unless a bar was asked for.
        wish = "bar" if sys.stderr.isatty() and importlib.util.find_spec("tqdm") else "lines"
    if wish == "bar":
        return Bar(unit=unit)
    if wish == "lines":
        return Lines(unit=unit)
    if isinstance(wish, str):
        raise ValueError(f'progress is {wish!r}: expected True, False, "auto", "bar", "lines" or a reporter')
    assert not isinstance(wish, bool)
    return wish


def clock(seconds: float) -> str:
    """3:07 or 1:02:45."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


@contextlib.contextmanager
def unread_is_fine(file: TextIO) -> Iterator[None]:
    """Inside, a reader of ``file`` that has gone (``nfkernels train 2>&1 | head``) costs the output, never the run."""
    try:
        yield
    except BrokenPipeError:
        # Also what is still in the buffer: Python would try to write that at exit.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())
            os.close(nowhere)


def _columns(file: TextIO) -> int:
    try:
        return os.get_terminal_size(file.fileno()).columns or _ENOUGH_COLUMNS
    except (OSError, ValueError, AttributeError):
        return _ENOUGH_COLUMNS


def _numbers(progress: Progress, unit: str) -> list[str]:
    """The most important first: a narrow terminal shows only the beginning."""
    name = "bpd" if progress.unit == "bits/dim" else "nats"
    parts = []
    if progress.loss is not None:
        parts.append(f"{name} {progress.loss:.3f}")
    if progress.seconds_left is not None:
        parts.append(f"{clock(progress.seconds_left)} left")
    if progress.per_second is not None:
        parts.append(f"{progress.per_second:.0f} {unit}/s")
    if progress.validation is not None:
        parts.append(f"validation {progress.validation:.3f}")
    return parts
