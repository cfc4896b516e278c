"""Is it a table? Told from the file's name and first bytes, without torch: the command line's defaults hang on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MODELS = ("nsf", "nsf-ar", "maf", "realnvp")
_TEXT = (".csv", ".tsv", ".txt", ".dat")
_PARQUET = (".parquet", ".pq")
_LARGEST_HEADER = 2**26  # bytes


def is_table(source: str | os.PathLike[str] | None, model: str | None = None) -> bool:
    """Whether ``nfkernels train`` is to take ``source`` for a table: as ``model`` says, else by the file.

    A ``.npy`` file is one if it has two axes at most, a Parquet file unless it has a column of pictures; what cannot be
    read is none.
    """
    if model is not None:
        return model in MODELS
    if source is None:
        return False
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in _TEXT:
        return not path.is_dir()
    if not path.is_file():
        return False
    return (suffix == ".npy" and _is_matrix(path)) or (suffix in _PARQUET and _has_no_pictures(path))


def is_table_run(run: str | os.PathLike[str]) -> bool:
    """Whether a run folder, or a ``model.safetensors`` file, is that of a flow over a table."""
    path = Path(run)
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return is_table_config(config)
        except (OSError, ValueError, RecursionError):
            path = path / "model.safetensors"
    return _class_in(path) == "TableFlow"


def is_table_config(config: Any) -> bool:
    data = config.get("data") if isinstance(config, dict) else None
    return isinstance(data, dict) and data.get("kind") == "table"


def _class_in(path: Path) -> str | None:
    """The class that a file of ``nn.save`` names, from its header alone."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _LARGEST_HEADER else {}
        return json.loads(header["__metadata__"]["nfkernels"])["config"]["module"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_matrix(path: Path) -> bool:
    try:
        import numpy

        array = numpy.load(path, mmap_mode="r", allow_pickle=False)
        return array.ndim <= 2  # of one axis only records are; the reader of tables says what else it expected
    except Exception:  # whatever numpy makes of it: the reader of pictures will say it
        return False


def _has_no_pictures(path: Path) -> bool:
    try:
        from pyarrow import parquet

        return not {"image", "img"} & set(parquet.read_schema(path).names)
    except ImportError:
        return False
    except Exception:  # a damaged file: as above
        return False
