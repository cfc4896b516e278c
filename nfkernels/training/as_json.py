"""What a command prints for programs: one JSON object."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from .progress import unread_is_fine


def print_json(facts: Mapping[str, Any]) -> None:
    """Onto stdout. Numbers that are not finite, for which JSON has no word, become null; paths become text."""
    with unread_is_fine(sys.stdout):
        print(json.dumps(plain(facts), indent=2, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """What JSON has words for."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
