"""Builds ``nfkernels._C`` (CPU kernels) and ``nfkernels._C_cuda`` (CUDA kernels) with ninja. Metadata: pyproject.toml.

``NFKERNELS_CPU`` and ``NFKERNELS_CUDA`` are ``auto`` (the default), ``1`` (a failure to build that module is fatal) or
``0`` (leave it out). Under ``auto`` an installation without a working compiler succeeds, loudly, and runs on Triton and
on the PyTorch reference. CUDA needs nvcc, not a GPU and not a CUDA build of torch, but ``auto`` leaves it out for a CPU
build of torch, which cannot use it. ``TORCH_CUDA_ARCH_LIST`` (as in "9.0" or "8.0;9.0+PTX") names the architectures and
asks for them; by default they are those of the GPUs that are here, or where there is none all. ``MAX_JOBS`` bounds
parallel compilers.
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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Each: csrc/bindings/<op>.cpp, csrc/cpu/<op>.cpp, csrc/cuda/<op>*.cu
OPS = [
    "affine_coupling",
    "autoregressive_conv",
    "autoregressive_inverse",
    "channel_mix",
    "coupling_mix",
    "dequantize",
    "gaussian_log_density",
    "lu_compose",
    "lu_linear",
    "philox_uniform",
    "rational_quadratic_spline",
]
CPU_OPS = ["channel_affine", "dense_net", "lu_layer"]  # kernels on the CPU alone
OPTIMISE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Each kernel file is compiled once per set; isa.cpp chooses at run time.
X86_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
}
TORCH_TARGET = "0x020a000000000000"  # libtorch stable ABI of 2.10: one file serves every later torch
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]  # and PTX of the lowest, for whatever comes later


def schema_version() -> str:
    text = (ROOT / "nfkernels/ops/_library.py").read_text(encoding="utf-8")
    return re.search(r"^SCHEMA_VERSION = (\d+)$", text, re.MULTILINE).group(1)


def quote(path) -> str:
    return f"'{path}'" if " " in str(path) else str(path)


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if not found:
        try:
            import ninja
        except ImportError:
            raise RuntimeError("ninja was not found (pip install ninja)") from None
        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"no C++ compiler found ({compiler or 'neither g++ nor clang++'})")
    return compiler


def find_cuda() -> Path:
    """The toolkit's folder; what ``nvcc`` on the PATH is may be a wrapper script."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for folder in (
        [named] if named else ["/usr/local/cuda", shutil.which("nvcc") and Path(shutil.which("nvcc")).parents[1]]
    ):
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return Path(folder)
    raise RuntimeError(f"nvcc was not found ({named or 'neither CUDA_HOME nor /usr/local/cuda'})")


def architectures_named() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()


def gpus() -> list[str]:
    """The architectures of this machine's GPUs that the kernels are for, each once, as "90"."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", told, re.MULTILINE)}
    return [str(number) for number in sorted(found) if number >= 80]


def architectures(nvcc: Path) -> tuple[list[str], list[str]]:
    """(machine code for, PTX for): TORCH_CUDA_ARCH_LIST, the GPUs' own, or those of ARCHITECTURES that nvcc knows."""
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    wanted = architectures_named()
    here = gpus() if not wanted else []
    if here and all(a in known for a in here):
        return here, []
    if not wanted:
        code = [a for a in ARCHITECTURES if a in known]
        return code, code[:1]
    code, ptx = [], []
    for name in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", name)
        if not match or match[1] + match[2] not in known:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}: expected numbers such as 8.0 or 9.0+PTX that {nvcc} knows "
                f"({', '.join(known)})"
            )
        number = match[1] + match[2]
        if int(number) < 80:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {name!r}: the CUDA kernels need 8.0 (Ampere) or newer")
        code.append(number)
        ptx += [number] if match[4] else []
    return code, ptx


