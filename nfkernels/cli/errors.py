"""What a user is told of an error, and by which of several processes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from ..training.errors import TrainingError

_LONGEST = 600  # characters of a sentence


def sentence(error: Exception, less: str) -> str | None:
    """What to tell a user about an error that is no defect; None for one that is.

    ``less`` is what to try where there is not enough memory.
    """
    if isinstance(error, TrainingError):
        return _one_line(str(error))
    import torch

    from ..nn import CheckpointError
    from ..training import DataError
    from ..training.errors import is_out_of_memory

    if isinstance(error, (DataError, CheckpointError)):
        return _one_line(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has not enough memory: {less}"
    if is_out_of_memory(error):
        return f"there is not enough memory: {less}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return None


def is_main() -> bool:
    """Whether this is the only process of a command, or the one of torchrun's that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def tells(error: Exception | None = None) -> bool:
    """Whether this process tells of a mistake: of several the first that meets it, so that it is told once."""
    if "RANK" not in os.environ:
        return True
    from ..training.distributed import FailedElsewhereError, speaks_first

    return not isinstance(error, FailedElsewhereError) and speaks_first()


def show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if not is_main():
        return
    with contextlib.suppress(BrokenPipeError):
        print(f"warning: {message}", file=sys.stderr)


def _one_line(text: str) -> str:
    """Some errors that a sentence quotes, such as torch's of a state that does not fit, go on for pages."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
