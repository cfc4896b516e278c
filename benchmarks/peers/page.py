"""Results as text: the README's block and a page for each device. No time without a green gate."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..tables import NOT_MEASURED

BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
COMMAND = "`python -m benchmarks peers`"
MEASURES = {"step": "training step", "outside": "outside networks", "log_prob": "log_prob", "sample": "sampling"}
SLOWER = 0.95
LEGEND = f"""Made by `python -m benchmarks report` from {COMMAND}: each library's own model, built its own way, before
and after `nfkernels.accelerate(model, x)`, in one process, in turns: medians in milliseconds, and the factor with its
10th and 90th percentile over the turns. A model is timed only if `log_prob`, samples and gradients agree in float64 and
if it trains as before from the same seed: in float64 the loss of 100 steps parts by at most 1e-9 of its size, or, as
in float32, by at most three times what a change of the weights by one unit in the last place (*nudged*) does to the
original. *Outside networks*: forward and backward with the networks replaced by what they returned; the optimiser is
not run."""
SUITES = """The libraries' own tests, from their source distributions, as they are and with every layer that an adapter
serves swapped as it is constructed: *proved*: at its first call, as `accelerate(model)` does; *trusted*: without a
proof (`verify=False`)."""
SIZES = """Single layers on tables, by `python -m benchmarks peers --sizes`: how much faster the swapped layer is:
forward, then forward and backward, small networks included. In brackets: `accelerate` does not make that swap."""

# What a device's folder may hold, and what its entries are called.
_KINDS = {"peers": "cases", "suites": "suites", "sizes": "layers"}


def newest(folder: Path, kind: str, key: str) -> dict[str, Any] | None:
    """A device's newest facts, and of each entry the newest that was reached, by its id."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}-2*.json"))]
    runs = sorted((r for r in runs if not r["quick"]), key=lambda r: (r["date"], r["time"]))
    entries: dict[str, dict] = {}
    for run in runs:
        for entry in run[key]:
            if entry["status"] not in ("unavailable", "not reached") or entry["id"] not in entries:
                entries[entry["id"]] = entry | {"date": run["date"], "commit": run["commit"]}
    return runs[-1] | {key: list(entries.values())} if runs else None


def devices(results: Path) -> dict[str, dict[str, Any]]:
    """Folder name -> ``{"peers": ..., "suites": ..., "sizes": ...}`` of every device that has any, GPUs first."""
    found = {}
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        of = {kind: newest(folder, kind, key) for kind, key in _KINDS.items()}
        if any(of.values()):
            found[folder.name] = of
    return dict(sorted(found.items(), key=lambda item: (_facts(item[1])["kind"] != "gpu", item[0])))


def _facts(of: dict[str, Any]) -> dict[str, Any]:
    return next(filter(None, of.values()))


# --- a model ----------------------------------------------------------------------------------------------------------


def cell(entry: dict[str, Any], name: str) -> str:
    """``16.2 -> 7.05, **2.3x** (2.2 to 2.4)``, with the goal where one was set, and told where it got slower."""
    measured, goal = entry.get("measures", {}).get(name), entry.get("asked", {}).get(name)
    if measured is None:
        return ""
    b, a, r = measured["before_ms"]["median"], measured["after_ms"]["median"], measured["ratio"]
    slower = " **SLOWER**" if _slower(entry, name) else ""
    asked = f"; goal {goal:g}x" if goal else ""
    return (
        f"{b:,.4g} → {a:,.4g}, **{_factor(r['median'])}** ({_factor(r['low'])} to {_factor(r['high'])}){asked}{slower}"
    )


def _slower(entry: dict[str, Any], name: str) -> bool:
    """By more than 5 %, unless a factor below 1 was asked for: where speed is traded for memory."""
    asked = entry.get("asked", {}).get(name, SLOWER)
    return entry["measures"][name]["ratio"]["median"] < min(SLOWER, asked)


def _factor(value: float) -> str:
    return f"{value:.2f}x" if value < 9.95 else f"{value:.0f}x"


def _pair(pair: Iterable[int] | None) -> str:
    return "" if not pair else " → ".join(f"{n / 2**20:,.3g}" for n in pair)


def layers(entry: dict[str, Any]) -> str:
    found = entry.get("layers", [])
    counts = {s: sum(x["count"] for x in found if x["status"] == s) for s in ("fused", "kept", "inactive", "pending")}
    return ", ".join(f"{n} {s}" for s, n in counts.items() if n) or "none"


