"""One option of a command: the kinds of values that there are, and what a table of options says of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._nearest import did_you_mean

_LARGEST_SIDE = 16384  # pixels that --size takes


# --- kinds of values: a text of the command line, or a value of a file, in; the value, or a ValueError, out ----------


def name(text: Any) -> str:
    """Of a file, folder or class. An empty one is mostly a shell variable that is not set: never a default."""
    if not isinstance(text, str) or not text:
        raise ValueError("expected a name; leave the option away for its default")
    return text


def whole(least: int, most: int = 2**32 - 1) -> Callable[[Any], int]:
    def parse(given: Any) -> int:
        value = _int(given)
        if value is None or not least <= value <= most:
            raise ValueError(f"expected a whole number, at least {least} and at most {most}")
        return value

    return parse


def number(least: float, below: float = math.inf, *, above: bool = False, up_to: bool = False) -> Callable:
    """Of at least ``least`` (more than it with ``above``), below ``below`` (or as much with ``up_to``)."""

    def parse(given: Any) -> float:
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not (least <= value < below or (up_to and value == below)) or (above and value == least):
            bounds = f"above {least:g}" if above else f"of at least {least:g}"
            upper = "" if below == math.inf else f" and {'at most' if up_to else 'below'} {below:g}"
            raise ValueError(f"expected a number {bounds}{upper}")
        return value

    return parse


def several(one: Callable[[Any], Any], count: int | None = None) -> Callable[[Any], tuple]:
    """Values with commas between them, or a list."""

    def parse(given: Any) -> tuple:
        parts = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
        if count is not None and len(parts) != count:
            raise ValueError(f"expected {count} values with a comma between them")
        try:
            values = tuple(one(part) for part in parts)
        except ValueError as error:
            raise ValueError(f"{error} (each of several)" if len(parts) > 1 else str(error)) from None
        if not values:
            raise ValueError("expected at least one value")
        return values

    return parse


def depth(given: Any) -> int | tuple[int, ...]:
    counts = several(whole(1))(given)
    return counts[0] if len(counts) == 1 else counts


def size(given: Any) -> list[int]:
    sides = [_int(side) for side in given] if isinstance(given, (list, tuple)) else [0]
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", str(given).lower())
    if match and not isinstance(given, bool):
        sides = [int(match[1]), int(match[2] or match[1])]
    if len(sides) != 2 or not all(side is not None and 1 <= side <= _LARGEST_SIDE for side in sides):
        raise ValueError(f"expected a size such as 32, or height x width such as 28x32, {_LARGEST_SIDE} at most")
    return sides


def device(text: Any) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", text):
        raise ValueError("expected auto, cpu, cuda, cuda:<0 to 99> or mps")  # torch numbers no more than 128 devices
    return text


def _int(given: Any) -> int | None:
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        return None
    try:
        return int(given)
    except ValueError:
        return None


# --- the option -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: as in a file, and on the command line with dashes and two in front.
        group: heading in ``--help``.
        text: its help, to which the default is added.
        kind: turns what was given into the value; None for a switch.
        default: where nothing gives it.
        shown: the default in words, instead of its value.
        choices: the values there are, instead of a ``kind``.
        metavar: of the value in ``--help``.
        file: whether a file may give it.
        of: the data it is for, ``"images"`` or ``"tables"``; None for both.
        table: the default for tables, where that is another.
    """

    name: str
    group: str
    text: str
    kind: Callable[[Any], Any] | None = None
    default: Any = None
    shown: str | None = None
    choices: tuple[Any, ...] | None = None
    metavar: str | None = "N"
    file: bool = True
    of: str | None = None
    table: Any = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.kind is None and self.choices is None

    @property
    def help(self) -> str:
        shown = self.shown or (None if self.default is None else _shown(self.default))
        if self.table is not None:
            shown = f"{shown}; tables {_shown(self.table)}"
        if self.is_switch:
            return f"{self.text} (default on)" if self.default else self.text
        return self.text if shown is None else f"{self.text} (default {shown})"

    def read(self, given: Any) -> Any:
        """The value of what a file or preset gives. ``ValueError``: "expected ..."."""
        if given is None:
            if self.default is None:
                return None
            raise ValueError(f"expected a value; leave {self.name} out for its default, {_shown(self.default)}")
        if self.choices is not None:
            if isinstance(given, bool) or given not in self.choices:
                near = did_you_mean(given, self.choices, "; ")
                raise ValueError(f"expected one of {', '.join(map(str, self.choices))}{near}")
            return self.choices[self.choices.index(given)]
        if self.is_switch:
            if not isinstance(given, bool):
                raise ValueError("expected true or false")
            return given
        # A quoted number is a word, but for those that YAML 1.1 takes for one: 1e-3 has no dot.
        exponent = isinstance(given, str) and re.fullmatch(r"[+-]?[0-9.]+[eE][+-]?[0-9]+", given)
        if isinstance(given, str) and self.metavar in ("N", "X", "P") and not exponent:
            try:
                self.kind("?")
            except ValueError as error:
                raise ValueError(f"{error}, not text") from None
        return self.kind(given)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
