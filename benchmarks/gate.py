"""The correctness gate: nothing is timed before its numbers were compared with the reference in float64.

Our kernels may be off by at most twice what plain PyTorch in the same dtype is, plus a few units in the last place;
others, whose precision is their own, by 1e-3 of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
FOREIGN = 1e-3  # relative error allowed to contenders that are not ours


@dataclass(frozen=True)
class Verdict:
    ok: bool
    error: float  # largest relative error, by norms, of any output
    reason: str = ""


def compare(got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], *, ours: bool = True) -> Verdict:
    """``got`` against ``exact`` (float64), by the error that ``plain`` makes. Says which output is how far off."""
    if len(got) != len(exact):
        return Verdict(False, math.inf, f"{len(got)} outputs where {len(exact)} are expected")
    largest = max((t.numel() for t in exact), default=0)
    worst, reasons = 0.0, []
    for index, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        if a.shape != c.shape or (ours and a.dtype != b.dtype):
            reasons.append(f"output {index} is {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(c.shape)}")
            continue
        if not a.numel():
            continue
        finite = torch.isfinite(c)
        if not bool((torch.isfinite(a) == finite).all()):
            worst = math.inf
            reasons.append(f"output {index} is not finite where it should be")
            continue
        difference = torch.where(finite, a.double() - c, 0.0)
        kept = torch.where(finite, c, 0.0)
        norm = kept.norm().item()
        relative = difference.norm().item() / (norm or 1.0)
        worst = max(worst, relative)
        if not ours:
            allowed = max(FOREIGN, 4 * EPS[a.dtype])
            if relative > allowed:
                reasons.append(f"output {index}: relative error {relative:.2g}, allowed {allowed:.2g}")
            continue
        terms = largest / a.numel()  # about how many are in each sum of a smaller output
        slack = 8 * EPS[a.dtype] * max(1.0, kept.abs().max().item()) * math.sqrt(terms)
        reference = torch.where(finite, b.double() - c, 0.0).abs().max().item()
        off = difference.abs().max().item()
        if not off <= 2 * reference + slack:
            reasons.append(f"output {index}: off by {off:.2g}, plain PyTorch by {reference:.2g}")
    return Verdict(not reasons, worst, "; ".join(reasons))


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two runs agree in every bit (NaNs by their bits, too)."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(whole[x.element_size()]), y.contiguous().view(whole[y.element_size()]))
        for x, y in zip(a, b, strict=True)
    )