def curves(entry: dict[str, Any]) -> str:
    c = entry.get("curves")
    return "" if c is None else f"{c['float64']:.0e}; {c['float32']:.0e}, nudged {c['nudged']:.0e}"


def table(entries: list[dict[str, Any]]) -> str:
    head = [*MEASURES.values(), "peak memory, MiB", "saved for backward, MiB", "layers", "losses part by"]
    lines = ["| model | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for e in entries:
        if e["status"] != "measured":
            told = {"wrong": "WRONG", "not reached": NOT_MEASURED}.get(e["status"], e["status"])
            lines.append(f"| {e['text']} | {told}: {e.get('reason', '')} |" + " |" * (len(head) - 1))
            continue
        memory = e.get("memory", {})
        cells = [cell(e, name) for name in MEASURES]
        cells += [_pair(memory.get("peak_bytes")), _pair(memory.get("saved_bytes")), layers(e), curves(e)]
        lines.append(f"| {e['text']}, batch {e['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole(entries: list[dict[str, Any]]) -> str:
    """Trainings from end to end, where a case has one."""
    with_it = [e for e in entries if "whole" in e.get("measures", {})]
    lines = [
        f"- {e['text']}, 40 epochs of 4,000 simulations from end to end, the proof included, ms: {cell(e, 'whole')}"
        for e in with_it
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def kept(entries: list[dict[str, Any]]) -> str:
    lines = ["| model | class | | why |", "|---|---|---|---|"]
    for e in entries:
        for x in e.get("layers", []):
            lines.append(f"| {e['id']} | {x['count']} x `{x['layer']}` | {x['status']} | {_plain(x['reason'])} |")
        lines += [f"| {e['id']} | | note | {note} |" for note in e.get("notes", [])]
        lines += [f"| {e['id']} | | no {part} | {why} |" for part, why in e.get("lacks", {}).items()]
    return "\n".join(lines)


# --- suites -----------------------------------------------------------------------------------------------------------


def suites_table(suites: list[dict[str, Any]]) -> str:
    lines = [
        "| library | tests | as they are | swapped, proved | swapped, trusted | layers | outcomes that differ |",
        "|---|---:|---|---|---|---:|---|",
    ]
    for s in suites:
        if s["status"] != "measured":
            lines.append(f"| {s['text']} | | {s['status']}: {s['reason']} | | | | |")
            continue
        runs = s["runs"]
        total = sum(runs["plain"]["counts"].values())
        cells = [_counts(runs[mode]["counts"]) if mode in runs else "" for mode in ("plain", "proved", "trusted")]
        swapped = sum(runs.get("trusted", runs["plain"]).get("swapped", {}).values())
        differ = ", ".join(f"`{d['test']}`" for d in s["differ"]) or "none"
        lines.append(f"| {s['text']} | {total} | {' | '.join(cells)} | {swapped:,} | {differ} |")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def suites_details(suites: list[dict[str, Any]]) -> str:
    parts = []
    for s in suites:
        if s["status"] != "measured":
            continue
        parts.append(f"### {s['text']}")
        if s["both_fail"]:
            parts.append("Fail as they are, and swapped alike:")
            parts.append("\n".join(f"- `{t['test']}`: {t['reason']}" for t in s["both_fail"]))
        for d in s["differ"]:
            told = "; ".join(f"{mode}: {state}" for mode, state in d["states"].items())
            parts.append(f"- `{d['test']}`: {told}. {d['reason']}")
        proofs = s["runs"].get("proved", {}).get("proofs", {})
        if proofs:
            lines = ["| class | proved at its first call | | why |", "|---|---:|---|---|"]
            lines += [f"| `{p['layer']}` | {p['count']} | {p['status']} | {_plain(p['reason'])} |" for p in proofs]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


# --- single layers on tables ------------------------------------------------------------------------------------------


def sizes_table(entries: list[dict[str, Any]]) -> str:
    sizes = list(dict.fromkeys((s["rows"], s["columns"]) for e in entries for s in e.get("sizes", ())))
    head = ["layer", *(f"{rows:,} x {columns}" for rows, columns in sizes)]
    rows = [head, ["---"] + ["---:"] * len(sizes)]
    for e in entries:
        cells = {(s["rows"], s["columns"]): _gains(s) for s in e.get("sizes", ())}
        rows.append([f"`{e['id']}`", *(cells.get(size, e.get("reason", e["status"])) for size in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _gains(size: dict[str, Any]) -> str:
    told = " ".join(f"{size[name]['ratio']['median']:.2f}" for name in ("forward", "step"))
    return told if size["swapped"] else f"({told})"


def sizes_problems(entries: list[dict[str, Any]]) -> list[str]:
    """What failed, and the swaps that are made and do not pay."""
    found = [f"{e['id']}: failed: {e['reason']}" for e in entries if e["status"] == "failed"]
    for e in entries:
        for s in e.get("sizes", ()):
            ratio = s["step"]["ratio"]["median"]
            if s["swapped"] and ratio < SLOWER:
                found.append(f"{e['id']}, {s['rows']} x {s['columns']}: {ratio}x: slower by more than 5 %")
    return found


# --- pages ------------------------------------------------------------------------------------------------------------


def source(data: dict[str, Any], key: str) -> str:
    listed = ", ".join(dict.fromkeys(f"{e['date']} at {e['commit']}" for e in data[key]))
    libraries = {e["library"]: e["version"] for e in data[key] if e.get("version")}
    told = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()) if name != "torch")
    m = data["machine"]
    threads = f", {m['threads']} threads" if "threads" in m else ""
    return f"{m['name']}{threads}, torch {data['versions']['torch']}, {told}; measured {listed}."


def block(results: Path) -> str:
    """What stands between the README's marks."""
    parts = [LEGEND]
    found = devices(results)
    for name, of in found.items():
        where = f"benchmarks/results/{name}"
        if of["peers"]:
            entries = of["peers"]["cases"]
            parts += [table(entries), whole(entries)]
            parts.append(f"{source(of['peers'], 'cases')} [Layer by layer]({where}/peers.md).")
            if drawable(entries):
                parts.append(f"![Loss curves before and after, {name}]({where}/peers.png)")
        if of["suites"]:
            parts += [SUITES, suites_table(of["suites"]["suites"])]
            parts.append(f"{source(of['suites'], 'suites')} [Test by test]({where}/peers.md).")
    if not found:
        parts.append(f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}.")
    return "\n\n".join(p for p in parts if p)


def text(name: str, of: dict[str, Any]) -> str:
    """A device's page."""
    parts = [f"# Other libraries' flows before and after accelerate, {_facts(of)['machine']['name']} ({name})"]
    if of["peers"]:
        entries = of["peers"]["cases"]
        parts += [LEGEND, table(entries), whole(entries), source(of["peers"], "cases")]
        if drawable(entries):
            parts.append("![Loss curves before and after](peers.png)")
        parts += ["## Layer by layer", kept(entries)]
    if of["suites"]:
        suites = of["suites"]["suites"]
        parts += ["## Their own tests", SUITES, suites_table(suites), source(of["suites"], "suites")]
        parts.append(suites_details(suites))
    if of["sizes"]:
        layers = of["sizes"]["layers"]
        parts += ["## Tables of many sizes", SIZES, sizes_table(layers), source(of["sizes"], "layers")]
    return "\n\n".join(p for p in parts if p) + "\n"


def drawable(entries: list[dict[str, Any]]) -> bool:
    return any("curves" in e for e in entries)


def problems(entries: list[dict[str, Any]]) -> list[str]:
    """What makes a run fail: a model that is wrong or failed, or anything that got slower."""
    found = []
    for e in entries:
        if e["status"] in ("wrong", "failed"):
            found.append(f"{e['id']}: {e['status']}: {e['reason']}")
        found += [f"{e['id']}: no {part}: {why}" for part, why in e.get("lacks", {}).items()]
        for name, measured in e.get("measures", {}).items():
            if _slower(e, name):
                found.append(f"{e['id']}, {name}: {measured['ratio']['median']}x: slower by more than 5 %")
    return found


def line(e: dict[str, Any]) -> str:
    if e["status"] != "measured":
        return f"{e['id']}: {e['status']} ({e.get('reason', '')})"
    told = ", ".join(f"{name} {m['ratio']['median']:.2f}x" for name, m in e["measures"].items())
    return f"{e['id']}: {told}; {layers(e)}; losses part by {curves(e)}"
