"""Results as text: a line per case while a run goes on, and Markdown tables. No time without a green gate."""

from __future__ import annotations

from typing import Any

from .record import NOT_REACHED

OURS = ("native", "triton")
# Plain PyTorch; a speed-up is over the fastest of them that is right.
EAGER = ("reference", "hand-written", "conv2d", "normflows", "nflows")
COMPILED = ("compile", "hand-written compiled")
NOT_MEASURED = "not measured"
LABELS = {"cpu": {"native": "C++"}, "gpu": {"native": "CUDA", "triton": "Triton"}}
OTHERS = {"reference": "reference, eager", "compile": "reference, compiled", "copy": "copy of the same bytes"}


def whole_call(entry: dict[str, Any] | None) -> float | None:
    """Microseconds of a call as PyTorch issues it, median; None unless measured behind a green gate."""
    return entry["call_us"]["median"] if entry and entry["status"] == "measured" else None


def on_device(entry: dict[str, Any] | None) -> float | None:
    """Microseconds that the device needs: a replayed graph's where there is one."""
    if not entry or entry["status"] != "measured":
        return None
    return entry.get("kernel_us", entry["call_us"])["median"]


def best(case: dict[str, Any]) -> str | None:
    """Whose time stands for this package: the compiled kernel's, else Triton's. A wrong one's never."""
    return next((n for n in OURS if whole_call(case["contenders"].get(n)) is not None), None)


def speedup(case: dict[str, Any], over: tuple[str, ...]) -> float | None:
    """How many times our call's time the fastest of some others takes."""
    own = best(case)
    others = [t for n in over if (t := whole_call(case["contenders"].get(n))) is not None]
    return None if own is None or not others else min(others) / whole_call(case["contenders"][own])


def of_copy(case: dict[str, Any], roofline: dict[str, Any], name: str | None = None) -> float | None:
    """The floor's bytes over our time, as a fraction of the measured copy bandwidth."""
    name = name or best(case)
    time = on_device(case["contenders"].get(name)) if name else None
    rate = case.get("roofline", roofline).get("copy_bytes_per_s")  # a merged case brings its own run's
    return case["bytes"] / (time * 1e-6) / rate if time and rate else None


def of_floor(case: dict[str, Any], name: str | None = None) -> float | None:
    """The least time for its bytes and its arithmetic, over our time."""
    name = name or best(case)
    time = on_device(case["contenders"].get(name)) if name else None
    return case["floor_us"] / time if time and case.get("floor_us") else None


def microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(entry: dict[str, Any] | None) -> str:
    """A contender's time, or why there is none."""
    if entry is None:
        return ""
    if entry["status"] == "measured":
        return microseconds(on_device(entry))
    return {"wrong": "WRONG", NOT_REACHED: NOT_MEASURED, "skipped": NOT_MEASURED}.get(entry["status"], entry["status"])


def case_line(case: dict[str, Any]) -> str:
    """One case on one line of the terminal."""
    parts = []
    for name, entry in case["contenders"].items():
        if entry["status"] == NOT_REACHED:
            continue
        if entry["status"] != "measured":
            word = "WRONG" if entry["status"] == "wrong" else entry["status"]
            parts.append(f"{name} {word} ({entry.get('reason', '')})")
            continue
        text = f"{name} {microseconds(on_device(entry))} us"
        if name in OURS:
            fraction = of_floor(case, name)
            text += f" ({fraction:.0%} of its floor)" if fraction is not None else ""
            text += ", NOT THE SAME BITS EACH RUN" if entry.get("same_bits") is False else ""
        elif (ratio := speedup(case, (name,))) is not None:
            text += f" ({ratio:.1f}x)"
        parts.append(text)
    return f"{case['id']}: " + "; ".join(parts)


