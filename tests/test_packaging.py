"""The sdist, the wheel made of it, an environment that has nothing but that wheel; and the pages that go with them."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import nfkernels

ROOT = Path(__file__).parents[1]
NOTHING = {"NFKERNELS_CPU": "0", "NFKERNELS_CUDA": "0"}
# What a checkout grows beside its sources, and what is large.
GROWN = shutil.ignore_patterns(".*", "build", "dist", "runs", "results", "venv", "*.so", "*.egg-info", "__pycache__")


def run(*command, cwd, timeout=600, **environment):
    """Without the checkout on the path."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside | environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made in a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=GROWN)
    make = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    name = run(sys.executable, "-c", make, cwd=source, **NOTHING).splitlines()[-1]
    shutil.rmtree(source)
    return folder / name


def wheel_of(sdist, folder, **environment):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "-w", folder, sdist, cwd=folder, timeout=3000, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Nothing compiled."""
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"), **NOTHING)


class Environment:
    """A new one that holds a wheel of ours and, by a path, what is installed here: torch is never fetched."""

    def __init__(self, folder, wheel):
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
        self.python = folder / "venv/bin/python"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "-q",
            "--no-compile",
            "--no-deps",
            "--no-index",
        ]
        run(*pip, wheel, cwd=folder)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        here = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
        (self.site / "here.pth").write_text("\n".join(here) + "\n", encoding="utf-8")

    def __call__(self, *command, **options):
        command = [self.folder / "venv/bin" / command[0], *command[1:]]
        return run(*command, cwd=self.folder, OMP_NUM_THREADS="1", MPLBACKEND="agg", **options)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environment"), wheel)


def members(archive):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as held:
            return held.namelist()
    with tarfile.open(archive) as held:
        return [name.partition("/")[2] for name in held.getnames()]


def expected(pattern, folder="nfkernels"):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_the_sdist_holds_what_builds_it_and_no_more(sdist):
    names = set(members(sdist))
    assert sdist.name == f"nfkernels-{nfkernels.__version__}.tar.gz"
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"}
    sources = set().union(*(expected(f"*{suffix}", "csrc") for suffix in (".cpp", ".cu", ".h")))
    assert len(sources) > 50
    wanted |= sources | expected("*.py") | expected("*.pyi") | expected("*.py", "examples")
    assert not wanted - names
    assert not [
        n for n in names if n.startswith(("tests", "benchmarks", "runs", "build")) or n.endswith((".so", ".pyc"))
    ]


def test_a_wheel_with_nothing_compiled_is_for_every_platform(wheel):
    assert wheel.name == f"nfkernels-{nfkernels.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(members(wheel))
    information = f"nfkernels-{nfkernels.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"nfkernels", information}
    package = {name for name in names if name.startswith("nfkernels/")}
    assert package - {"nfkernels/triton/resources.txt"} == {
        "nfkernels/py.typed", *expected("*.py"), *expected("*.pyi")
    }  # fmt: skip
    assert f"{information}/licenses/LICENSE" in names


def test_it_imports_and_answers_away_from_the_checkout(installed):
    code = """
import sys, importlib.metadata, nfkernels
print(nfkernels.__file__, nfkernels.__version__, importlib.metadata.version("nfkernels"), "torch" in sys.modules)
import warnings; warnings.simplefilter("ignore")
import torch
flow = nfkernels.NSF(2, layers=2, hidden=8)
print(*flow.sample(3).shape)
"""
    first, second = installed("python", "-c", code).splitlines()
    version = nfkernels.__version__
    assert first == f"{installed.site}/nfkernels/__init__.py {version} {version} False"
    assert second == "3 2"


def test_its_metadata(installed):
    (found,) = importlib.metadata.distributions(name="nfkernels", path=[str(installed.site)])
    assert found.version == nfkernels.__version__
    assert found.metadata["License-Expression"] == "BSD-3-Clause"
    assert found.metadata["Requires-Python"] == ">=3.10"
    needed = [r for r in found.requires if "extra ==" not in r]
    assert [re.match(r"\w+", r)[0] for r in needed] == ["torch", "numpy", "safetensors"]
    assert found.read_text("entry_points.txt").split() == ["[console_scripts]", "nfkernels", "=", "nfkernels.cli:main"]


def test_its_command_runs(installed):
    said = installed("nfkernels", "info")
    assert re.search(rf"nfkernels +{re.escape(nfkernels.__version__)}", said)
    assert "affine_coupling" in said
    assert "the compiled module nfkernels._C was not built" in said


def test_an_example_runs_from_it(installed):
    pytest.importorskip("matplotlib")
    example = shutil.copy(ROOT / "examples/twenty_lines.py", installed.folder)
    assert "nats" in installed("python", example, "--steps", "20", timeout=300)
    assert {path.name for path in (installed.folder / "twenty_lines").iterdir()} >= {"flow.safetensors", "density.png"}


# --- compiled ---------------------------------------------------------------------------------------------------------

COMPILER = """#!/bin/sh
# Makes what it is told to make, empty.
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


def test_a_wheel_with_a_compiled_module_is_named_after_the_stable_abi(sdist, tmp_path):
    """By a compiler that compiles nothing; with one that does: :func:`test_compiled_wheel`."""
    compiler = tmp_path / "cxx"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    wheel = wheel_of(sdist, tmp_path, NFKERNELS_CPU="1", NFKERNELS_CUDA="0", CXX=str(compiler))
    assert re.fullmatch(rf"nfkernels-{re.escape(nfkernels.__version__)}-cp310-abi3-linux_\w+\.whl", wheel.name)
    assert [name for name in members(wheel) if name.endswith(".so")] == ["nfkernels/_C.abi3.so"]


@pytest.mark.exhaustive
def test_compiled_wheel(sdist, tmp_path):
    cuda = "1" if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file() else "0"
    wheel = wheel_of(sdist, tmp_path, NFKERNELS_CPU="1", NFKERNELS_CUDA=cuda, TORCH_CUDA_ARCH_LIST="9.0")
    assert "-cp310-abi3-linux_" in wheel.name
    built = {name for name in members(wheel) if name.endswith(".so")}
    assert built == {"nfkernels/_C.abi3.so", *(["nfkernels/_C_cuda.abi3.so"] if cuda == "1" else [])}
    environment = Environment(tmp_path, wheel)
    assert re.search(r"affine_coupling_forward +cpu +native", environment("nfkernels", "info"))
    environment("nfkernels", "demo", "rings", "--steps", "2", timeout=300)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    pattern = re.compile(rf"(?<![\d.]){re.escape(nfkernels.__version__)}(?![\d.])")
    named = [
        p for p in ROOT.glob("*.*") if p.suffix in (".toml", ".py", ".cff", ".in") and pattern.search(p.read_text())
    ]
    assert not named, "the version is nfkernels/_version.py's to tell"


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\] - (\d{4}-\d\d-\d\d|unreleased)$", text, re.MULTILINE)
    assert versions[0][0] == nfkernels.__version__
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}


def test_the_citation_can_be_read():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the schema, 1.2.0, requires
    allowed = {"cff-version", "message", "title", "authors", "type", "abstract", "license", "keywords", "date-released"}
    assert set(cited) <= allowed
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["license"] == "BSD-3-Clause"
    assert all(author.get("name") or author.get("family-names") for author in cited["authors"])
    assert all(isinstance(word, str) for word in cited["keywords"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_contributing_names_folders_and_options_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(table)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:tests|csrc|nfkernels)/[^`*]+)`", text):
        assert (ROOT / name).exists(), name
