"""`nfkernels info`: versions, devices, and which kernel serves each op and why."""

from __future__ import annotations

import argparse
import platform
from typing import Any

# Needed at run time; needed by some commands.
_PACKAGES = ("triton", "safetensors", "numpy")
_OPTIONAL = ("scikit-learn", "matplotlib", "pillow", "tqdm", "pyyaml", "pyarrow", "tensorboard", "argcomplete")


def info(options: argparse.Namespace) -> int:
    from ..training.as_json import print_json

    found = facts()
    if options.json:
        print_json(found)
        return 0
    for name, version in found["versions"].items():
        print(f"{name:<13} {version or 'not installed'}")
    print(f"{'cpu':<13} {found['cpu']}")
    for name, description in found["devices"].items():
        print(f"{name:<13} {description}")
    rows = [("op", "device", "kernel", "why"), *(tuple(row.values()) for row in found["ops"])]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for *cells, why in rows:
        print("  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [why]))
    return 0


def facts() -> dict[str, Any]:
    """What ``--json`` prints."""
    import torch

    from .. import __version__
    from ..ops import _library
    from ..training.session import devices_here, why_no_cuda

    versions: dict[str, str | None] = {
        "nfkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {package: _version(package) for package in (*_PACKAGES, *_OPTIONAL)}
    here = devices_here()
    devices = {}
    for name in here:
        if name.startswith("cuda"):
            card = torch.cuda.get_device_properties(name)
            memory = f"{card.total_memory / 2**30:.0f} GiB"
            devices[name] = f"{card.name}, {memory}, compute capability {card.major}.{card.minor}"
        elif name == "mps":
            devices[name] = "Apple GPU"
    if "cuda:0" not in here:
        devices["cuda"] = f"not here: {why_no_cuda()}"
    devices["cuda kernels"] = _library.cuda_module_state()
    ops = []
    for op in _library.op_names():
        for kind in dict.fromkeys(name.partition(":")[0] for name in here):
            kernel, why = _library.serving(op, kind)
            ops.append({"op": op.lstrip("_"), "device": kind, "kernel": kernel, "why": why})
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}"
    return {"versions": versions, "cpu": cpu, "devices": devices, "ops": ops}


def _version(package: str) -> str | None:
    from importlib import metadata  # half as slow to import as all the rest of --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
