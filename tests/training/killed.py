"""A run that is killed again and again, and taken up each time. ``python killed.py FOLDER WAY``.

The trials are forks of this process, which has imported everything and never trains itself: a kill costs nothing but
what the run loses. Prints JSON: how many kills hit, and the steps that were found in the checkpoint after each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # what the first step would import, here once for all forks
from tiny import QUICK, glow, stripes

from nfkernels import _atomic
from nfkernels.training import checkpoint, fit, run_folder

STEPS = 40


def train(run: Path) -> None:
    resume = (run / "checkpoint.safetensors").exists()
    options = QUICK | {"steps": STEPS, "patience": 100, "resume": resume}
    fit(glow(seed=os.getpid() if resume else 0), stripes(40), validation=stripes(10, seed=1), run=run, **options)


def trial(run: Path, prepare: Callable[[], None] = lambda: None, after: float | None = None) -> bool:
    """Whether a fork that trains came to its end, or was killed (after so many seconds, or by what it prepared)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            train(run)
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a trial failed")
    return os.WIFEXITED(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_before(holder: object, name: str, call: int) -> Callable[[], None]:
    """For a trial: ``holder.name`` is killed when it is called for the ``call``-th time."""

    def prepare() -> None:
        real, calls = getattr(holder, name), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                die()
            return real(*args, **kwargs)

        setattr(holder, name, counted)

    return prepare


def dies_in_a_checkpoint(call: int) -> Callable[[], None]:
    """For a trial: half of the ``call``-th checkpoint is written."""

    def prepare() -> None:
        real, calls = checkpoint.save_file, []

        def half(tensors, path, metadata):
            calls.append(path)
            real(tensors, path, metadata)
            if len(calls) == call:
                os.truncate(path, path.stat().st_size // 2)
                die()

        checkpoint.save_file = half

    return prepare


def dies_in_a_line(call: int) -> Callable[[], None]:
    """For a trial: half of the ``call``-th line of metrics is written."""

    def prepare() -> None:
        real, calls = run_folder._append, []

        def half(path, entry):
            if path.name == "metrics.jsonl":
                calls.append(entry)
                if len(calls) == call:
                    with open(path, "ab") as file:
                        file.write(json.dumps(entry).encode()[:7])
                    die()
            real(path, entry)

        run_folder._append = half

    return prepare


def at_chosen_places(run: Path) -> list[bool]:
    """Around the renames of whatever file comes, in the middle of files, and between a file and the next."""
    ways = [dies_before(_atomic.os, "replace", call) for call in (1, 2, 3, 4, 5)]
    ways += [dies_before(_atomic, "flush_folder", call) for call in (1, 2, 3, 4)]
    ways += [dies_in_a_checkpoint(call) for call in (1, 2)]
    ways += [dies_in_a_line(call) for call in (1, 2, 4)]
    return [trial(run, way) for way in ways]


def at_random_moments(run: Path) -> list[bool]:
    times = []
    for name in ("measured", "measured-again"):  # the first run is slower than those that follow
        began = time.monotonic()
        trial(run.with_name(name))
        times.append(time.monotonic() - began)
    draw = random.Random(0)
    # Short parts of a run, so that it is not over before it has been killed often enough.
    return [trial(run, after=draw.uniform(0, 0.33) * min(times)) for _ in range(12)]


def main() -> None:
    torch.set_num_threads(1)
    run, way = Path(sys.argv[1]), {"places": at_chosen_places, "moments": at_random_moments}[sys.argv[2]]
    found: list[int] = []
    real = trial

    def watched(path: Path, *args, **kwargs) -> bool:
        done = real(path, *args, **kwargs)
        if path == run and (run / "checkpoint.safetensors").exists():
            found.append(checkpoint.load_checkpoint(run / "checkpoint.safetensors")[1]["step"])
        elif found:
            raise SystemExit("the checkpoint is gone")
        return done

    globals()["trial"] = watched
    kills = way(run).count(False)
    assert trial(run)
    print(json.dumps({"kills": kills, "found": found}))


if __name__ == "__main__":
    main()
