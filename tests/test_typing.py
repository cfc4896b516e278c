"""mypy on the package and on what users write with it: settings in pyproject.toml, expected types in the code itself.

``tests/typing/user_code.py`` says ``assert_type`` of what must be known, and ``type: ignore`` of what must be refused;
an ignore that is not needed is an error too, so a signature that decays to Any is seen.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_user_code_expects_something():
    text = (ROOT / "tests/typing/user_code.py").read_text(encoding="utf-8")
    assert text.count("assert_type(") > 25
    assert len(re.findall(r"# type: ignore\[[\w-]+\]", text)) >= 4


def test_errors_are_not_waved_through():
    """No package of ours is exempt, but the Triton kernels, which are no Python that a type checker knows."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["files"] == ["nfkernels", "tests/typing"]
    assert settings["warn_unused_ignores"] is True
    exempt = [o["module"] for o in settings["overrides"] if o.get("ignore_errors") or o.get("follow_imports")]
    assert exempt == ["nfkernels.triton.*"]
