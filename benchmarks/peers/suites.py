"""``python -m benchmarks peers --suites DIR``: the libraries' own tests, as they are and with their layers swapped.

DIR holds their unpacked source distributions (``pip download --no-binary :all: --no-deps nflows``, ``tar xf``). Each
suite runs in a process of its own: plain, with every layer proved at its first call, and with every layer trusted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..record import Budget
from . import page
from .run import Say, opened
from .suite_plugin import MODES

ROOT = Path(__file__).resolve().parents[2]
# Where each library has its tests, in its source distribution.
SUITES = {"nflows": "tests", "normflows": "normflows", "zuko": "tests", "FrEIA": "tests"}
_OUTCOMES = ("passed", "failed", "skipped")
LIMIT = 1800.0  # seconds of a run


def found(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Library -> its unpacked source distribution. ``ValueError`` where there is none at all."""
    known = {name: sorted(folder.glob(f"{name}-[0-9]*")) for name in SUITES}
    here = {n: paths[-1] for n, paths in known.items() if paths and (not names or n in names) and paths[-1].is_dir()}
    if not here:
        raise ValueError(f"{folder} holds no unpacked source distribution of {', '.join(names or SUITES)}")
    return here


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Test -> its outcome and, unless it passed, the message's first line; from a JUnit file."""
    tests: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        state, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                state, why = "failed", (child.get("message") or "").strip().splitlines()[:1]
                why = why[0] if why else ""
                break
            if child.tag == "skipped":
                state, why = "skipped", child.get("message") or ""
        classname = case.get("classname") or ""
        tests[f"{classname}::{case.get('name')}" if classname else str(case.get("name"))] = state, why[:200]
    return tests


def run_suite(source: Path, tests: str, mode: str, limit: float = LIMIT) -> dict[str, Any]:
    """One run of one suite. ``RuntimeError`` where pytest itself failed."""
    with tempfile.TemporaryDirectory() as folder:
        report, told = Path(folder) / "tests.xml", Path(folder) / "told.json"
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ, "NFKERNELS_SUITE": mode, "NFKERNELS_SUITE_OUT": str(told),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", tests, "-q", "-p", "benchmarks.peers.suite_plugin"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "ignore", f"--rootdir={source}", "-c"]
        command += [os.devnull, "-o", "python_files=test_*.py *_test.py", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=limit)
        if done.returncode not in (0, 1) or not report.is_file():
            lines = (done.stdout + done.stderr).strip().splitlines() or [""]
            first = next((line[1:].strip() for line in lines if re.match("E +[A-Z]", line)), lines[-1])
            raise RuntimeError(f"pytest ended with {done.returncode}: {first}"[:300])
        tests_ = outcomes(report)
        counts = Counter(state for state, _ in tests_.values())
        return {"tests": tests_, "counts": {o: counts[o] for o in _OUTCOMES}, **json.loads(told.read_text())}


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Which tests fail in every run, and which end otherwise in one that is swapped than in the plain one."""
    plain = runs["plain"]["tests"]
    names = list(dict.fromkeys(name for run in runs.values() for name in run["tests"]))
    differ, both = [], []
    for name in names:
        states = {mode: run["tests"].get(name, ("absent", ""))[0] for mode, run in runs.items()}
        if len(set(states.values())) > 1:
            why = [run["tests"][name][1] for m, run in runs.items() if name in run["tests"] and states[m] == "failed"]
            differ.append({"test": name, "states": states, "reason": why[0] if why else ""})
        elif states["plain"] == "failed":
            both.append({"test": name, "reason": plain[name][1]})
    return {"differ": differ, "both_fail": both}


def measure(name: str, source: Path, run: Callable[..., dict] = run_suite) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "library": name, "text": source.name, "version": source.name.split("-")[-1]}
    if not (source / SUITES[name]).is_dir():
        return entry | {"status": "no tests", "reason": "its source distribution has none"}
    try:
        runs = {mode: run(source, SUITES[name], mode) for mode in MODES}
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return entry | {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    told = {mode: {k: v for k, v in of.items() if k != "tests"} for mode, of in runs.items()}
    return entry | {"status": "measured", "runs": told, **compared(runs)}


def run(
    out: Path,
    folder: Path,
    *,
    quick: bool,
    names: Sequence[str],
    commit: str | None,
    say: Say = lambda line: print(line, flush=True),
) -> int:
    """Writes ``out/<device>/suites-<date>-<commit>.json``; the exit status is 1 if a test that passes fails when layers
    are swapped. ``names``: libraries; ``ValueError`` where DIR holds none."""
    sources = found(folder, names)
    saved = opened(out, "suites", "suites", "cpu", commit, quick, Budget(None), say)
    entries = saved.data["suites"]
    with saved.whole():
        for name, source in sources.items():
            saved.add(measure(name, source))
            say(f"{name}: {entries[-1]['status']}")
    say(f"\n{page.suites_table(entries)}\n\n{page.suites_details(entries)}\n\n{saved.path}")
    differ = ((e["id"], d) for e in entries for d in e.get("differ", ()))
    worse = [f"{library}: {d['test']}" for library, d in differ if d["states"]["plain"] == "passed"]
    worse += [f"{e['id']}: {e['reason']}" for e in entries if e["status"] == "failed"]
    for test in worse:
        say(f"PROBLEM: {test}")
    return 1 if worse else 0
