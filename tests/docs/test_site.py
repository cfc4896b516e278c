"""The site builds without a warning, and has every public name."""

import importlib
import os
import shutil
import subprocess
import sys
import zlib

import pytest
from pages import DOCS, ROOT

pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install 'nfkernels[docs]'")
for extension in ("myst_parser", "furo", "sphinx_copybutton"):
    pytest.importorskip(extension)

MODULES = ("models", "nn", "ops", "training", "integrations", "plot", "diagnostics")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built from a copy, since a build writes beside its pages."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "repository" / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "_repository"))
    for path in ROOT.iterdir():  # what pages link to lies where it does
        if path.name not in ("docs", ".git") and not path.name.startswith("."):
            (source.parent / path.name).symlink_to(path)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(source), str(folder / "html")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def described(site):
    """Every name that has a place to link to."""
    data = (site / "objects.inv").read_bytes()
    text = zlib.decompress(data.split(b"\n", 4)[4]).decode()
    return {line.split(" ")[0] for line in text.splitlines() if " py:" in line}


def test_every_public_name_is_described(site):
    found = described(site)
    missing = []
    for module in MODULES:
        for name in importlib.import_module(f"nfkernels.{module}").__all__:
            if f"nfkernels.{module}.{name}" not in found:
                missing.append(f"nfkernels.{module}.{name}")
    assert not missing


def test_the_names_of_the_package_itself_are_told(site):
    import nfkernels

    page = (site / "api" / "nfkernels.html").read_text()
    assert [name for name in nfkernels.__all__ if name not in page] == []


def test_pages_have_their_pictures(site):
    assert 'src="_images/' in (site / "flows.html").read_text()
    assert {path.name for path in (DOCS / "pictures").glob("*.png")} <= {
        path.name for path in (site / "_images").iterdir()
    }