class NinjaFile:
    """The sources of one module, compiled and linked."""

    def __init__(self, build: Path, compiler: str) -> None:
        self.build, self.objects = build, []
        self.lines = [f"cxx = {compiler}", "rule compile"]
        self.lines += ["  command = $cxx -MMD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        self.lines += ["rule link", "  command = $cxx -shared $in -o $out $flags"]

    def add_nvcc(self, nvcc: Path) -> None:
        self.lines += [f"nvcc = {quote(nvcc)}", "rule cuda"]
        self.lines += ["  command = $nvcc -MD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]

    def compile(self, source: str, flags: list[str], *, name: str | None = None, rule: str = "compile") -> None:
        name = (name or source.replace("/", "_").rsplit(".", 1)[0]) + ".o"
        self.objects.append(name)
        self.lines += [f"build {name}: {rule} {escape(ROOT / 'csrc' / source)}", "  flags = " + " ".join(flags)]

    def run(self, output: Path, link: list[str]) -> None:
        output = output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.build.mkdir(parents=True, exist_ok=True)
        # Linked beside the objects and moved: an import under way never meets half a module.
        made = self.build / output.name
        self.lines += [f"build {escape(made)}: link {' '.join(self.objects)}", "  flags = " + " ".join(link)]
        (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        command = [find_ninja(), "-C", str(self.build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            raise RuntimeError("the compiler failed:\n" + "\n".join(done.stdout.splitlines()[-30:]))
        temporary = output.with_name(output.name + ".new")
        shutil.copy2(made, temporary)
        os.replace(temporary, output)


def torch_flags() -> tuple[list[str], list[str]]:
    """(to compile, to link) against libtorch's stable ABI."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        raise RuntimeError(
            "torch is not importable in the build; install it first and add --no-build-isolation"
        ) from None
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 10):
        raise RuntimeError(f"torch {torch.__version__} is older than 2.10")
    compile_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]
    compile_flags += [f"-isystem {quote(p)}" for p in include_paths()]
    link = ["-Wl,--no-as-needed", *(f"-L{quote(p)}" for p in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    return compile_flags, link


def module_flags() -> list[str]:
    """For the file that is the Python module."""
    python = f"-isystem {quote(sysconfig.get_paths()['include'])}"
    return [f"-DNF_SCHEMA_VERSION={schema_version()}", "-DPy_LIMITED_API=0x030a0000", python]


def torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def build_cpu(build: Path, output: Path) -> None:
    torch_compile, link = torch_flags()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    ninja = NinjaFile(build, find_compiler())
    for op in [*OPS, *CPU_OPS]:
        for isa, flags in (X86_SETS if x86 else {"baseline": []}).items():
            ninja.compile(f"cpu/{op}.cpp", [*COMMON, *OPTIMISE, *flags], name=f"cpu_{op}_{isa}")
        ninja.compile(f"bindings/{op}.cpp", [*COMMON, "-O2", *torch_compile])
    ninja.compile("cpu/isa.cpp", [*COMMON, "-O2", *(["-DNF_HAVE_X86_SETS"] if x86 else [])])
    ninja.compile("bindings/module_cpu.cpp", [*COMMON, "-O2", *torch_compile, *module_flags()])
    ninja.run(output, link)


def build_cuda(build: Path, output: Path) -> None:
    home, compiler = find_cuda(), find_compiler()
    nvcc = home / "bin" / "nvcc"
    torch_compile, link = torch_flags()
    if os.environ.get("NFKERNELS_CUDA") != "1" and not architectures_named() and not torch_has_cuda():
        raise RuntimeError(
            "this PyTorch is a CPU build (NFKERNELS_CUDA=1 or TORCH_CUDA_ARCH_LIST would build all the same)"
        )
    code, ptx = architectures(nvcc)
    ninja = NinjaFile(build, compiler)
    ninja.add_nvcc(nvcc)
    device = ["-std=c++17", "-O3", f"-ccbin {compiler.split()[0]}", "-Xcompiler -fPIC,-fvisibility=hidden"]
    device += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in code]
    device += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
    host = [*COMMON, "-O2", "-DNF_CUDA", *torch_compile]
    for op in OPS:
        ninja.compile(f"bindings/{op}.cpp", host)
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):  # an op may fill several
        ninja.compile(f"cuda/{path.name}", device, rule="cuda")
    ninja.compile("cuda/kernels.cpp", [*COMMON, "-O2"])
    named = ",".join([f"sm_{a}" for a in code] + [f"compute_{a}" for a in ptx])
    ninja.compile("bindings/module_cuda.cpp", [*host, *module_flags(), f"-DNF_CUDA_ARCHITECTURES='\"{named}\"'"])
    folders = [f"-L{quote(home / sub)}" for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    ninja.run(output, [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread", *link])


# module -> what builds it, the variable that asks for it, what is lost without it, what would help
MODULES = {
    "nfkernels._C": (
        build_cpu,
        "NFKERNELS_CPU",
        "compiled CPU kernels",
        "Everything works on the plain PyTorch reference, several times slower on the CPU.",
        "install a C++17 compiler (Debian: apt-get install g++) and ninja, then install again.",
    ),
    "nfkernels._C_cuda": (
        build_cuda,
        "NFKERNELS_CUDA",
        "CUDA kernels",
        "On an NVIDIA GPU the Triton kernels serve instead. Without such a GPU this does not matter.",
        "install a CUDA build of PyTorch and the toolkit (nvcc; set CUDA_HOME if it is not in /usr/local/cuda), then "
        "this again.",
    ),
}


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        build, variable, what, instead, cure = MODULES[extension.name]
        wanted = os.environ.get(variable, "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"{variable} must be 0, 1 or auto, got {wanted!r}")
        output = Path(self.get_ext_fullpath(extension.name))
        if not self.inplace:
            output.unlink(missing_ok=True)  # an earlier build's, which would be packed in this one's place
        try:
            if wanted == "0":
                raise RuntimeError(f"{variable}=0 left it out")
            folder = Path(self.build_temp).resolve() / extension.name.rsplit(".", 1)[1]
            build(folder, output)
        except Exception as error:
            if wanted == "1":
                raise
            line = "=" * 100
            message = (
                f"\n{line}\nnfkernels: the {what} ({extension.name}) were NOT built.\n  reason: {error}\n"
                f"  {instead}\n  To get them: {cure}\n{line}\n"
            )
            print(message, file=sys.stderr, flush=True)
            # pip swallows the output of a build that succeeds; a terminal, if there is one, is told all the same.
            # Few machines without a GPU have nvcc: only who asked for the module is told there that it is missing.
            if extension.name == "nfkernels._C" or shutil.which("nvidia-smi"):
                with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
                    terminal.write(message)


class Wheel(bdist_wheel):
    """Named after what is in it: ``cp310-abi3`` and a platform with a compiled module, ``py3-none-any`` with none."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            module = self.get_finalized_command("build_ext").get_ext_fullpath
            if not any(Path(module(name)).is_file() for name in MODULES):
                self.root_is_pure, self.distribution.ext_modules = True, None


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[], py_limited_api=True, optional=True) for name in MODULES],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
