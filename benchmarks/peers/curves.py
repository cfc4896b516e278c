"""The gate: the same training before and after, from one seed.

In float64 the loss may part by 1e-9 of its size in a hundred steps. In float32 training itself decides how far
roundings grow: the loss may part by three times what a change of one weight by one unit in the last place, of the
weight that matters most among a few, does to the original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cases import Case, Inputs, batches

ALLOWED_64 = 1e-9
ALLOWED_32 = 3.0
NUDGES = 3
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


def nudge(case: Case, model: nn.Module, which: int, batch: Inputs) -> None:
    """One weight to the next float above: of a matrix, the one that the loss depends on most; the matrices are spread
    over the model. (The largest weight of all may be one that a mask leaves out.)"""
    twin = copy.deepcopy(model)  # it may be initialised by the batch
    case.loss(twin.train(), *batch).backward()
    pull = [(p, t.grad * t.detach()) for p, t in zip(model.parameters(), twin.parameters()) if t.grad is not None]
    matrices = [(p, g.abs()) for p, g in pull if p.dim() > 1 and bool((g != 0).any())]
    weight, strength = matrices[which * (len(matrices) - 1) // max(1, NUDGES - 1)]
    with torch.no_grad():
        flat, index = weight.detach().view(-1), strength.flatten().argmax()
        flat[index] = torch.nextafter(flat[index], flat[index] * 2)


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
    original parts from itself. ``gate`` is "passed", or what is wrong."""

    def run(accelerated: bool, dtype: torch.dtype, which: int | None = None) -> list[float]:
        model = made(accelerated, dtype)
        if which is not None:
            device = next(model.parameters()).device
            nudge(case, model, which, next(batches(case, rows, 11, quick, device)))
        return train(case, model, steps, rows, quick, dtype)

    wide = apart(run(True, torch.float64), run(False, torch.float64))
    before, after = run(False, torch.float32), run(True, torch.float32)
    nudged = max(FLOOR_32, *(apart(run(False, torch.float32, i), before) for i in range(NUDGES)))
    narrow = apart(after, before)
    gate = "passed"
    if not wide <= ALLOWED_64:
        gate = f"float64 losses part by {wide:.1e}"
    elif not narrow <= ALLOWED_32 * nudged:
        gate = f"float32 losses part by {narrow:.1e}, a nudged weight's by {nudged:.1e}"
    return {
        "steps": steps, "rows": rows, "float64": wide, "float32": narrow, "nudged": nudged, "gate": gate,
        "before": [float(f"{v:.7g}") for v in before], "after": [float(f"{v:.7g}") for v in after],
    }  # fmt: skip
