"""The nearest of the names that there are, for the sentence about one that there is not. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

# Of SequenceMatcher's ratio, 0 to 1: what is near, what an abbreviation counts, what is about as near as the nearest.
_NEAR, _BEGUN, _AS_NEAR = 0.65, 0.9, 0.1
_LOOKED_AT = 1000  # entries of a folder: a spelling is not worth more
# What other programs, and newcomers, call it.
_ALSO = {
    "batchsize": "batch_size",
    "bs": "batch_size",
    "cuda": "device",
    "dataset": "data",
    "epochs": "steps",
    "gpu": "device",
    "hidden": "width",
    "input": "data",
    "iterations": "steps",
    "label": "class",
    "labels": "classes",
    "learning_rate": "lr",
    "max_steps": "steps",
    "n": "count",
    "num_samples": "count",
    "output": "out",
    "output_dir": "out",
    "samples": "count",
    "verbose": "progress",
}


def nearest(word: object, known: Iterable[object], most: int = 2) -> list[str]:
    """At most ``most`` of the names ``known`` that somebody may have meant by ``word``, the likeliest first.

    Case, dashes in front, and underscores instead of dashes are no difference. A number is no misspelling of another.
    """
    if str(word).isdecimal():
        return []
    names: dict[str, str] = {}
    for name in map(str, known):
        names.setdefault(_plain(name), name)
    plain = _plain(str(word))
    for same in (plain, _ALSO.get(plain)):
        if same in names:
            return [names[same]]
    scores = {name: difflib.SequenceMatcher(None, plain, name).ratio() for name in names}
    if len(plain) > 1:
        scores |= {name: _BEGUN for name in names if name.startswith(plain) and scores[name] < _BEGUN}
    best = max(scores.values(), default=0.0)
    found = [name for name in names if scores[name] >= max(_NEAR, best - _AS_NEAR)]
    return [names[name] for name in sorted(found, key=lambda name: -scores[name])[:most]]


def did_you_mean(word: object, known: Iterable[object], before: str = "") -> str:
    """``"did you mean --steps?"`` after what is to stand ``before`` it, or nothing where no name is near."""
    found = nearest(word, known)
    return f"{before}did you mean {' or '.join(found)}?" if found else ""


def did_you_mean_path(path: Path, names: Iterable[str] = (), before: str = "") -> str:
    """The same of a file or folder that is not there, among its neighbours and ``names`` that are no paths.

    The ends of names (.csv) are alike too often to say anything.
    """
    meant = {name: name for name in names}
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for name in sorted(entry.name for entry in itertools.islice(entries, _LOOKED_AT)):
            meant.setdefault(Path(name).stem, str(path.with_name(name)))
    found = [meant[stem] for stem in nearest(path.stem, meant)]
    return f"{before}did you mean {' or '.join(found)}?" if found else ""


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")
