"""Results as text: a page per device, and the README's block. No time without a green gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..tables import NOT_MEASURED, ratio_text

BEGIN, END = "<!-- glow:begin -->", "<!-- glow:end -->"
OURS = "nfkernels"
PLAIN = "plain"

LEGEND = """One step: draw a batch, dequantise, forward, backward, clip, AdamW (PyTorch's fused one for all), average
the weights. *Outside*: dequantise, forward and backward of the same model whose networks are replaced by stand-ins that
do no work (they hand out the same tensor every time, and hand gradients through); the optimiser is not run. *Peak*: the
allocator's, over what is there between steps (weights, moments, averages). Before anything is timed everyone must give,
with the same weights, the bits per dimension, gradients and round trip of the plain model in float64 (*errors*).
`plain`: `benchmarks/models/plain_glow.py`, float32 unless said; *bf16*: the whole model under autocast; *bf16
networks*: only what ours has in bf16; *compiled by steps*: each step of flow by itself. `normflows`: its own classes
with the same weights, without split priors, which it has not. Medians of interleaved rounds (on a GPU one contender
after the other); the ratio is to the plain model, per image."""


def runs(folder: Path) -> list[dict[str, Any]]:
    """A device's runs, oldest first; trials are left out."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("glow-*.json"))]
    return sorted((r for r in found if not r["quick"]), key=lambda r: (r["date"], r["time"]))


def newest(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest run's facts, and of each entry and contender the newest measurement."""
    if not found:
        return None
    entries: dict[str, dict] = {}
    for run in found:
        for entry in run["entries"]:
            reached = {n: c for n, c in entry["contenders"].items() if c["status"] != "not reached"}
            before = entries.get(entry["id"], {"contenders": {}})
            same = before.get("setup") == entry["setup"]
            kept = before["contenders"] if same else {}
            entries[entry["id"]] = {**entry, "contenders": {**kept, **reached}}
    listed = list(dict.fromkeys((r["date"], r["commit"]) for r in found))
    return found[-1] | {"entries": list(entries.values()), "runs": listed}


def of_run(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"runs": [(data["date"], data["commit"])]}


def devices(results: Path) -> dict[str, dict[str, Any]]:
    """Folder name -> newest results, of every device that has some; GPUs first."""
    found = {f.name: newest(runs(f)) for f in sorted(p for p in results.iterdir() if p.is_dir())}
    kept = {name: data for name, data in found.items() if data is not None}
    return dict(sorted(kept.items(), key=lambda item: (item[1]["kind"] != "gpu", item[0])))


def median(entry: dict[str, Any] | None, what: str) -> float | None:
    return entry[what]["median"] if entry and entry["status"] == "measured" and what in entry else None


def times(entry: dict[str, Any] | None, plain: dict[str, Any] | None, what: str) -> str:
    """A time and how many times as long the plain model takes (per image, should the batches differ)."""
    own, other = median(entry, what), median(plain, what)
    if own is None:
        return ""
    text = f"{own:,.4g}"
    if other is None or entry is plain:
        return text
    images = entry["batch"] / plain["batch"] if what == "step_ms" else 1.0
    return f"{text} ({ratio_text(other / own * images)})"


def peak(entry: dict[str, Any]) -> str:
    """MiB; of a captured graph what is reserved for it, the only place where its memory shows."""
    if "reserved_bytes" in entry:
        return f"{max(entry['reserved_bytes'], entry['peak_bytes']) / 2**20:,.1f} reserved"
    return f"{entry['peak_bytes'] / 2**20:,.1f}"


def setup_table(entry: dict[str, Any]) -> str:
    """Everyone on one setup."""
    lines = [
        "| | batch | step, ms | outside, ms | sampling, ms | peak, MiB | errors: bits, gradient, round trip | |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    plain = entry["contenders"].get(PLAIN)
    for name, of in entry["contenders"].items():
        errors = [f"{of[k]:.1g}" for k in ("bits_error", "gradient_error", "rebuilt_error") if k in of]
        notes = [] if of["status"] == "measured" else [told(of)]
        notes += [f"no {part}: {why['reason']}" for part, why in of.get("lacks", {}).items()]
        if of["status"] != "measured":
            lines.append(f"| {name} | | | | | | {', '.join(errors)} | {'; '.join(notes)} |")
            continue
        cells = [times(of, plain, what) for what in ("step_ms", "outside_ms", "sample_ms")]
        row = [name, str(of["batch"]), *cells, peak(of), ", ".join(errors), "; ".join(notes)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def told(entry: dict[str, Any]) -> str:
    status = {"wrong": "WRONG", "not reached": NOT_MEASURED, "right": NOT_MEASURED}.get(
        entry["status"], entry["status"]
    )
    return f"{status} ({entry['reason']})" if entry.get("reason") else status


def depth_table(entry: dict[str, Any]) -> str:
    """Bytes per image, gradient's and round trip's errors, over the steps of flow per level."""
    depths = list(dict.fromkeys(d["depth"] for of in entry["contenders"].values() for d in of["depths"]))
    head = [f"K = {depth}" for depth in depths]
    lines = ["| | | " + " | ".join(head) + " |", "|---|---" + "|---:" * len(head) + "|"]
    rows = (
        ("held for backward, KiB per image", lambda d: f"{d['held_bytes'] / 1024:,.0f}"),
        ("saved by autograd, KiB per image", lambda d: f"{d['saved_bytes'] / 1024:,.0f}"),
        ("gradient's error", lambda d: f"{d['gradient_error']:.1g}"),
        ("largest error of rebuilt data", lambda d: f"{d['rebuilt_error']:.1g}"),
    )
    for name, of in entry["contenders"].items():
        known = {d["depth"]: d for d in of["depths"]}
        if not known:
            lines.append(f"| {name} | {told(of)} |" + " |" * len(depths))
            continue
        for title, cell in rows:
            cells = [cell(known[k]) if k in known else "" for k in depths]
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def train_table(entry: dict[str, Any]) -> str:
    lines = [
        "| | seconds | steps | steps/s | test bits/dim | best on validation |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, of in entry["contenders"].items():
        if of["status"] != "measured":
            lines.append(f"| {name} | {told(of)} | | | | |")
            continue
        bits = f"{of['test_bits']:.3f} +- {of['test_bits_error']:.3f}" if of["test_bits"] is not None else "not finite"
        rate = f"{of['steps'] / of['seconds']:.3g}"
        best = min((b for _, _, b in of["curve"] if b is not None), default=float("nan"))
        lines.append(f"| {name} | {of['seconds']:,.0f} | {of['steps']:,} | {rate} | {bits} | {best:.3f} |")
    return "\n".join(lines)


def section(entry: dict[str, Any]) -> list[str]:
    if entry["id"] == "depth":
        s = entry["setup"]
        size = "x".join(map(str, [*s["shape"][1:], s["shape"][0]]))
        return [f"## Over depth: {size}, L = {s['levels']}, width {s['hidden']}", depth_table(entry)]
    if entry["id"].startswith("train"):
        return [f"## {entry['setup']['text']}", train_table(entry)]
    return [f"## {entry['setup']['text']}", setup_table(entry)]


def text(data: dict[str, Any]) -> str:
    """Everything about a device."""
    listed = ", ".join(f"{date} at {commit}" for date, commit in data["runs"])
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items() if v)
    parts = [f"# Glow on {data['machine']['name']} ({data['folder']})", f"Measured {listed}. {versions}.", LEGEND]
    for entry in data["entries"]:
        parts += section(entry)
        if entry["id"].startswith("train"):
            parts.append(f"![Bits per dimension over seconds]({picture_name(entry['id'])})")
    return "\n\n".join(parts) + "\n"


def picture_name(entry_id: str) -> str:
    return f"glow-{entry_id}.png"


def problems(entries: list[dict[str, Any]]) -> list[str]:
    """What makes a run fail: one of ours that is wrong or failed, whole or in a part."""
    found = []
    for entry in entries:
        for name, of in entry["contenders"].items():
            if not name.startswith(OURS):
                continue
            if of["status"] in ("wrong", "failed"):
                found.append(f"{entry['id']}, {name}: {of['status']}: {of['reason']}")
            for part, why in of.get("lacks", {}).items():
                if why["status"] == "failed":
                    found.append(f"{entry['id']}, {name}: no {part}: {why['reason']}")
    return found


# --- the README -------------------------------------------------------------------------------------------------------


def block(results: Path) -> str:
    """What stands between the README's marks."""
    parts = []
    for name, data in devices(results).items():
        where = f"benchmarks/results/{name}"
        parts.append(f"[{data['machine']['name']}, {name}]({where}/glow.md), `python -m benchmarks glow`:")
        parts.append(summary(data))
        for entry in data["entries"]:
            if entry["id"].startswith("train"):
                parts += [f"{entry['setup']['text']}:", train_table(entry)]
                parts.append(f"![Bits per dimension over seconds, {name}]({where}/{picture_name(entry['id'])})")
    return "\n\n".join(parts) or f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."


def summary(data: dict[str, Any]) -> str:
    """How many times as fast as each rival: the whole step, the part outside networks, sampling; and memory."""
    lines = [
        "| setup | contender | step | outside networks | sampling | peak memory, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for entry in data["entries"]:
        if entry["id"] == "depth" or entry["id"].startswith("train"):
            continue
        plain = entry["contenders"].get(PLAIN)
        for name, of in entry["contenders"].items():
            if of["status"] != "measured":
                continue
            cells = [times(of, plain, what).replace(" (", " ms (") for what in ("step_ms", "outside_ms", "sample_ms")]
            cells = [c + " ms" if c and not c.endswith(")") else c for c in cells]
            lines.append(f"| {entry['setup']['text']} | {name} | " + " | ".join(cells) + f" | {peak(of)} |")
    return "\n".join(lines)
