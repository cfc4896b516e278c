"""What a GPU run does around its measurements: building, the GPU tests, the memory checker. Each gives a small dict
with ``status`` ("done", "failed", "skipped", "cut short") and a sentence, and raises nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT, nvcc

SMOKE = "tests/gpu/test_smoke.py"
NO_CACHE = ("-p", "no:cacheprovider")


@dataclass
class Finished:
    """A command's end: its exit status, None if it ran out of time, and all it printed."""

    code: int | None
    text: str


Shell = Callable[[list[str], float, dict[str, str]], Finished]


def shell(command: list[str], limit: float, extra: dict[str, str]) -> Finished:
    """Runs a command in the source tree for at most ``limit`` seconds; what it printed comes back in any case."""
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": paths, **extra}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=max(limit, 1.0))
            return Finished(process.returncode, text)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own session: compilers and workers go with it
            text, _ = process.communicate()
            return Finished(None, text)


def _stage(status: str, reason: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "reason": reason, **more}


def stale(root: Path = ROOT) -> list[str]:
    """The compiled modules that are missing or older than a source."""
    sources = [p for p in (root / "csrc").rglob("*") if p.is_file()] + [root / "setup.py"]
    newest = max(p.stat().st_mtime for p in sources)
    found = []
    for name in ("_C", "_C_cuda"):
        built = [p.stat().st_mtime for p in (root / "nfkernels").glob(f"{name}.*so")]
        if not built or max(built) < newest:
            found.append(f"nfkernels.{name}")
    return found


def build(limit: float, architecture: str, run: Shell = shell, root: Path = ROOT) -> dict[str, Any]:
    """Builds in place what is missing or stale, for this GPU's architecture unless TORCH_CUDA_ARCH_LIST says others."""
    missing = stale(root)
    if not missing:
        return _stage("done", "both modules are newer than every source")
    if nvcc() is None:
        if "nfkernels._C" not in missing:
            return _stage("skipped", f"{' and '.join(missing)} missing or stale, and there is no nvcc")
        note = ", without nvcc"
    else:
        note = ""
    extra = {"NFKERNELS_CUDA": os.environ.get("NFKERNELS_CUDA", "auto")}
    extra["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", architecture)
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], limit, extra)
    left = stale(root)
    if done.code is None:
        return _stage("failed", f"building ran past {limit:.0f} s", log=_tail(done.text))
    if done.code or (left and not note):
        return _stage("failed", f"{' and '.join(left) or 'the build'} did not build", log=_tail(done.text))
    return _stage("done", f"built {' and '.join(missing)}{note} for {extra['TORCH_CUDA_ARCH_LIST']}")


WORDS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# Alone a test's name comes first, from one of several workers its outcome does.
OUTCOME = re.compile(rf"^(tests/\S+::.*?) {WORDS}\b", re.MULTILINE)
OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {WORDS} (tests/\S+::.*?) *$", re.MULTILINE)


def gpu_tests(limit: float, log: Path, run: Shell = shell) -> dict[str, Any]:
    """``pytest -m gpu``: how many passed, failed and were skipped, and which failed; the log beside the results."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu",
        "-v",
        "-rs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "3"]  # Triton's compiler takes most of the time, on the host
    done = run(command, limit, {})
    log.write_text(done.text, encoding="utf-8")
    outcomes = OUTCOME.findall(done.text) + [(name, word) for word, name in OF_WORKER.findall(done.text)]
    counts: dict[str, int] = {}
    for _, word in outcomes:
        counts[word.lower()] = counts.get(word.lower(), 0) + 1
    failures = sorted({name for name, word in outcomes if word in ("FAILED", "ERROR")})
    text = ", ".join(f"{n} {word}" for word, n in sorted(counts.items())) or "no test ran"
    if done.code is None:
        status = "failed" if failures else "cut short"
        return _stage(status, f"{text}; stopped after {limit:.0f} s", counts=counts, failures=failures)
    bad = done.code != 0 or not counts.get("passed")
    return _stage("failed" if bad else "done", text, counts=counts, failures=failures,
                  **({"log": _tail(done.text)} if bad else {}))  # fmt: skip


def sanitizer(limit: float, run: Shell = shell) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over the smoke tests, where the tool is there and takes the device."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in [Path("/usr/local/cuda/bin/compute-sanitizer")] if p.is_file()), None
    )
    if tool is None:
        return _stage("skipped", "compute-sanitizer is not here")
    found, status = {}, "done"
    for check in ("memcheck", "racecheck"):
        pytest = [sys.executable, "-m", "pytest", SMOKE, "-m", "gpu", "-q", *NO_CACHE]
        command = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "86", *pytest]
        # Without the caching allocator every tensor is an allocation of its own, whose bounds are watched.
        done = run(command, limit / 2, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        found[check] = _verdict(done, limit / 2)
        if found[check].startswith(("errors", "the tests")):
            status = "failed"
    reason = "; ".join(f"{check}: {text}" for check, text in found.items())
    clean = any(text == "no errors" for text in found.values())
    return _stage(status if status == "failed" or clean else "skipped", reason)


def _verdict(done: Finished, limit: float) -> str:
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.text)
    refused = re.search(r"Device not supported.*|Failed to initialize.*|Unable to .*", done.text)
    if done.code is None:
        return f"stopped after {limit:.0f} s"
    if refused:
        return f"does not work here: {refused.group(0).strip()}"
    if done.code == 86:
        return "errors: " + " ".join(summary)
    if done.code:
        return f"the tests failed under it: {_tail(done.text, 300)}"
    return "no errors"


def _tail(text: str, size: int = 3000) -> str:
    return text[-size:]
