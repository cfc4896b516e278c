"""The pages that people read: their code, their commands, their links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_GENERATED = {"_build", "_repository"}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md") if (ROOT / name).is_file()),
    *sorted(path for path in DOCS.rglob("*.md") if not _GENERATED & set(path.relative_to(DOCS).parts)),
]
# Blocks of other pages that begin with an import stand alone; here they go on from each other.
ONE_PROGRAM = {"docs/adding-an-op.md"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[tuple[str, int, list[str]]]:
    """The fenced blocks: language, number of the line before their first, and their lines."""
    found, inside, fence = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opened = re.match(r"(`{3,})\s*(\S*)\s*$", line)
        if inside is not None and opened and opened[1] == fence and not opened[2]:
            found.append(inside)
            inside = None
        elif inside is not None:
            inside[2].append(line)
        elif opened:
            inside, fence = (opened[2], number, []), opened[1]
    assert inside is None, f"{name(page)}, line {inside[1]}: a block without an end"
    return found


def blocks(page: Path, language: str) -> list[tuple[int, list[str]]]:
    """Those of a language, without its name."""
    return [(before, lines) for found, before, lines in fences(page) if found == language]


def programs(page: Path) -> list[tuple[str, list[str]]]:
    """The page's Python, and what it says it prints: each block that begins with an import, those that go on from it,
    and the text below without what is left out. Every line has the number that it has on the page, so that a traceback
    leads there."""
    found: list[tuple[list[str], list[str]]] = []
    last = ""
    for language, before, lines in fences(page):
        if language == "python":
            starts = re.match(r"(import|from)\s", next((v for v in lines if v and not v.startswith("#")), ""))
            if not found or (starts and name(page) not in ONE_PROGRAM):
                found.append(([], []))
            found[-1][0].extend([""] * (before - len(found[-1][0])) + lines)
        elif language == "text" and last == "python":
            found[-1][1].extend(line for line in lines if "..." not in line)
        last = language
    return [("\n".join(code) + "\n", printed) for code, printed in found]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each ``nfkernels`` on the page."""
    lines = [line for _, block in blocks(page, "bash") for line in "\n".join(block).replace("\\\n", " ").splitlines()]
    parts = [shlex.split(part) for line in lines for part in re.split(r"&&|\||;", line.partition(" #")[0])]
    return [
        words[words.index("nfkernels") + 1 :]
        for words in parts
        if "nfkernels" in words[:1] or ("-m" in words and "nfkernels" in words)
    ]


def links(page: Path) -> list[tuple[str, str]]:
    """``(file, anchor)`` of each link and picture that is no address, code left out."""
    text = re.sub(r"^(`{3,}).*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [tuple((t + "#").split("#")[:2]) for t in targets if not re.match(r"[a-z]+:", t)]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    code = {n for _, before, lines in fences(page) for n in range(before, before + len(lines) + 2)}
    found: set[str] = set()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        heading = re.match(r"#{1,6}\s+(.*?)\s*#*$", line)
        if heading and number not in code:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").lower()
            found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found
