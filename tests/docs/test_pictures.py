"""The script that makes the pages' pictures."""

import importlib.util
import re

import pytest
from pages import DOCS

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
PICTURES = DOCS / "pictures"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_makes_a_picture(script, tmp_path):
    script.main(["coupling", "--out", str(tmp_path)])
    (made,) = tmp_path.iterdir()
    assert made.read_bytes()[:4] == b"\x89PNG"
    assert made.stat().st_size < 100_000
    with pytest.raises(SystemExit):
        script.main(["nothing"])


def test_what_it_makes_is_there_and_shown(script):
    there = {path.stem: path for path in PICTURES.glob("*.png")}
    assert set(there) == set(script.PICTURES)
    assert all(path.stat().st_size < 100_000 for path in there.values())
    shown = set()
    for page in DOCS.glob("*.md"):
        shown |= set(re.findall(r"\]\(pictures/(.*?)\.png\)", page.read_text(encoding="utf-8")))
    assert shown == set(there)
