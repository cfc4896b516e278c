"""The command as tests call it: a run of a second, and what a user's mistake gets."""

import shutil
from pathlib import Path

from nfkernels import cli

QUICK = ["--depth", "1", "--width", "8", "--steps", "6", "--validate-every", "3", "--log-every", "2", "--threads", "1"]

# The same for a table.
TABLE = [*QUICK, "--layers", "2", "--bins", "4", "--batch-size", "32"]


def refused(capsys, *arguments, status=1):
    """The one sentence on stderr that a mistake gets."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error


def copied(run, name="copy"):
    shutil.copytree(run, name)
    return Path(name)
