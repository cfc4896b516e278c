"""What nvcc made of the CUDA kernels: registers, stack, and the width of their global accesses, from the built module.

    python tests/csrc/machine_code.py --write     # after a change: rewrites csrc/cuda/resources.txt

Needs nfkernels._C_cuda, cuobjdump and nvdisasm (the CUDA toolkit's, or those in Triton's package); no GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock  # torch brings it

sys.path.insert(0, str(Path(__file__).parents[1]))
import sass

TABLE = Path(__file__).parents[2] / "csrc/cuda/resources.txt"
IN_TABLE = ("sm_80", "sm_90")
# Names (patterns) of the kernels that must load and store 16 bytes at a time.
HOT: list[str] = [
    r"affine_coupling: (forward|backward)_lines<.*, [248](, \w+)?>",
    r"affine_coupling: (forward|backward)_staged<.*>",
    r"channel_mix: few_(forward|backward)<.*>",
    r"channel_mix_tensor: (fused_forward|fused_backward|wide_product)<.*>",
    r"channel_mix_double: product",
    r"coupling_mix: mix_forward<.*>",
    r"coupling_mix_backward: mix_backward<.*>",
    r"dequantize: dequantize::\w+_runs<.*>",
    r"gaussian::run_backward<.*, [248]>",
    r"rational_quadratic_spline_backward: spline_gradients<.*>",
]
# Those that must load so, and write one number for each sample or element.
HOT_READERS: list[str] = [r"gaussian::run_forward<.*, [248]>", r"rational_quadratic_spline: spline_elements<.*>"]


@dataclass
class Kernel:
    registers: int
    stack: int  # bytes; above 0: an array indexed at run time, or spills
    spills: int  # loads and stores of local memory
    accesses: dict[str, int]  # global ones, by kind and bits: {"LDG.128": 4}

    def cell(self) -> str:
        wide = sum(n for kind, n in self.accesses.items() if kind.endswith(".128"))
        return f"{self.registers:>4} {wide:>4}"


def module_path() -> Path | None:
    spec = importlib.util.find_spec("nfkernels._C_cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=8)
def kernels(architecture: str) -> dict[str, Kernel]:
    """Every kernel of the built module on one architecture, by its readable name. To disassemble takes seconds:
    parallel test workers share what the first of them found."""
    built = module_path().stat()
    name = f"nfkernels-machine-code-{os.getuid()}-{built.st_mtime_ns}-{built.st_size}-{architecture}.json"
    shared = Path(tempfile.gettempdir()) / name
    with FileLock(f"{shared}.lock"):
        if not shared.is_file():
            found = {name: asdict(kernel) for name, kernel in disassembled(architecture).items()}
            shared.write_text(json.dumps(found), encoding="utf-8")
        return {name: Kernel(**kernel) for name, kernel in json.loads(shared.read_text(encoding="utf-8")).items()}


def disassembled(architecture: str) -> dict[str, Kernel]:
    tool, path = sass.tool("cuobjdump"), str(module_path())
    found: dict[str, Kernel] = {}
    usage = _output(tool, "--dump-resource-usage", "-arch", architecture, path)
    for symbol, text in re.findall(r"Function (\S+):\n\s+(.*)", usage):
        number = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        found[symbol] = Kernel(number["REG"], number["STACK"] + number["LOCAL"], 0, {})
    for symbol, text in instructions(tool, path, architecture).items():
        found[symbol].spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        found[symbol].accesses = sass.global_accesses(text)
    names = subprocess.run(
        [shutil.which("c++filt") or "c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    named = {}
    for symbol, name, kernel in zip(found, names, found.values(), strict=True):
        file = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_", symbol)
        key = f"{file[1]}: {readable(name)}" if file else readable(name)  # a file's own kernels, or visible ones
        assert key not in named, f"two kernels are called {key}"
        named[key] = kernel
    return dict(sorted(named.items()))


def instructions(tool: str, path: str, architecture: str) -> dict[str, str]:
    codes: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool, "-xelf", "all", "-arch", architecture, path], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).iterdir()):
            codes |= sass.code_of(cubin.read_bytes())
    return dict(zip(codes, sass.disassembled([*codes.values()], architecture), strict=True))


def readable(name: str) -> str:
    """``void nf::cuda::(anonymous namespace)::tile<float, 4>(Args)`` is ``tile<float, 4>``."""
    name = re.sub(r"\(anonymous namespace\)::|nf::cuda::|nf::|^void ", "", name)
    name = re.sub(r"\(DType\)(\d)", lambda match: ("f32", "f64", "bf16", "f16")[int(match[1])], name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and i:
            return name[:i]
    return name


def compiler() -> str:
    importlib.import_module("torch")  # whose libraries the module needs
    return importlib.import_module("nfkernels._C_cuda").compiler


def launch_shapes() -> dict[str, tuple[int, int]]:
    """Kernel, without its namespace -> threads and the most shared memory, of the calls in launch_shapes.py."""
    script = Path(__file__).with_name("launch_shapes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {base(name): (threads, shared) for name, threads, shared in json.loads(done.stdout)}


def base(name: str) -> str:
    """``gaussian::tile<float>`` is ``tile<float>``."""
    head, angle, rest = readable(name).partition("<")
    return head.rsplit("::", 1)[-1].split(": ")[-1] + angle + rest


def table(architectures: tuple[str, ...] = IN_TABLE) -> str:
    """One line per kernel: threads, shared memory, and registers and 16-byte accesses on each architecture."""
    columns, shapes = [kernels(a) for a in architectures], launch_shapes()
    width = max(map(len, columns[0]))
    lines = [
        "# Every CUDA kernel: threads of a block and the most shared memory that the calls in",
        "# tests/csrc/launch_shapes.py ask for (nothing where none launches it); on each architecture a thread's",
        "# registers, and how many 16-byte accesses to global memory its code has. Stack and spills are 0 on both",
        "# (tests/csrc/test_machine_code.py).",
        f"# Made by {compiler()}; rewrite with: python tests/csrc/machine_code.py --write",
        f"{'kernel':<{width}}  threads  shared  " + "  ".join(f"{a:>9}" for a in architectures),
    ]
    for name in columns[0]:
        threads, shared = shapes.get(base(name), ("", ""))
        cells = "  ".join(c[name].cell() for c in columns)
        lines.append(f"{name:<{width}}  {threads:>7}  {shared:>6}  {cells}")
    return "\n".join(lines) + "\n"


def column(text: str, architecture: str) -> list[str]:
    """The kernels of a table, on one of its architectures."""
    header, *lines = text[text.index("\nkernel ") + 1 :].splitlines()
    end = header.index(architecture) + len(architecture)
    return [line[: header.index("sm_") - 4] + line[end - 9 : end] for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of printing it")
    if parser.parse_args().write:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        sys.stdout.write(table())
