"""The Python of the page on other libraries' flows runs, block by block, where those libraries are installed."""

import re
from pathlib import Path

import pytest
import torch

from nfkernels.integrations import registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migration.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
LIBRARIES = ("nflows", "normflows", "FrEIA", "zuko", "sbi")


def name(block):
    found = [library for library in LIBRARIES if re.search(rf"^(import|from) {library}\b", block, re.MULTILINE)]
    return found[0] if found else "own"


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{i}-{name(b)}" for i, b in enumerate(BLOCKS)])
def test_the_python_of_the_page_runs(block, tmp_path, monkeypatch):
    if name(block) != "own":
        pytest.importorskip(name(block))
    monkeypatch.chdir(tmp_path)
    registry.served()  # ours are there before the copy is made
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    torch.manual_seed(0)
    exec(compile(block, PAGE.name, "exec"), {"__name__": "page"})


def test_every_library_has_a_block():
    assert {name(block) for block in BLOCKS} == {*LIBRARIES, "own"}


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    assert targets
    for target in targets:
        assert (PAGE.parent / target).exists(), target
