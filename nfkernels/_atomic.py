"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed over it."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block ends well, that file takes the place of ``path``.

    Until then ``path`` keeps what it held, so a full disk, an exception or a killed process costs nothing but the new
    version. The temporary file exists (empty) when the block starts and may be replaced in it. Raises ``OSError``, with
    the file it is about, where the folder cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(21, "is a folder, so no file can be written there", str(path))
    if path.exists() and not path.is_file():  # /dev/null: who may write everywhere would take it from all others
        raise FileExistsError(17, "is no regular file, so none can take its place", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Created here, so that it has the permissions of any new file, whatever the writer in the block does.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        try:
            yield temporary
            os.chmod(temporary, mode)
            flush(temporary)
            os.replace(temporary, path)
        except OSError as error:
            if error.filename is not None and Path(error.filename) != temporary:
                raise
            raise type(error)(error.errno, error.strerror, str(path)) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)  # the rename itself, too, is on the disk only when its folder is


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``path`` holds exactly ``text`` (UTF-8), or on an error what it held before."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Removes what processes that were killed left of new versions of ``path``. Nobody else may be writing it."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Returns when the file's content is on the disk."""
    _flush(path, os.O_RDWR)


def flush_folder(path: Path) -> None:
    """Returns when the names in a folder are on the disk, where the system has a way to say so."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            _flush(path, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
