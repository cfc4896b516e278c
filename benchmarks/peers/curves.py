"""The gate: the same training before and after, from one seed.

In float64 the loss may part by 1e-9 of its size in a hundred steps. Where training itself makes more of roundings (in
float32 it always may), by three times what a change of the weights by one unit in the last place does to the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cases import Case, batches

ALLOWED_64 = 1e-9
ALLOWED_NUDGES = 3.0
NUDGES, MOST_NUDGES = 3, 8  # the deviations of a wild training differ by orders among themselves
FLOOR_32 = 2 * torch.finfo(torch.float32).eps  # a loss is no better known, however little a weight may do to it
Made = Callable[[bool, torch.dtype], nn.Module]  # (accelerated, dtype): from the seed


def train(case: Case, model: nn.Module, steps: int, rows: int, quick: bool, dtype: torch.dtype) -> list[float]:
    """The losses of ``steps`` steps on batches that are the same for everybody."""
    device = next(model.parameters()).device
    adam = torch.optim.Adam(model.parameters(), lr=case.lr)
    model.train()
    losses = []
    for _, batch in zip(range(steps), batches(case, rows, 11, quick, device)):
        adam.zero_grad()
        loss = case.loss(model, *(t.to(dtype) for t in batch))
        loss.backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        adam.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def nudge(model: nn.Module, seed: int) -> None:
    """Every weight to a neighbouring float, above or below: what other roundings throughout amount to. (Where a weight
    starts at a point that roundings leave at once, one changed weight would show nothing of it.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                towards = torch.randn(weight.shape, generator=generator).to(weight).sign() * math.inf
                weight.copy_(torch.nextafter(weight, towards))


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference, relative to ``max(1, |b|)``; infinite where only one is finite."""
    worst = 0.0
    for x, y in zip(a, b):
        if x != y and not (x != x and y != y):
            off = abs(x - y) / max(1.0, abs(y))
            worst = max(worst, off if off == off else float("inf"))
    return worst


def compare(case: Case, made: Made, steps: int, rows: int, quick: bool) -> dict[str, Any]:
    """``before`` and ``after`` (the losses in float32), how far they part in both types, and ``nudged``: how far the
    original parts from itself in float32. ``gate`` is "passed", or what is wrong."""

    def run(accelerated: bool, dtype: torch.dtype, nudged: int | None = None) -> list[float]:
        model = made(accelerated, dtype)
        if nudged is not None:
            nudge(model, nudged)
        return train(case, model, steps, rows, quick, dtype)

    def moved(dtype: torch.dtype, before: list[float], ours: float) -> float:
        """The largest of a few nudges; of more, where none of those reaches what is to be allowed."""
        worst = FLOOR_32 if dtype == torch.float32 else 0.0
        for i in range(MOST_NUDGES):
            if i >= NUDGES and ours <= ALLOWED_NUDGES * worst:
                break
            worst = max(worst, apart(run(False, dtype, i), before))
        return worst

    before = run(False, torch.float64)
    wide = apart(run(True, torch.float64), before)
    allowed = ALLOWED_64 if wide <= ALLOWED_64 else ALLOWED_NUDGES * moved(torch.float64, before, wide)
    before, after = run(False, torch.float32), run(True, torch.float32)
    narrow = apart(after, before)
    nudged = moved(torch.float32, before, narrow)
    gate = "passed"
    if not wide <= allowed:
        gate = f"float64 losses part by {wide:.1e}, where {allowed:.1e} is allowed"
    elif not narrow <= ALLOWED_NUDGES * nudged:
        gate = f"float32 losses part by {narrow:.1e}, those of nudged weights by {nudged:.1e}"
    return {
        "steps": steps, "rows": rows, "float64": wide, "float32": narrow, "nudged": nudged, "gate": gate,
        "before": [float(f"{v:.7g}") for v in before], "after": [float(f"{v:.7g}") for v in after],
    }  # fmt: skip