def case_table(data: dict[str, Any]) -> str:
    """Every case of a device with every contender: microseconds on the device, and what they amount to."""
    names = list(dict.fromkeys(n for case in data["cases"] for n in case["contenders"]))
    names.sort(key=lambda n: (n not in OURS, n == "copy"))
    labels = {**OTHERS, **LABELS[data["kind"]]}
    head = [
        "case",
        *(labels.get(n, n) for n in names),
        "over eager",
        "over compiled",
        "of its floor",
        "of copy bandwidth",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for case in sorted(data["cases"], key=_order):
        row = [case["id"], *(cell(case["contenders"].get(n)) for n in names)]
        row += [ratio_text(speedup(case, EAGER)), ratio_text(speedup(case, COMPILED))]
        row += [percent(of_floor(case)), percent(of_copy(case, data["roofline"]))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _order(case: dict[str, Any]) -> tuple:
    return case["op"], case["direction"], case["variant"], case["params_dtype"], case["data_bytes"]


def ratio_text(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}x"


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def host_table(data: dict[str, Any]) -> str:
    """The host's time per call of the launch-bound cases; nothing where none was measured."""
    lines = []
    for case in sorted(data["cases"], key=_order):
        for name in OURS:
            entry = case["contenders"].get(name) or {}
            if "host_us" in entry:
                label = LABELS[data["kind"]].get(name, name)
                recorded = f"{entry['host_grad_us']['median']:.3g}" if "host_grad_us" in entry else ""
                lines.append(f"| {case['id']} | {label} | {entry['host_us']['median']:.3g} | {recorded} |")
    return (
        "\n".join(
            [
                "| launch-bound case | kernels | host, us per call | the same, recorded by autograd |",
                "|---|---|---:|---:|",
                *lines,
            ]
        )
        if lines
        else ""
    )


def memory_table(data: dict[str, Any]) -> str:
    """Bytes per byte of data: kept for the backward, and at the peak above what was there."""
    lines = []
    for case in sorted(data["cases"], key=_order):
        kept = {n: e for n, e in case["contenders"].items() if "saved_bytes" in e}
        if case["direction"] != "forward+backward" or not kept:
            continue
        for name, entry in kept.items():
            saved = f"{entry['saved_bytes'] / case['data_bytes']:.2f}"
            peak = f"{entry['peak_bytes'] / case['data_bytes']:.2f}" if "peak_bytes" in entry else NOT_MEASURED
            lines.append(f"| {case['id']} | {name} | {saved} | {peak} |")
    head = ["| bytes per byte of x | contender | saved for backward | peak |", "|---|---|---:|---:|"]
    return "\n".join([*head, *lines]) if lines else ""


def stage_lines(data: dict[str, Any]) -> str:
    """What a run did besides measuring: a line each."""
    return "\n".join(f"- {name}: {stage['status']}: {stage['reason']}" for name, stage in data["stages"].items())


def roofline_line(data: dict[str, Any]) -> str:
    r = data["roofline"]
    if not r:
        return f"Copy bandwidth and matrix rates: {NOT_MEASURED}."
    rates = [f"{name.removesuffix('_flops')} {r[name] / 1e12:.3g} TFLOP/s" for name in r if name.endswith("_flops")]
    return (
        f"Copy {r['copy_bytes_per_s'] / 1e9:,.4g} GB/s (read plus written), matrix products " + ", ".join(rates) + "."
    )


def device_page(data: dict[str, Any], source: str) -> str:
    """Everything about one device: ``data`` is a run, or the newest of several, case by case."""
    v = ", ".join(f"{k} {n}" for k, n in data["versions"].items() if n)
    parts = [f"# {data['machine']['name']} ({data['folder']})", f"{source} {v}.", roofline_line(data)]
    if data["stages"]:
        parts += ["## Stages", stage_lines(data)]
    parts += ["## Cases", LEGEND, case_table(data)]
    for title, table in (("## Host time", host_table(data)), ("## Memory", memory_table(data))):
        parts += [title, table] if table else []
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Microseconds per call, median: on a GPU what a replayed CUDA graph needs, on a CPU the wall clock. Ratios compare "
    "whole calls as PyTorch issues them, with the fastest eager and the fastest compiled contender. The floor is the "
    "larger of bytes over copy bandwidth and flops over the rate of exact products."
)
