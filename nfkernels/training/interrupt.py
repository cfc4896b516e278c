"""Ctrl-C and SIGTERM as a wish: the loop looks after each step, saves and leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# `timeout` and some terminals signal the process and its group, so that one wish arrives twice.
_ECHO_SECONDS = 0.5


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is only noted in ``requested`` (the signal's number, else None).

    A second one does at once what it did before: Ctrl-C raises ``KeyboardInterrupt``, SIGTERM ends the process. Signals
    reach the main thread only: elsewhere, or with ``active=False``, nothing is installed and nothing is ever noted.
    ``tell=False`` keeps silent about the first one: of several processes that all get it, one tells.
    """

    def __init__(self, *, active: bool = True, tell: bool = True) -> None:
        self._tell = tell
        self.requested: int | None = None
        self._requested_at = 0.0
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._requested_at = number, time.monotonic()
            # Straight to the descriptor: the signal may have come while Python was printing.
            if self._tell:
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step; again to quit at once\n")
        elif time.monotonic() - self._requested_at > _ECHO_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not installed from Python cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
