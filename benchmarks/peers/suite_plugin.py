"""A pytest plugin for other libraries' own tests: every layer that an adapter serves is swapped as it is constructed.

``python -m pytest -p benchmarks.peers.suite_plugin`` in an unpacked source distribution, with ``NFKERNELS_SUITE`` set:
``plain`` changes nothing (but the seeds), ``proved`` has each layer proved at its first call, ``trusted`` swaps without
a proof. Every test starts from the same random state in all of them. What was swapped, and what the proofs said, goes
to the JSON file that ``NFKERNELS_SUITE_OUT`` names. Structural adapters take no part: they serve no class by name.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MODES = ("plain", "proved", "trusted")
swapped: Counter[str] = Counter()
kept: Counter[tuple[str, str]] = Counter()
proofs: Counter[tuple[str, str, str]] = Counter()


def classes(names: list[str]) -> Iterator[type]:
    """The classes of these qualified names, of the libraries that are here, and what they derived from them."""
    found: dict[type, None] = {}

    def add(cls: type) -> None:
        if cls not in found:
            found[cls] = None
            for sub in cls.__subclasses__():
                add(sub)

    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            add(cls)
    yield from found


def swap_when_constructed(cls: type, mode: str) -> None:
    """Wraps ``cls.__init__``: the outermost one that runs swaps what it has constructed."""
    init = cls.__init__

    @functools.wraps(init)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is constructed:
            _swap(self, mode)

    cls.__init__ = constructed


def _swap(module: nn.Module, mode: str) -> None:
    import nfkernels

    name = f"{type(module).__module__}.{type(module).__qualname__}"
    report = nfkernels.accelerate(module, verify=mode == "proved")
    own = next((row for row in report if row.path == ""), None)
    if own is None:
        return
    if own.status in ("pending", "fused"):
        swapped[name] += 1
    else:
        kept[name, own.reason] += 1


def pytest_configure(config: Any) -> None:
    mode = os.environ.get("NFKERNELS_SUITE", "proved")
    if mode not in MODES:
        raise ValueError(f"NFKERNELS_SUITE is one of {', '.join(MODES)}, got {mode!r}")
    if mode == "plain":
        return
    from nfkernels.integrations import Adapter, proof, served

    Adapter.too_small = lambda self, module, call: None  # what the suites check is small
    prove = proof.prove

    @functools.wraps(prove)
    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        verdict = prove(module, *args, **kwargs)
        proofs[type(module).__name__, "fused" if verdict.agrees else "kept", verdict.text] += 1
        return verdict

    proof.prove = noted
    for cls in classes(served()):
        swap_when_constructed(cls, mode)


def pytest_runtest_setup(item: Any) -> None:
    torch.manual_seed(0)
    random.seed(0)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(0)


def pytest_sessionfinish(session: Any) -> None:
    path = os.environ.get("NFKERNELS_SUITE_OUT")
    if path:
        told = {
            "swapped": dict(swapped),
            "kept": [{"layer": a, "reason": b, "count": n} for (a, b), n in kept.items()],
            "proofs": [{"layer": a, "status": b, "reason": c, "count": n} for (a, b, c), n in proofs.items()],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(told, file)
