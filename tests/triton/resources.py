"""What Triton made of typical launches: warps, registers, shared memory, stack, and 16-byte global accesses.

    python tests/triton/resources.py --write     # after a change: rewrites nfkernels/triton/resources.txt

Needs no GPU (fake_driver.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_driver
import pytest
import test_ahead_of_time as launch
import triton
from test_ahead_of_time import BF16

TABLE = Path(__file__).parents[2] / "nfkernels/triton/resources.txt"
TARGETS = ("sm_80", "sm_90")


def cases(target: str):
    """(case, the kernels it launches): the headline shapes of the ops, float32."""
    image, mixed = (64, 48, 16, 16), {"params_dtype": BF16, "last": (False, True)}
    half = {"count": 24, "identity": "first"}
    yield "affine_coupling rows [4096, 64]", launch.coupling(target, (4096, 64), count=32, identity="first")
    yield f"affine_coupling {list(image)}", launch.coupling(target, image, **half)
    yield f"affine_coupling {list(image)}, rebuilding", launch.coupling(target, image, **half, rebuild=True)
    yield f"affine_coupling {list(image)}, bf16 channels-last params", launch.coupling(target, image, **half, **mixed)
    for channels in (12, 24, 48, 96):
        with pytest.MonkeyPatch.context() as patch:
            yield f"channel_mix C={channels}", launch.mix(target, patch, (64, channels, 16, 16))
    for channels in (12, 24, 48):
        with pytest.MonkeyPatch.context() as patch:
            yield f"coupling_mix C={channels}", launch.coupled_mix(target, patch, (64, channels, 16, 16))
    for count, channels in ((32, 48), (1, 64)):
        yield f"lu_compose K={count} C={channels}", launch.composed(target, count, channels)
    for learned in (False, True):
        name = "learned" if learned else "standard"
        yield f"gaussian_log_density {name}", launch.density(target, image, learned=learned)
    for width in (12, 64, 128):
        with pytest.MonkeyPatch.context() as patch:
            yield f"lu_linear D={width}", launch.lu(target, patch, (64, width, 16, 16))
    for inverse in (False, True):
        name = "inverse " if inverse else ""
        rows = launch.splined(target, (4096, 64), inverse=inverse)
        yield f"rational_quadratic_spline {name}rows [4096, 64]", rows
        yield f"rational_quadratic_spline {name}{list(image)}", launch.splined(target, image, inverse=inverse)
    yield "autoregressive_conv C=12", launch.convolved(target, (64, 12, 32, 32))
    yield "autoregressive_inverse D=20, 64 units", launch.undone(target, 512, 20, (64, 64))
    yield "autoregressive_inverse D=6, many samples", launch.undone(target, 65536, 6, (64, 64))
    yield "dequantize with a logit", launch.dequantized(target, (64, 3, 32, 32))


def table() -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for column, target in enumerate(TARGETS):
        kernels = {(case, b.name): b for case, binaries in cases(target) for b in binaries}
        for (key, binary), accesses in zip(kernels.items(), fake_driver.accesses(target, [*kernels.values()])):
            stack, registers = fake_driver.resources(binary)
            wide = sum(n for kind, n in accesses.items() if kind.endswith(".128"))
            cells = rows.setdefault(key, [" " * 24] * len(TARGETS))
            cells[column] = f"{registers:>4} {binary.shared:>7} {stack:>5} {wide:>5}"
    names = {key: f"{key[0]}: {key[1]}" for key in rows}
    width = max(map(len, names.values()))
    return "\n".join(
        [
            "# What Triton makes of typical launches: a thread's registers, the bytes of shared memory, the bytes of",
            "# stack (ptxas may park an address or two; a spill is more), 16-byte global accesses in the code.",
            f"# Made by Triton {triton.__version__}; rewrite with: python tests/triton/resources.py --write",
            f"{'':<{width}}  " + "  ".join(f"{target:<24}" for target in TARGETS).rstrip(),
            f"{'case: kernel':<{width}}  " + "  ".join("regs  shared stack  wide" for _ in TARGETS),
            *(f"{names[key]:<{width}}  " + "  ".join(cells).rstrip() for key, cells in rows.items()),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of printing it")
    if parser.parse_args().write:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        sys.stdout.write(table())
