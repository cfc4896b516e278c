"""The device's measured ceilings: copy bandwidth and matrix rates, and the floor they put under a case."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .timing import Prepared


def measure(device: torch.device, timer, *, copy_bytes: int, matrix: int) -> dict[str, float]:
    """Bytes per second of a large copy (read plus written) and flops per second of large matrix products."""
    found: dict[str, float] = {}
    with timer.ready():
        found["copy_bytes_per_s"] = 2 * copy_bytes / _copy_seconds(timer, copy_bytes, device)
        for name, dtype, tf32 in _products(device):
            a, b = (torch.randn(matrix, matrix, device=device).to(dtype) for _ in range(2))
            with _tf32(tf32):
                found[name] = 2 * matrix**3 / _fastest(timer, lambda a=a, b=b: torch.matmul(a, b))
    return {k: float(f"{v:.4g}") for k, v in found.items()}


def _copy_seconds(timer, n_bytes: int, device: torch.device) -> float:
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return _fastest(timer, lambda: target.copy_(source))


def _products(device: torch.device):
    if device.type != "cuda":
        return [("fp32_flops", torch.float32, False)]
    return [("fp32_flops", torch.float32, False), ("tf32_flops", torch.float32, True),
            ("bf16_flops", torch.bfloat16, False)]  # fmt: skip


@contextlib.contextmanager
def _tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fastest(timer, call) -> float:
    """Seconds of the median call on a GPU; of the fastest on a CPU, whose other work only slows it."""
    times = timer.measure({"": Prepared([call], contextlib.nullcontext)}, host=False)[""]
    return times["kernel_us"]["median"] / 1e6 if "kernel_us" in times else times["call_us"]["min"] / 1e6


def arithmetic(roofline: dict[str, Any]) -> float:
    """Flops per second that fp32-exact products may use: FMA, or three TF32 products where the matrix units win."""
    return max(roofline.get("fp32_flops", 0.0), roofline.get("tf32_flops", 0.0) / 3)


def floor_us(moved: float, flops: float, roofline: dict[str, Any]) -> float | None:
    """The least time for that many bytes and flops here, microseconds; None where nothing was measured."""
    if not roofline.get("copy_bytes_per_s"):
        return None
    by_bytes = moved / roofline["copy_bytes_per_s"]
    by_flops = flops / arithmetic(roofline) if flops and arithmetic(roofline) else 0.0
    return float(f"{max(by_bytes, by_flops) * 1e6:.4g}")
