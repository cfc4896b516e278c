"""``python -m benchmarks report``: results to the README's blocks, pages and pictures per device, and the page of the
linear flows. Nothing is typed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .case import Op
from .record import NOT_REACHED
from .results import devices
from .tables import (
    COMPILED,
    EAGER,
    NOT_MEASURED,
    best,
    device_page,
    microseconds,
    of_copy,
    on_device,
    percent,
    ratio_text,
    speedup,
)

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
ALWAYS = {"nvidia-h200": "NVIDIA H200"}  # told even where nothing was measured on it
INTRODUCTION = """Made by `python -m benchmarks report` from `benchmarks/results/`. A cell reads: time of one call (on
a GPU what the device needs, on a CPU the wall clock); how many times that the fastest plain PyTorch takes, eager /
through `torch.compile`; fraction of the copy bandwidth measured on the device. Shapes, and every other size and
contender, are on the devices' pages."""


def run(*, check: bool, root: Path = ROOT) -> int:
    """Writes README, pages and pictures; with ``check`` only says which text is out of date. Gives the exit status."""
    found = devices(root / "benchmarks" / "results")
    texts = {root / "README.md": readme(root, found)}
    texts |= linear_flows(root)
    texts |= glow_pages(root)
    texts |= peers_pages(root)
    for name, data in found.items():
        texts[root / "benchmarks" / "results" / name / "README.md"] = device_page(data, source(data))
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            print(
                f"{path.relative_to(root)} is not what the results say: run `python -m benchmarks report`",
                file=sys.stderr,
            )
        return 1 if stale else 0
    from nfkernels._atomic import write_text

    from .plots import draw

    for path, text in texts.items():
        write_text(path, text)
    for name, data in found.items():
        if plottable(data):
            draw(data, root / "benchmarks" / "results" / name / "speed.png")
    redraw(root)
    print("\n".join(str(path.relative_to(root)) for path in stale) or "everything was up to date")
    return 0


def redraw(root: Path) -> None:
    """The linear flows' pictures, those of trained Glows, and other libraries' loss curves."""
    from .glow import page as glow_page
    from .glow import picture as glow_picture

    for folder, data in glow_page.devices(root / "benchmarks" / "results").items():
        for entry in data["entries"]:
            if entry["id"].startswith("train"):
                path = root / "benchmarks" / "results" / folder / glow_page.picture_name(entry["id"])
                glow_picture.draw(entry, data, path)
    from .peers import page as peers_page
    from .peers import picture as peers_picture

    for folder, of in peers_page.devices(root / "benchmarks" / "results").items():
        if of["peers"] and peers_page.drawable(of["peers"]["cases"]):
            path = root / "benchmarks" / "results" / folder / "peers.png"
            peers_picture.draw(of["peers"]["cases"], f"Losses before and after accelerate ({folder})", path)
    from .complexity import page, picture

    for folder, (sweeps, _) in page.measured(root / "benchmarks" / "results").items():
        if sweeps:
            picture.draw(sweeps, root / "benchmarks" / "results" / folder / "complexity.png")


def source(data: dict[str, Any]) -> str:
    """Which runs a page is made of, in a sentence."""
    listed = ", ".join(dict.fromkeys(f"{date} at {commit}" for date, commit in data["runs"]))
    return f"The newest measurement of every case, from the runs of {listed}."


def plottable(data: dict[str, Any]) -> bool:
    return any(best(case) for case in data["cases"])


def readme(root: Path, found: dict[str, dict]) -> str:
    """The README with its blocks made anew; those of Glow, of small flows and of other libraries' are wanted once they
    have results."""
    from .density import page as density_page
    from .glow import page as glow_page
    from .peers import page as peers_page

    text = (root / "README.md").read_text(encoding="utf-8")
    results = root / "benchmarks" / "results"
    made = {(BEGIN, END): block(found)}
    for page in (glow_page, density_page, peers_page):
        if page.BEGIN in text or page.devices(results):
            made[page.BEGIN, page.END] = page.block(results)
    for (begin, end), of in made.items():
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must hold {begin} and {end} once each")
        text = filled(text, begin, end, of)
    return text


def glow_pages(root: Path) -> dict[Path, str]:
    from .glow import page

    results = root / "benchmarks" / "results"
    return {results / name / "glow.md": page.text(data) for name, data in page.devices(results).items()}


