"""Reading ``results/<device>/*.json``: the runs of every device, and the newest of each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .record import NOT_REACHED, SCHEMA


def runs(folder: Path) -> list[dict[str, Any]]:
    """A device's runs, oldest first; tiny trial runs and files of another kind are left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "schema" not in data or data.get("quick"):
            continue
        if data["schema"] != SCHEMA:
            raise ValueError(f"{path} has results schema {data['schema']}, this reader knows {SCHEMA}")
        found.append(data | {"file": path.name})
    return sorted(found, key=lambda d: (d["date"], d.get("time", ""), d["file"]))


def newest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One set of results from all runs of a device: facts, stages and every case from the newest run that has it."""
    merged = {**found[-1], "cases": [], "stages": {}}
    cases: dict[str, dict] = {}
    for data in found:
        merged["stages"] |= data["stages"]
        for case in data["cases"]:
            if any(entry["status"] != NOT_REACHED for entry in case["contenders"].values()) or case["id"] not in cases:
                origin = {"roofline": data["roofline"], "commit": data["commit"], "date": data["date"]}
                cases[case["id"]] = {**case, **origin}
        merged["roofline"] = data["roofline"] or merged["roofline"]
    merged["cases"] = list(cases.values())
    return merged


def devices(results: Path) -> dict[str, dict[str, Any]]:
    """Folder name -> newest results of every device that has any, GPUs first."""
    found = {}
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        of_device = runs(folder)
        if of_device:
            found[folder.name] = newest(of_device) | {"runs": [(d["date"], d["commit"]) for d in of_device]}
    return dict(sorted(found.items(), key=lambda item: (item[1]["kind"] != "gpu", item[0])))
