"""Builds ``nfkernels._C``, the CPU kernels, with ninja. Metadata is in pyproject.toml.

``NFKERNELS_CPU=0`` leaves the module out, ``1`` makes a failure to build it fatal; by default (``auto``) an
installation without a working compiler succeeds, loudly, and runs on the PyTorch reference.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = ["affine_coupling", "channel_mix"]
OPTIMISE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Each kernel file is compiled once per set; isa.cpp chooses at run time.
X86_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
}
TORCH_TARGET = "0x020a000000000000"  # libtorch stable ABI of 2.10: one file serves every later torch


def schema_version() -> str:
    text = (ROOT / "nfkernels/ops/_library.py").read_text(encoding="utf-8")
    return re.search(r"^SCHEMA_VERSION = (\d+)$", text, re.MULTILINE).group(1)


class Build(build_ext):
    """Writes a ninja file for the extension's sources and links what it makes."""

    def build_extension(self, extension: Extension) -> None:
        wanted = os.environ.get("NFKERNELS_CPU", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"NFKERNELS_CPU must be 0, 1 or auto, got {wanted!r}")
        if wanted == "0":
            self.announce_missing("NFKERNELS_CPU=0 left it out")
            return
        try:
            self.compile(Path(self.get_ext_fullpath(extension.name)))
        except Exception as error:
            if wanted == "1":
                raise
            self.announce_missing(str(error))

    def announce_missing(self, why: str) -> None:
        line = "=" * 100
        message = (
            f"\n{line}\nnfkernels: the compiled CPU kernels (nfkernels._C) were NOT built.\n  reason: {why}\n"
            "  Everything works on the plain PyTorch reference, several times slower on the CPU.\n"
            "  To get them: install a C++17 compiler (Debian: apt-get install g++) and ninja, then install again.\n"
            f"{line}\n"
        )
        print(message, file=sys.stderr, flush=True)
        # pip swallows the output of a build that succeeds; a terminal, if there is one, is told all the same.
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(message)

    def compile(self, output: Path) -> None:
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            raise RuntimeError(
                "torch is not importable in the build; install it first and add --no-build-isolation"
            ) from None
        if tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 10):
            raise RuntimeError(f"torch {torch.__version__} is older than 2.10")
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        ninja = shutil.which("ninja") or self.ninja_module()
        if not compiler or not shutil.which(compiler.split()[0]):
            raise RuntimeError(f"no C++ compiler found ({compiler or 'neither g++ nor clang++'})")
        if not ninja:
            raise RuntimeError("ninja was not found (pip install ninja)")

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sets = X86_SETS if x86 else {"baseline": []}
        defines = [f"-DNF_SCHEMA_VERSION={schema_version()}", "-DPy_LIMITED_API=0x030a0000"]
        defines += ["-DNF_HAVE_X86_SETS"] if x86 else []
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]
        torch_flags += [f"-isystem {self.quote(p)}" for p in include_paths()]
        python = [f"-isystem {self.quote(sysconfig.get_paths()['include'])}"]
        jobs = [
            (f"cpu/{name}.cpp", f"{name}_{isa}", OPTIMISE + flags) for name in KERNELS for isa, flags in sets.items()
        ]
        jobs += [("cpu/isa.cpp", "isa", ["-O2"]), ("bindings/cpu.cpp", "bindings_cpu", ["-O2", *torch_flags])]
        jobs += [("bindings/module.cpp", "module", ["-O2", *python])]

        lines = [f"cxx = {compiler}", "rule compile"]
        lines += ["  command = $cxx -MMD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", "  command = $cxx -shared $in -o $out $flags"]
        objects = []
        for source, name, flags in jobs:
            objects.append(f"{name}.o")
            lines.append(f"build {name}.o: compile {self.escape(ROOT.resolve() / 'csrc' / source)}")
            lines.append("  flags = " + " ".join([*COMMON, *flags, *defines]))
        link = ["-Wl,--no-as-needed"]
        link += [f"-L{self.quote(p)}" for p in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        lines.append(f"build {self.escape(output)}: link {' '.join(objects)}")
        lines.append("  flags = " + " ".join(link))
        (build / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [ninja, "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            raise RuntimeError("the compiler failed:\n" + "\n".join(done.stdout.splitlines()[-30:]))

    @staticmethod
    def ninja_module():
        try:
            import ninja
        except ImportError:
            return None
        return str(Path(ninja.BIN_DIR) / "ninja")

    @staticmethod
    def quote(path) -> str:
        return f"'{path}'" if " " in str(path) else str(path)

    @staticmethod
    def escape(path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("nfkernels._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
