"""What was counted and timed, as tables: for the terminal, and for marked blocks of ``docs/linear-flows.md`` and
``docs/flows.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..tables import NOT_MEASURED, microseconds
from .layers import Cost, sweeps
from .measure import DIRECTIONS, EXCESS, OURS, allowed, facts, growth

PAGE, FLOWS = "docs/linear-flows.md", "docs/flows.md"
MARKS = {kind: (f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->") for kind in ("complexity", "linear")}
SHORT = ("<!-- complexity-short:begin -->", "<!-- complexity-short:end -->")
TITLES = {"inverse": "inverse", "logdet": "log-det"}


def newest(folder: Path, kind: str, key: str) -> dict[str, Any] | None:
    """A device's results of one kind: its newest run's facts, and of each entry the newest measurement by its id."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}-*.json"))]
    runs = sorted((r for r in runs if not r["quick"]), key=lambda r: (r["date"], r["time"]))
    if not runs:
        return None
    entries = {e["id"]: e for r in runs for e in r[key] if e["gate"] != "not reached"}
    if key == "sweeps":  # in the table's order, without what it no longer has
        entries = {s.id: entries[s.id] for s in sweeps() if s.id in entries}
    return runs[-1] | {key: entries, "runs": list(dict.fromkeys((r["date"], r["commit"]) for r in runs))}


def cost(spelled: dict[str, Any]) -> Cost:
    return Cost(spelled["text"], spelled["exponent"], spelled["log"])


def exponent(entry: dict[str, Any], direction: str, name: str = OURS) -> float | None:
    state = entry.get("contenders", {}).get(name, {}).get(direction, {})
    return state.get("exponent") if state.get("status") == "measured" else None


def excess(entry: dict[str, Any], direction: str) -> float | None:
    """How far the fitted exponent is above that of the promised function at the same sizes."""
    fitted = exponent(entry, direction)
    if fitted is None:
        return None
    sizes = [n for n, *_ in entry["contenders"][OURS][direction]["times"]]
    return fitted - allowed(cost(entry["promise"][direction]), sizes)


def problems(entry: dict[str, Any]) -> list[str]:
    """What makes a run fail. A layer that was promised nothing (a random gather, say) may be slower than its claim."""
    if entry["gate"] == "not reached":
        return []
    found = [] if entry["gate"] == "passed" else [f"{entry['id']}: {entry['gate']}"]
    for d in DIRECTIONS:
        above = excess(entry, d)
        if entry["row"] and above is not None and above > EXCESS:
            found.append(f"{entry['id']}: the {TITLES[d]}'s time grows with an exponent {above:.2f} above the promise")
        if entry["contenders"][OURS][d]["status"] == "failed":
            found.append(f"{entry['id']}, {TITLES[d]}: {entry['contenders'][OURS][d]['reason']}")
    return found


def line(entry: dict[str, Any]) -> str:
    """A sweep on one line of the terminal."""
    parts = [f"{TITLES[d]} {timed(entry, d)}, promised {entry['promise'][d]['text']}" for d in DIRECTIONS]
    wrong = "" if entry["gate"] == "passed" else f" WRONG: {entry['gate']};"
    return f"{entry['id']}:{wrong} " + "; ".join(parts)


def timed(entry: dict[str, Any], direction: str) -> str:
    fitted, above = exponent(entry, direction), excess(entry, direction)
    if fitted is None:
        status = entry.get("contenders", {}).get(OURS, {}).get(direction, {}).get("status")
        return {"wrong": "WRONG", "failed": "FAILED", "measured": "too few sizes"}.get(status, NOT_MEASURED)
    ceiling = f" (of {fitted - above:.2f})" if entry["promise"][direction]["log"] else ""
    mark = f", {above:.2f} ABOVE" if above > EXCESS else ""
    return f"{fitted:.2f}{ceiling}{mark}"


def counted(entry: dict[str, Any], direction: str) -> str:
    """The steepest counted exponent, of operations and of moved elements."""
    sizes = [n for n, _ in entry["counted"]]
    if not sizes:
        return NOT_MEASURED
    claim = cost(entry["claim"][direction])
    steepest = max(
        growth(claim, sizes, [c[direction][k] for _, c in entry["counted"]]) for k in ("operations", "moved")
    )
    return f"{steepest:.2f}" + (" x log" if claim.log else "")


