"""Compiles the CUDA sources as C++ for the CPU, together with the emulator, into Python modules.

``python tests/emulator/build.py [plain|asan]`` builds both and prints where they are. What was built is kept under
``tests/emulator/build`` by the hash of everything that went into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = HERE / "build"
# Device code is compiled without type-based alias analysis and with every call returning to its line. Debug information
# is of lines alone: variables and types take a third of the compiler's time, and nobody reads them.
COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-optimize-sibling-calls"]
COMMON += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=fast", "-DNF_EMULATED", "-DNF_CUDA"]
VARIANTS = {
    "plain": ["-O2"],
    "ucontext": ["-O1", "-DNF_EMULATOR_UCONTEXT"],  # how fibers switch on processors other than x86-64
    "asan": [
        *("-O1", "-fno-omit-frame-pointer", "-DNF_EMULATOR_ASAN"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    ],
}
# The emulator's own code, whose time counts and which is not what the sanitizers are to look at; and bindings, whose
# time does not count, and whose headers take long to optimise.
CORE_FLAGS = ["-O2", "-fno-sanitize=all"]
HOST_FLAGS = ["-O0"]
MODULES = ("nfkernels_emulated", "nfkernels_planted")


def missing() -> str | None:
    """Why nothing can be built here (one sentence), or None."""
    if not sys.platform.startswith("linux"):
        return "the emulator runs on Linux"
    if not shutil.which(compiler()):
        return f"the emulator needs g++ ({compiler()} was not found)"
    for module in ("pybind11", "ninja"):
        if importlib.util.find_spec(module) is None:
            return f"the emulator needs {module} (pip install {module})"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs to load the ``asan`` variant: the run-time library comes first of all."""
    found = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")  # the second: else exceptions are not seen by the first
    ]
    return {
        "LD_PRELOAD": " ".join(str(Path(path.strip()).resolve()) for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _torch_flags() -> tuple[list[str], list[str]]:
    from torch.utils.cpp_extension import include_paths, library_paths

    target = _setting("setup.py", "TORCH_TARGET")
    compile_flags = [f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_STABLE_ONLY"]
    compile_flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    return compile_flags, [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]


def _setting(file: str, name: str) -> str:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"{name} = "))
    return line.split("=", 1)[1].split("#")[0].strip().strip('"')


@functools.cache
def _processor_flags() -> list[str]:
    """Fused multiply-add where this processor has it, as a GPU does."""
    with contextlib.suppress(OSError):
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        if "fma" in words and "avx2" in words:
            return ["-mavx2", "-mfma"]
    return []


def _jobs(module: str) -> tuple[list[tuple[Path, list[str]]], list[str]]:
    """(source, its flags) for every object of a module, and what it is linked with."""
    import pybind11

    device = [*_processor_flags(), "-I", str(HERE), "-I", str(ROOT / "csrc/cuda")]
    python = ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]
    jobs = [(path, device + CORE_FLAGS) for path in sorted(HERE.glob("*.cpp")) if path.name != "module.cpp"]
    if module == "nfkernels_planted":
        jobs += [(path, device) for path in sorted((HERE / "planted").glob("*.cu"))]
        return [*jobs, (HERE / "planted/module.cpp", device + python + HOST_FLAGS)], []
    torch_flags, link = _torch_flags()
    schema = f"-DNF_SCHEMA_VERSION={_setting('nfkernels/ops/_library.py', 'SCHEMA_VERSION')}"
    jobs += [(path, device) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    jobs += [(path, device) for path in sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    bindings = [p for p in sorted((ROOT / "csrc/bindings").glob("*.cpp")) if not p.name.startswith("module_")]
    jobs += [(path, torch_flags + HOST_FLAGS) for path in bindings]
    return [*jobs, (HERE / "module.cpp", [*torch_flags, *python, schema, *HOST_FLAGS])], link


def _hash(module: str, variant: str, jobs: list, link: list[str]) -> str:
    import torch

    digest = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest.update(
        repr((module, COMMON, VARIANTS[variant], jobs, link, version, sys.version, torch.__version__)).encode()
    )
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.rglob("*.h")]
    for path in sorted({*headers, *(source for source, _ in jobs)}):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(module: str, variant: str = "plain", folder: Path = BUILD) -> Path:
    """Builds one module unless these very sources were built before; returns its file."""
    jobs, link = _jobs(module)
    home = folder / f"{module}-{variant}"
    with _locked(home / "lock"):
        made = home / _hash(module, variant, jobs, link) / f"{module}.so"
        if not made.exists():
            _run_ninja(home, f"{module}.so", jobs, [*COMMON, *VARIANTS[variant]], [*VARIANTS[variant], *link])
            for old in home.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            made.parent.mkdir()
            shutil.copy2(home / made.name, made.with_suffix(".new"))
            made.with_suffix(".new").replace(made)
    return made


def _run_ninja(home: Path, target: str, jobs: list, flags: list[str], link: list[str]) -> None:
    import ninja

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command_line(words: list[str]) -> str:
        return " ".join(f"'{word}'" for word in words).replace("$", "$$")

    lines = [f"cxx = {compiler()}", f"common = {command_line(flags)}", "rule compile"]
    lines += ["  command = $cxx $common $flags -MMD -MF $out.d -x c++ -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc", "rule link", "  command = $cxx -shared $in -o $out $flags"]
    objects = []
    for source, own in jobs:
        name = str(source.relative_to(ROOT)).replace("/", "_") + ".o"
        objects.append(name)
        lines += [f"build {name}: compile {escape(source)}", f"  flags = {command_line(own)}"]
    lines += [f"build {target}: link {' '.join(objects)}", f"  flags = {command_line(link)}"]
    (home / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(home), "-j", os.environ.get("MAX_JOBS", "2")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError("the emulator's compiler failed:\n" + "\n".join(done.stdout.splitlines()[-40:]))


def load(module: str, variant: str = "plain") -> types.ModuleType:
    """Builds a module if needed and imports it. The ``asan`` variant needs ``sanitizer_environment()``."""
    if variant == "asan" and "libasan" not in Path("/proc/self/maps").read_text(encoding="utf-8"):
        settings = " ".join(f'{key}="{value}"' for key, value in sanitizer_environment().items())
        raise RuntimeError(f"the address sanitizer is not loaded; start the process with {settings}")
    if module == "nfkernels_emulated":
        import torch  # noqa: F401  (its libraries are what the module is linked with)
    spec = importlib.util.spec_from_file_location(module, build(module, variant))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    for which in MODULES:
        print(build(which, *sys.argv[1:2]))
