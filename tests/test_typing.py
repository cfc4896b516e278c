"""mypy on the package and on what users write with it: settings in pyproject.toml, expected types in the code itself.

``tests/typing/user_code.py`` says ``assert_type`` of what must be known, and ``type: ignore`` of what must be refused;
an ignore that is not needed is an error too, so a signature that decays to Any is seen.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC_INTEGRATIONS = [f"nfkernels.integrations.{name}" for name in ("accelerate", "adapter", "registry", "report")]


def test_types():
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_user_code_expects_something():
    text = (ROOT / "tests/typing/user_code.py").read_text(encoding="utf-8")
    assert text.count("assert_type(") > 25
    assert len(re.findall(r"# type: ignore\[[\w-]+\]", text)) >= 4


def test_errors_are_not_waved_through():
    """What is exempt: the Triton kernels, and the classes that stand in for other libraries' untyped ones."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["files"] == ["nfkernels", "examples", "tests/typing"]
    assert settings["warn_unused_ignores"] is True
    exempt = [module for o in settings["overrides"] if o.get("ignore_errors") for module in o["module"]]
    assert exempt == ["nfkernels.triton.*", "nfkernels.integrations.*"]
    (again,) = [o["module"] for o in settings["overrides"] if o.get("ignore_errors") is False]
    assert set(again) == {"nfkernels.integrations", *PUBLIC_INTEGRATIONS}
    assert not [o for o in settings["overrides"] if o.get("follow_imports")]