def table(data: dict[str, Any] | None) -> str:
    """Every sweep beside its promise; what was not measured says so."""
    known = data["sweeps"] if data else {}
    lines = [
        "| layer | grows | inverse: promised | claimed | counted | timed "
        "| log-det: promised | claimed | counted | timed |",
        "|---|---|---|---|---:|---:|---|---|---:|---:|",
    ]
    for entry in (known.get(s.id) or facts(s) for s in sweeps()):
        grows = entry["over"] + (f" ({entry['fixed']})" if entry["fixed"] else "")
        cells = [f"`{entry['layer']}`", grows]
        for d in DIRECTIONS:
            promise, claim = entry["promise"][d]["text"], entry["claim"][d]["text"]
            cells += [
                big_o(promise) if entry["row"] else "",
                big_o(claim) if claim != promise or not entry["row"] else "",
            ]
            cells += [counted(entry, d), timed(entry, d)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table(data: dict[str, Any]) -> str:
    """What was promised over the number of elements, and the exponents of the measured times."""
    lines = ["| layer | inverse: promised | timed | log-det: promised | timed |", "|---|---|---:|---|---:|"]
    for entry in data["sweeps"].values():
        if entry["row"] and entry["over"] == "d":
            cells = [c for d in DIRECTIONS for c in (big_o(entry["promise"][d]["text"]), timed(entry, d))]
            lines.append("| " + " | ".join([f"`{entry['layer']}`", *cells]) + " |")
    return "\n".join(lines)


def big_o(text: str) -> str:
    return f"O({text.replace('^2', '²').replace('^3', '³')})"


def peers_table(data: dict[str, Any]) -> str:
    """Exponents of peers, and their time over ours at the largest size that both reached."""
    lines = [
        "| layer | grows | peer | inverse | over ours | log-det | over ours |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    notes = {}
    for entry in data["sweeps"].values():
        for name, states in entry["contenders"].items():
            if name == OURS:
                continue
            cells = [f"`{entry['layer']}`", entry["over"], name]
            for d in DIRECTIONS:
                state = states[d]
                fitted = exponent(entry, d, name)
                cells.append(
                    state["status"] if state["status"] != "measured" else "" if fitted is None else f"{fitted:.2f}"
                )
                cells.append(over_ours(entry, d, name))
                if "reason" in state:
                    notes.setdefault(f"{name}: {state['reason']}"[:200], None)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def over_ours(entry: dict[str, Any], direction: str, name: str) -> str:
    ours, theirs = ({n: t for n, t, _ in entry["contenders"][who][direction]["times"]} for who in (OURS, name))
    both = sorted(ours.keys() & theirs.keys())
    return f"{theirs[both[-1]] / ours[both[-1]]:.2g}x at {both[-1]:,}" if both else ""


# --- the page ---------------------------------------------------------------------------------------------------------


def measured(results: Path) -> dict[str, tuple[dict | None, dict | None]]:
    """Folder name -> newest sweeps and newest bars, of every device that has some."""
    folders = sorted(p for p in results.iterdir() if p.is_dir())
    found = {f.name: (newest(f, "complexity", "sweeps"), newest(f, "linear", "bars")) for f in folders}
    return {name: pair for name, pair in found.items() if any(pair)}


def blocks(results: Path) -> dict[str, dict[tuple[str, str], str]]:
    """Page -> what stands between its marks."""
    found = measured(results)
    told = {"complexity": [], "linear": [], "short": []}
    for folder, (of_sizes, of_bars) in found.items():
        if of_sizes:
            told["short"] += [source(of_sizes), short_table(of_sizes)]
            path = f"../benchmarks/results/{folder}/complexity.png"
            told["complexity"] += [
                source(of_sizes),
                table(of_sizes),
                f"![Time over size of every layer beside its promise, {folder}]({path})",
                "<details><summary>The same from other libraries</summary>",
                peers_table(of_sizes),
                "</details>",
            ]
        if of_bars:
            told["linear"] += [source(of_bars), bars_table(of_bars)]
    told["complexity"] = told["complexity"] or [table(None)]
    for kind in ("linear", "short"):
        told[kind] = told[kind] or [f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."]
    texts = {kind: "\n\n".join(parts) for kind, parts in told.items()}
    return {PAGE: {marks: texts[kind] for kind, marks in MARKS.items()}, FLOWS: {SHORT: texts["short"]}}


def source(data: dict[str, Any]) -> str:
    listed = ", ".join(f"{date} at {commit}" for date, commit in data["runs"])
    m = data["machine"]
    return f"{m['name']}, {m['threads']} threads, torch {data['versions']['torch']}; measured {listed}."


def bars_table(data: dict[str, Any]) -> str:
    """Each call's time, the others' over it, and the goal."""
    lines = ["| call | nfkernels, us | others, us | ratio | goal |", "|---|---:|---|---|---|"]
    for bar in data["bars"].values():
        own, *others = bar["contenders"].items()
        told = ", ".join(f"{name} {time_of(state)}" for name, state in others)
        ratios = ", ".join(f"{r['text']}: {r['ratio']:.3g}x" for r in bar["ratios"]) or NOT_MEASURED
        lines.append(f"| {bar['id']} | {time_of(own[1])} | {told} | {ratios} | {bar['asked']} |")
    return "\n".join(lines)


def time_of(state: dict[str, Any]) -> str:
    return (
        microseconds(state["median_us"]) if state["status"] == "measured" else f"{state['status']} ({state['reason']})"
    )
