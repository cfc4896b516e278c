"""Which cases of a long list run by default; the others are marked ``exhaustive`` and run with ``-m ""``.

``@pytest.mark.covering`` on a test with several ``parametrize``: enough of the product that every value of every
parameter is met, ``covering(2)``: every pair of values. ``one_of_each`` is for a single list of named cases.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from zlib import crc32

import pytest


def one_of_each(cases: Iterable[Any], *kinds: Callable[[Any], Any]) -> Iterator[Any]:
    """The cases as parameters, exhaustive but for the first of each kind. A kind is what any of the functions returns;
    None is no kind."""
    seen: set[tuple[int, Any]] = set()
    for case in cases:
        found = {(place, kind(case)) for place, kind in enumerate(kinds) if kind(case) is not None}
        yield pytest.param(case, marks=pytest.mark.exhaustive) if found <= seen else case
        seen |= found


def thin(items: Iterable[pytest.Item]) -> None:
    """Marks what ``covering`` leaves out, by itself the same in every process."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("exhaustive"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for group in tests.values():
        (strength,) = group[0].get_closest_marker("covering").args or (1,)
        kept = _covering({item.name: _chosen(item) for item in group}, strength)
        for item in group:
            if item.name not in kept:
                item.add_marker(pytest.mark.exhaustive)


def _chosen(item: pytest.Item) -> list[tuple]:
    """What a case has of every ``parametrize``; lists hold objects, that need not compare or hash."""
    lists = [mark.args[0] for mark in item.iter_markers("parametrize")]
    lists = [tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names) for names in lists]
    return [(names, tuple(id(item.callspec.params[name]) for name in names)) for names in lists]


def _covering(values: dict[str, list[tuple]], strength: int) -> set[str]:
    """Names of cases that together meet every ``strength`` values of different parameters that all of them meet:
    greedily, of equals the one whose values were used least, and then by lot (else values would rise together)."""
    met = {name: set(itertools.combinations(v, min(strength, len(v)))) for name, v in values.items()}
    missing, used, kept = set().union(*met.values()), Counter(), set()

    def worth(name: str) -> tuple[int, int, int]:
        return len(met[name] & missing), -sum(used[v] for v in values[name]), crc32(name.encode())

    while missing:
        best = max(met, key=worth)
        missing.difference_update(met.pop(best))
        used.update(values[best])
        kept.add(best)
    return kept