def peers_pages(root: Path) -> dict[Path, str]:
    from .peers import page

    results = root / "benchmarks" / "results"
    return {results / name / "peers.md": page.text(name, of) for name, of in page.devices(results).items()}


def filled(text: str, begin: str, end: str, block: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def linear_flows(root: Path) -> dict[Path, str]:
    """The pages that tell of linear flows, with their blocks made anew, where there are these pages."""
    from .complexity import page

    texts = {}
    for name, parts in page.blocks(root / "benchmarks" / "results").items():
        path = root / name
        if not path.is_file():
            continue
        texts[path] = path.read_text(encoding="utf-8")
        for (begin, end), made in parts.items():
            if texts[path].count(begin) != 1 or texts[path].count(end) != 1:
                raise ValueError(f"{name} must hold {begin} and {end} once each")
            texts[path] = filled(texts[path], begin, end, made)
    return texts


def block(found: dict[str, dict]) -> str:
    from .ops import tables

    parts = [INTRODUCTION, summary(found, tables())]
    for name, data in found.items():
        where = f"benchmarks/results/{name}"
        page = f"[{label(name, data)}]({where}/README.md)"
        parts.append(f"{page}: {facts(data)}")
        if plottable(data):
            alt = (
                f"Speed against size on {label(name, data)}: over eager, over torch.compile, fraction of copy bandwidth"
            )
            parts.append(f"![{alt}]({where}/speed.png)")
    return "\n\n".join(parts)


def label(name: str, data: dict[str, Any] | None) -> str:
    """A device's name for people."""
    if data is None or data["kind"] == "gpu":
        return ALWAYS.get(name, data["machine"]["name"] if data else name)
    return f"CPU, {name.split('-')[1].upper().replace('AVX512', 'AVX-512')}, {data['machine']['threads']} threads"


def facts(data: dict[str, Any]) -> str:
    m, v = data["machine"], data["versions"]
    rate = data["roofline"].get("copy_bytes_per_s")
    copy = f"copy bandwidth {rate / 1e9:,.4g} GB/s" if rate else f"copy bandwidth {NOT_MEASURED}"
    tests = data["stages"].get("tests")
    tested = f"; GPU tests: {tests['reason']}" if tests else ""
    return f"{m['name']}, torch {v['torch']}, {copy}{tested}; last run {data['date']} at {data['commit']}."


def summary(found: dict[str, dict], ops: list[Op]) -> str:
    """One row per op and direction at its headline size, one column per device."""
    columns = {name: None for name in ALWAYS if name not in found} | found
    names = [n for n, d in columns.items() if d is None or d["kind"] == "gpu"]
    names += [n for n in columns if n not in names]
    lines = ["| op | " + " | ".join(label(n, columns[n]) for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    kept = {n: _headlines(columns[n]) for n in names}
    rows = [
        _row(case.facts()) for op in ops for kind in ("cuda", "cpu") for case in op.cases(kind) if _told(case.facts())
    ]
    for row in dict.fromkeys(rows):
        lines.append(f"| {row} | " + " | ".join(_cell(kept[n].get(row)) for n in names) + " |")
    return "\n".join(lines)


def _told(case: dict[str, Any]) -> bool:
    plain = case["dtype"] == case["params_dtype"] == "torch.float32"
    return case["headline"] and plain and not case["variant"] and len(case["shape"]) > 2


def _row(case: dict[str, Any]) -> str:
    width = f" of {case['shape'][1]} channels" if case["op"].endswith("mix") else ""
    return f"`{case['op']}`{width}, {case['direction']}"


def _headlines(data: dict[str, Any] | None) -> dict[str, tuple[dict, dict]]:
    return {_row(c): (c, data["roofline"]) for c in data["cases"] if _told(c)} if data else {}


def _cell(measured: tuple[dict, dict] | None) -> str:
    case, roofline = measured or (None, None)
    if case is None or all(e["status"] == NOT_REACHED for e in case["contenders"].values()):
        return NOT_MEASURED
    name = best(case)
    if name is None:
        wrong = any(e["status"] == "wrong" for e in case["contenders"].values())
        return "WRONG" if wrong else NOT_MEASURED
    ratios = f"{ratio_text(speedup(case, EAGER))} / {ratio_text(speedup(case, COMPILED))}"
    return f"{microseconds(on_device(case['contenders'][name]))} us; {ratios}; {percent(of_copy(case, roofline))}"
