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

NAMES = ("models", "nn", "ops", "training", "integrations", "plot", "diagnostics")
MODULES = [f"nfkernels.{name}" for name in NAMES]


def built(folder):
    """Built from a copy, since a build writes beside its pages."""
    source = folder / "repository" / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "_repository"))
    for path in ROOT.iterdir():  # what pages link to lies where it does
        if path.name != "docs" and not path.name.startswith("."):
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


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    """One test, so that one process builds it."""
    site = built(tmp_path)
    found = described(site)
    public = [f"{m}.{name}" for m in MODULES for name in importlib.import_module(m).__all__]
    assert [name for name in public if name not in found] == []

    page = (site / "api" / "nfkernels.html").read_text()
    assert [name for name in importlib.import_module("nfkernels").__all__ if name not in page] == []

    assert 'src="_images/' in (site / "flows.html").read_text()
    pictures = {path.name for path in (DOCS / "pictures").glob("*.png")}
    assert pictures <= {path.name for path in (site / "_images").iterdir()}
    assert (site / "_repository" / "README.html").is_file()
