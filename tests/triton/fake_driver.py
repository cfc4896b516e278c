"""A Triton driver without a GPU: real launchers compile to real machine code, launches do nothing.

CPU tensors stand in for device tensors (Triton looks at their address and dtype alone), so a launcher's own grid,
specialisation and constexprs reach the compiler, for any architecture that Triton knows.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Binary:
    """One compiled kernel: its name, its machine code (an ELF file), the shared memory it asks for in bytes."""

    name: str = ""
    code: bytes = b""
    shared: int = 0


class _Utils:
    """What Triton asks of a driver's C module."""

    loading: Binary

    def get_device_properties(self, device: str) -> dict:
        return {"max_shared_mem": SHARED_LIMIT[device], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str):
        self.loading.name, self.loading.code, self.loading.shared = name, kernel, shared
        return object(), object(), 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class FakeDriver:
    """``launched`` holds the kernels in the order of their launches."""

    utils = _Utils()

    def __init__(self, target: str) -> None:
        self.target = target
        self.launched: list[Binary] = []

    def launcher_cls(self, src, metadata):
        """Made once for a kernel, just before it is loaded, and kept with it: other drivers will launch it too."""
        binary = self.utils.loading = Binary()

        def launch(*args) -> None:
            triton.runtime.driver.active.launched.append(binary)

        return launch

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target  # kernels are cached by device: a number could be a real GPU's

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[FakeDriver]:
    """Inside, launches compile for ``target`` and do nothing else."""
    driver = FakeDriver(target)
    config = triton.runtime.driver
    previous = config._active
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = previous  # reset_active() would look for a GPU


# --- what machine code shows -----------------------------------------------------------------------------------------


def _tool(name: str, binary: Binary, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(binary.code)
    try:
        done = subprocess.run([TOOLS / name, *arguments, file.name], capture_output=True, text=True, check=True)
    finally:
        os.unlink(file.name)
    return done.stdout


def resources(binary: Binary) -> tuple[int, int]:
    """Bytes of stack (above 0: registers spill) and registers of a cubin's kernel."""
    usage = _tool("cuobjdump", binary, "--dump-resource-usage")
    return tuple(max(int(n) for n in re.findall(rf"{name}:(\d+)", usage)) for name in ("STACK", "REG"))


def amd_scratch(binary: Binary) -> dict[str, int]:
    """What an AMD kernel keeps outside its registers, from the metadata (msgpack) in its code object."""
    counts = {}
    for key in ("vgpr_spill_count", "private_segment_fixed_size"):
        at = binary.code.index(f".{key}".encode()) + len(key) + 1
        first = binary.code[at]  # up to 0x7f the number itself, 0xcc .. 0xce: one, two or four bytes follow
        size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(first, 0)
        counts[key] = int.from_bytes(binary.code[at + 1 : at + 1 + size], "big") if size else first
    return counts


def disassembly(target: str, binaries: list[Binary]) -> list[str]:
    """The machine code of NVIDIA kernels as text; one call for many takes hardly longer than for one."""
    codes = [code for binary in binaries for code in sass.code_of(binary.code).values()]
    assert len(codes) == len(binaries)
    return sass.disassembled(codes, target)


def accesses(target: str, binaries: list[Binary]) -> list[dict[str, int]]:
    """The loads and stores of global memory of every kernel, by width."""
    return [sass.global_accesses(text) for text in disassembly(target, binaries)]
