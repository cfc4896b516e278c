"""What the numbers were measured on: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def output_of(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def nvcc() -> str | None:
    """The CUDA compiler's path, looked for where setup.py does."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    paths = [str(Path(home) / "bin" / "nvcc") for home in homes if home] + [shutil.which("nvcc") or ""]
    return next((p for p in paths if p and Path(p).is_file()), None)


def commit_facts(commit: str | None = None) -> dict[str, Any]:
    """``commit`` and ``dirty``; a tree without git is told its commit by the caller, or has none."""
    if commit is not None:
        return {"commit": commit, "dirty": None}
    found = output_of("git", "rev-parse", "--short", "HEAD")
    if found is None:
        return {"commit": "unknown", "dirty": None}
    return {"commit": found, "dirty": bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))}


def versions() -> dict[str, str | None]:
    from nfkernels import __version__

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    compiler = nvcc()
    text = output_of(compiler, "--version") if compiler else None
    release = re.search(r"release ([\d.]+)", text or "")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "nvcc": release.group(1) if release else None,
        "nfkernels": __version__,
    }


def cpu_facts() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    sets = [s for s in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile") if s in present]
    return {
        "name": model.group(1) if model else platform.processor() or platform.machine(),
        "instruction_sets": sets,
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": _last_level_cache(),
    }


def _last_level_cache() -> int | None:
    sizes = [int(path.read_text().strip().rstrip("K")) for path in
             Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]  # fmt: skip
    return max(sizes) * 1024 if sizes else None


def gpu_facts(device: torch.device) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "driver": driver.splitlines()[0] if driver else None,
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "last_level_cache_bytes": getattr(p, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
        "cpu": cpu_facts()["name"],
    }


def device_name(kind: str, device: torch.device | None = None) -> str:
    """The folder of results: ``nvidia-h200``, ``cpu-avx512-2-threads``."""
    if kind == "gpu":
        return slug(torch.cuda.get_device_name(device))
    return f"cpu-{kernel_set()}-{torch.get_num_threads()}-threads"


def kernel_set() -> str:
    """The instruction set that the C++ kernels run on here."""
    from nfkernels.ops._library import serving

    return serving("_affine_coupling_forward", "cpu")[1].split()[-1] if _has_cpu_kernels() else "reference"


def _has_cpu_kernels() -> bool:
    from nfkernels.ops._library import serving

    return serving("_affine_coupling_forward", "cpu")[0] == "native"


def command_line(arguments: list[str]) -> str:
    """The command that ran, without where its results went."""
    kept = [a for before, a in zip(["", *arguments], arguments) if "--out" not in (before, a.split("=")[0])]
    return " ".join(["python -m benchmarks", *kept])


def facts(kind: str, device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything about one run but its results."""
    now = datetime.now(timezone.utc)
    where = gpu_facts(device) if kind == "gpu" else cpu_facts()
    return {
        "kind": kind,
        "folder": device_name(kind, device),
        "machine": where,
        "versions": versions(),
        **commit_facts(commit),
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M:%S UTC"),
        "command": command_line(sys.argv[1:]),
    }


def sentence(found: dict[str, Any]) -> str:
    """The machine in a line or two."""
    m, v = found["machine"], found["versions"]
    if found["kind"] == "gpu":
        where = (f"{m['name']}, compute capability {m['capability']}, {m['multiprocessors']} multiprocessors, "
                 f"{m['memory_bytes'] / 2**30:.0f} GiB, driver {m['driver']}")  # fmt: skip
    else:
        where = f"{m['name']}, {m['threads']} threads, {' '.join(m['instruction_sets']) or 'no vector sets'}"
    tools = ", ".join(f"{name} {version}" for name, version in v.items() if version)
    dirty = {True: " with changes", False: "", None: ""}[found["dirty"]]
    return f"{where}\n{tools}; commit {found['commit']}{dirty}, {found['date']}"
