"""The ops against their contenders with the calls interleaved, so that a busy machine slows all of them alike.

    python benchmarks/side_by_side.py [--out FILE.json]
    NFKERNELS_CPU_ISA=avx2 python benchmarks/side_by_side.py

One line per case: the fastest and the median call in microseconds, and how many times the op's own median that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "ops"))

import bench_affine_coupling as coupling
import bench_channel_mix as mix
from common import COPY, assert_close, copy_of

from nfkernels.ops._library import serving

ROUNDS, CALLS = 150, 3


def measure(contenders: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call(), call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {
        name: {"min_us": round(min(t), 1), "median_us": round(statistics.median(t), 1)} for name, t in times.items()
    }


def cases() -> dict[str, dict[str, Callable[[], object]]]:
    """Case -> contender -> call; every contender has been compared with the first."""
    found: dict[str, dict[str, Callable[[], object]]] = {}
    torch.manual_seed(0)
    runs = {"nfkernels": coupling.fused, "reference": coupling.reference, "hand-written": coupling.eager}
    for shape in coupling.SHAPES:
        x, params = torch.randn(shape), torch.randn(shape)
        found[f"affine_coupling forward {shape}"] = {n: (lambda f=f, x=x, p=params: f(x, p)) for n, f in runs.items()}
        found[f"affine_coupling forward {shape}"][COPY] = copy_of(3 * x.nbytes)
        a, b, dy, dl = (
            x.clone().requires_grad_(),
            params.clone().requires_grad_(),
            torch.randn(shape),
            torch.randn(shape[0]),
        )
        found[f"affine_coupling forward+backward {shape}"] = {
            n: (lambda f=f, a=a, b=b, dy=dy, dl=dl: torch.autograd.grad(f(a, b), [a, b], [dy, dl]))
            for n, f in runs.items()
        }
    runs = {"nfkernels": mix.channel_mix, "conv2d": mix.conv, "matmul": mix.eager}
    for channels in mix.CHANNELS:
        x, w = mix.inputs(channels)
        found[f"channel_mix forward {tuple(x.shape)}"] = {n: (lambda f=f, x=x, w=w: f(x, w)) for n, f in runs.items()}
        found[f"channel_mix forward {tuple(x.shape)}"][COPY] = copy_of(2 * x.nbytes)
        a, b, dy = x.clone().requires_grad_(), w.clone().requires_grad_(), torch.randn_like(x)
        found[f"channel_mix forward+backward {tuple(x.shape)}"] = {
            n: (lambda f=f, a=a, b=b, dy=dy: torch.autograd.grad(f(a, b), [a, b], dy)) for n, f in runs.items()
        }
    for contenders in found.values():
        calls = [call for name, call in contenders.items() if name != COPY]
        results = [r if isinstance(r := call(), tuple) else (r,) for call in calls]
        for other in results[1:]:
            assert_close(other, results[0], rtol=1e-3, atol=1e-2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the result as JSON")
    args = parser.parse_args()
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["kernels"] = " ".join(serving("_affine_coupling_forward", "cpu"))
    print(facts)
    results = {}
    for case, contenders in cases().items():
        results[case] = measure(contenders)
        own = results[case]["nfkernels"]["median_us"]
        cells = [
            f"{n} {v['min_us']:.0f}/{v['median_us']:.0f} ({v['median_us'] / own:.1f}x)"
            for n, v in results[case].items()
        ]
        print(f"{case}: " + ", ".join(cells))
    if args.out:
        Path(args.out).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
