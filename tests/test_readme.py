"""The README's Python blocks run, in order, as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block_runs(block, tmp_path, monkeypatch):
    if "from nflows" in BLOCKS[block]:
        pytest.importorskip("nflows")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], f"README block {block}", "exec"), {})


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).is_file(), path
