"""The commands that the pages print are commands that there are, and the Python runs."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import TABLE

from nfkernels import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md", ROOT / "docs" / "density.md"]


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.partition("#")[0].split("&&")[-1] for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines]
    calls = [words[words.index("nfkernels") + 1 :] for words in found if "nfkernels" in words]
    return [words for words in calls if words and words[0] != "--help"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page):
    printed = commands(page)
    assert len(printed) >= 6
    for words in printed:
        options, unknown = cli.build_parser().parse_known_args(words)
        assert (options.command, unknown) == (words[0], [])


@pytest.mark.usefixtures("elsewhere")
def test_the_python_of_the_page_runs(digits_run):
    pytest.importorskip("sklearn")
    Path("runs").mkdir()
    Path("runs/digits-1").symlink_to(digits_run)
    run_python(PAGES[1])


@pytest.mark.usefixtures("elsewhere")
def test_the_python_of_the_page_on_tables_runs(people):
    pytest.importorskip("sklearn")
    assert cli.main(["train", "--data", str(people), *TABLE, "--quiet", "--out", "runs/table-1"]) == 0
    Path("table.csv").write_text(people.read_text())
    run_python(PAGES[2])


def run_python(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
