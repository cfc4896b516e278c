"""The Python of every page runs, its commands are understood, its links lead somewhere."""

import re

import pages
import pytest
import torch
from pages import DOCS, PAGES, ROOT

from nfkernels import cli
from nfkernels.integrations import registry
from nfkernels.training.demo.options import NAMES

LIBRARIES = ("nflows", "normflows", "FrEIA", "zuko", "sbi", "sklearn")
# What a reader has by then: folders of finished runs, a table.
PREPARED = {"docs/training.md", "docs/density.md"}
PROGRAMS = [
    pytest.param(page, code, printed, id=f"{pages.name(page)}-{number}")
    for page in PAGES
    if pages.name(page) not in pages.ONE_PROGRAM  # test_example_op.py
    for number, (code, printed) in enumerate(pages.programs(page))
]
by_page = pytest.mark.parametrize("page", PAGES, ids=pages.name)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder; adapters that a page registers, and the number of threads, are as they were afterwards."""
    registry.served()  # ours are there before the copy is made
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def had_by_then(tmp_path_factory):
    """``runs/digits-1``, ``runs/table-1`` and ``table.csv``, as small as they can be."""
    from nfkernels.models import NSF, Glow
    from nfkernels.nn import TableFlow
    from nfkernels.training import load_table

    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("had")
    for run in ("digits-1", "table-1"):
        (folder / "runs" / run).mkdir(parents=True)
    rows = (torch.randn(200, 3) * torch.tensor([1.0, 2.0, 0.1])).tolist()
    (folder / "table.csv").write_text("height,wage,age\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    table = load_table(folder / "table.csv")
    flow = TableFlow(NSF(3, layers=1, hidden=4), [column.facts() for column in table.columns])
    flow.save(folder / "runs/table-1/model.safetensors")
    Glow((1, 8, 8), levels=1, steps=1, hidden=4, grey_levels=17).save(folder / "runs/digits-1/model.safetensors")
    return folder


def without_numbers(text):
    """Of what is printed, what is the same every time."""
    text = re.sub(r"-?\d[\d.,]*(e[-+]?\d+)?", "#", text)
    return [re.sub(r"\s+|-{4,}", " ", line).strip() for line in text.splitlines()]


@pytest.mark.parametrize(("page", "code", "printed"), PROGRAMS)
def test_the_python_runs(page, code, printed, elsewhere, request, capsys):
    for library in LIBRARIES:
        if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE):
            pytest.importorskip(library)
    if pages.name(page) in PREPARED:
        for path in request.getfixturevalue("had_by_then").iterdir():
            (elsewhere / path.name).symlink_to(path)
    exec(compile(code, str(page), "exec"), {"__name__": "page"})
    said = without_numbers(capsys.readouterr().out)
    assert [line for line in without_numbers("\n".join(printed)) if line not in said] == []


def test_every_library_and_none_has_a_program():
    page = ROOT / "docs" / "migration.md"
    found = {
        library
        for library in LIBRARIES
        for code, _ in pages.programs(page)
        if f"import {library}" in code or f"from {library}" in code
    }
    assert found >= {"nflows", "normflows", "FrEIA", "zuko", "sbi"}
    assert len(PROGRAMS) >= 30


@by_page
def test_the_commands_are_understood(page):
    for words in pages.commands(page):
        if not words or words[0].startswith("-"):
            continue
        options, unknown = cli.build_parser().parse_known_args(words)
        assert (options.command, unknown) == (words[0], []), words


def test_there_are_commands():
    found = [words for page in PAGES for words in pages.commands(page) if words]
    assert len(found) >= 40
    assert {words[1] for words in found if words[0] == "demo"} == set(NAMES)


def test_the_table_of_info_is_as_the_page_has_it(capsys):
    (_, lines), *_ = pages.blocks(DOCS / "speed.md", "text")
    assert cli.main(["info"]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0].split()) in said
    kernel, device, *_ = lines[1].split()
    assert any(line.startswith(f"{kernel} {device}") for line in said)


@by_page
def test_links_lead_somewhere(page):
    for file, anchor in pages.links(page):
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{pages.name(page)} links to {file}, which is not there"
        assert ROOT in there.parents, f"{pages.name(page)} links to {file}, which lies outside"
        if anchor and there.suffix == ".md":
            assert anchor in pages.anchors(there), (
                f"{pages.name(page)} links to {file}#{anchor}, which has no such heading"
            )


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for _, lines in pages.blocks(page, "{toctree}"):
            names = [line.rpartition("<")[2].rstrip(">") for line in lines if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page for page in PAGES if DOCS in page.parents} - listed == {DOCS / "index.md"}
