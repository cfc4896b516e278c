"""Turns pytest-benchmark's JSON into the project's own: one small file of medians, and a Markdown table on stdout.

python -m pytest benchmarks/ops --benchmark-json=ops.json
python benchmarks/summarise.py ops.json benchmarks/results/<device>/ops.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

import nfkernels
from nfkernels.ops._library import serving


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def groups(raw: dict) -> dict[str, dict[str, dict[str, float]]]:
    """group -> contender -> microseconds (fastest and median) and, where counted, bytes saved for backward."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bench in raw["benchmarks"]:
        stats = bench["stats"]
        entry = {"min_us": round(stats["min"] * 1e6, 1), "median_us": round(stats["median"] * 1e6, 1)}
        found.setdefault(bench["group"], {})[bench["params"]["name"]] = entry | bench["extra_info"]
    return found


def table(results: dict) -> str:
    names = list(dict.fromkeys(name for group in results.values() for name in group))
    lines = ["| median, microseconds | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for group, entries in results.items():
        cells = [f"{entries[n]['median_us']:.0f}" if n in entries else "" for n in names]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = groups(raw)
    facts = {
        "date": str(date.today()),
        "commit": commit(),
        "nfkernels": nfkernels.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "kernels": " ".join(serving("_affine_coupling_forward", "cpu")),
        "cpu": raw["machine_info"]["cpu"].get("brand_raw", "unknown"),
    }
    target = Path(sys.argv[2])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
