"""What accelerate did, layer by layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .swap import is_pending, is_swapped, outcome

Status = Literal["fused", "kept", "inactive", "pending"]
_ORDER: tuple[Status, ...] = ("fused", "pending", "kept", "inactive")
_MEANING = {
    "fused": "fused",
    "pending": "proved at first call",
    "kept": "kept as they are",
    "inactive": "never called",
}


@dataclass
class Row:
    """One layer: its path in the model, its class, what became of it and why."""

    path: str
    layer: str
    _status: Status
    _reason: str = ""
    _module: weakref.ref | None = field(default=None, repr=False)
    _whole: Row | None = field(default=None, repr=False)  # the layer that does this one's work
    _kind: str = ""

    @property
    def status(self) -> Status:
        """``"fused"``, ``"kept"``, ``"pending"`` or ``"inactive"``, as of now."""
        return self._now()[0]

    @property
    def told(self) -> str:
        """The status as the table has it: a container that is run as steps is ``fused (steps)``."""
        return f"fused ({self._kind})" if self._kind and self.status == "fused" else self.status

    @property
    def reason(self) -> str:
        """Why the layer is what it is; empty where there is nothing to say."""
        return self._now()[1]

    def _now(self) -> tuple[Status, str]:
        """A pending layer's row changes with its first call, a fused one's when it gets its own class back; a part's
        is that of its whole."""
        if self._whole is not None:
            return self._whole.status, f"as a part of {self._whole.path or 'the model'}"
        module = self._module() if self._module is not None else None
        if self._status == "fused" and module is not None and not is_swapped(module):
            return "kept", "restored, or changed to what cannot be fused"
        if self._status != "pending" or module is None or is_pending(module):
            return self._status, self._reason
        found = outcome(module)
        if found is None or (found[0] and not is_swapped(module)):
            return "kept", "restored"
        return ("fused" if found[0] else "kept"), found[1]


@dataclass
class Report:
    """What :func:`accelerate` did; print it for a table. ``rows`` holds every flow layer of the model, in its order."""

    model: str
    rows: list[Row]
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def having(self, status: Status) -> list[Row]:
        """The rows of one status."""
        return [row for row in self.rows if row.status == status]

    @property
    def fused(self) -> list[Row]:
        """Layers that run fused now (in a dry run: that would)."""
        return self.having("fused")

    @property
    def kept(self) -> list[Row]:
        """Layers that stay as they are, each with its reason."""
        return self.having("kept")

    @property
    def inactive(self) -> list[Row]:
        """Layers that the example inputs never reached."""
        return self.having("inactive")

    @property
    def pending(self) -> list[Row]:
        """Layers that are proved, and then fused or kept, at their first call."""
        return self.having("pending")

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.having(s))} {_MEANING[s]}" for s in _ORDER if self.having(s))
        would = " (dry run: nothing was changed)" if self.dry_run else ""
        head = f"{self.model}: {counts or 'no flow layer found'}{would}"
        table = [("layer", "class", "status", "why")]
        table += [(row.path or "(the model)", row.layer, row.told, row.reason) for row in self.rows]
        widths = [max(len(r[i]) for r in table) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths)), r[3]]).rstrip() for r in table]
        body = lines if self.rows else []
        return "\n".join([head, *body, *self.notes])

    __repr__ = __str__


def row(path: str, module: nn.Module, status: Status, reason: str = "") -> Row:
    return Row(path, type(module).__name__, status, reason, weakref.ref(module))


def part(path: str, module: nn.Module, whole: Row) -> Row:
    """The row of a submodule whose work is done by the layer of another row."""
    return Row(path, type(module).__name__, "pending", _whole=whole)
