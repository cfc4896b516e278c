"""Completion on the TAB key, by argcomplete.

argcomplete asks this very parser at every TAB, so that options, choices and runs are never out of date, and it knows
fish as well. shtab writes them all into a script instead, which answers without starting Python but is of the version
that wrote it, and has none for fish. A TAB here costs the start of Python and argparse; torch is not imported.
"""

from __future__ import annotations

import argparse

from ..training.errors import TrainingError

SHELLS = ("bash", "zsh", "fish")


def completion(options: argparse.Namespace) -> int:
    """Prints what a shell has to read so that it completes ``nfkernels``."""
    try:
        from argcomplete import shellcode
    except ImportError as error:
        raise TrainingError(
            'completion needs argcomplete, which is missing: pip install "nfkernels[completion]"'
        ) from error
    print(shellcode(["nfkernels"], shell=options.shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Tells the shell what may come next, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(parser)
