"""NVIDIA machine code as text, by the CUDA toolkit's nvdisasm or the one in Triton's package.

A start of it costs as much as reading a hundred kernels, and its analysis of the flow of control several times what
decoding costs: here many kernels go through one start, as plain instructions.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_WIDTH = re.compile(r"\.(128|64|U?S?16|U?S?8)\b")


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm, or None."""
    candidates = [shutil.which(name), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin" / name)
    return next((str(c) for c in candidates if c and Path(c).is_file()), None)


def code_of(cubin: bytes) -> dict[str, bytes]:
    """The instructions of every kernel in a cubin (an ELF file of 64 bits), by its symbol."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names, found = sections[of_names][4], {}
    for name, _, _, _, start, length in sections:
        text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = cubin[start : start + length]
    return found


def disassembled(codes: Sequence[bytes], architecture: str) -> list[str]:
    """The instructions of each kernel, a line for each. ``architecture``: "sm_90"."""
    number = architecture.removeprefix("sm_")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        # The larger set of instructions, where there are two.
        command = [tool("nvdisasm"), "-b", f"SM{number}" + "a" * (int(number) >= 90), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*(?:\{\s*)?/\*[0-9a-f]{4,}\*/\s*(.*)$", text, re.MULTILINE)
    assert len(lines) == sum(map(len, codes)) // 16, "nvdisasm left something out"
    ends = iter(lines)
    return ["\n".join(next(ends) for _ in range(len(code) // 16)) for code in codes]


def global_accesses(sass: str) -> dict[str, int]:
    """How many loads and stores of global memory there are, by kind and bits: {"LDG.128": 4}."""
    counts: dict[str, int] = {}
    for kind, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.[A-Z0-9_]+)*)", sass):
        width = _WIDTH.search(modifiers)
        key = f"{kind}.{width.group(1).lstrip('US') if width else '32'}"
        counts[key] = counts.get(key, 0) + 1
    return counts
