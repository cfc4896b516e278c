"""The ``nfkernels`` command: ``commands`` holds what it can do, ``command_line`` how that is asked for.

Nothing here imports torch before a command runs, so that ``--help`` answers at once. A user's mistake is one sentence
and exit status 1 (2 where the command line itself is wrong); only a defect of this program shows a traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

from .command_line import build_parser, parse
from .commands import COMMANDS
from .errors import is_main, sentence, show_warning, tells

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. ``argv`` is by default the process's."""
    shown, options = warnings.showwarning, None
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names of files and classes may hold what this terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        options = parse(argv)
        warnings.showwarning = show_warning
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        if is_main():
            print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `nfkernels info | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not tells(error):
            return 1
        told = None if options is None else sentence(error, COMMANDS[options.command].less)
        if told is None:
            raise
        with contextlib.suppress(BrokenPipeError):
            print(f"nfkernels {options.command}: {told}", file=sys.stderr)
        return 1
    finally:
        warnings.showwarning = shown
