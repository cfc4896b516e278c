"""Other libraries' own tests, plain and swapped: the plugin swaps on construction, and the table tells what differs."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.peers import page, suite_plugin, suites
from nfkernels.integrations import Adapter
from nfkernels.integrations.registry import _BY_NAME, qualified, register
from nfkernels.integrations.swap import is_pending, is_swapped


@pytest.fixture
def served():
    """A layer, one derived from it, and an adapter for both, for one test."""

    class Doubled(nn.Module):
        def __init__(self, size=2):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return 2 * x * self.weight

    class Derived(Doubled):
        def __init__(self):
            super().__init__(3)
            assert not is_swapped(self)  # its constructor is not through
            self.extra = 1

    @register(Doubled)
    class _Adapter(Adapter):
        class Layer:
            def forward(self, x):
                return x * (2 * self.weight)

    yield Doubled, Derived
    del _BY_NAME[qualified(Doubled)]


@pytest.mark.parametrize("mode", ["proved", "trusted"])
def test_what_is_constructed_is_swapped(served, mode, monkeypatch):
    monkeypatch.setattr(suite_plugin, "swapped", Counter())
    for cls in served:
        suite_plugin.swap_when_constructed(cls, mode)
    for cls in served:
        layer = cls()
        assert is_swapped(layer)
        assert isinstance(layer, cls)
        assert is_pending(layer) == (mode == "proved")
        assert suite_plugin.swapped[qualified(cls)] == 1
        assert torch.equal(layer(torch.ones(len(layer.weight))), torch.full((len(layer.weight),), 2.0))
        assert not is_pending(layer)


def test_classes_of_a_library_that_is_not_here():
    assert list(suite_plugin.classes(["no_such_library.layers.Layer"])) == []


SUITE = """
import pytest, torch

def test_passes(): assert True
def test_fails(): raise KeyError("old")
def test_is_skipped(): pytest.skip("no")
def test_random(): assert abs(torch.rand(()).item() - 0.4963) < 1e-3
def test_looks_at_the_class():
    from nflows.transforms import AffineCouplingTransform
    layer = AffineCouplingTransform([0, 1], lambda i, o: torch.nn.Identity())
    assert "Swapped" not in [c.__name__ for c in type(layer).__mro__], "swapped"
"""


@pytest.mark.exhaustive  # four starts of pytest; what they are started with is tested above, one start below
def test_a_suite_in_all_its_runs(tmp_path):
    pytest.importorskip("nflows")
    source = tmp_path / "sources" / "nflows-9.9"
    (source / "tests").mkdir(parents=True)
    (source / "tests" / "test_it.py").write_text(SUITE)
    out = ["--out", str(tmp_path / "out"), "--commit", "abc"]
    assert main(["peers", "--suites", str(source.parent), *out]) == 1  # one test sees that its layer was swapped
    (path,) = (tmp_path / "out").glob("*/suites-*-abc.json")
    (entry,) = json.loads(path.read_text())["suites"]
    assert entry["runs"]["plain"]["counts"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert entry["runs"]["proved"]["counts"] == {"passed": 2, "failed": 2, "skipped": 1}
    assert entry["runs"]["plain"]["swapped"] == {}
    assert entry["runs"]["trusted"]["swapped"] == {"nflows.transforms.coupling.AffineCouplingTransform": 1}
    assert [t["test"].split("::")[-1] for t in entry["both_fail"]] == ["test_fails"]
    (differs,) = entry["differ"]
    assert differs["test"].endswith("test_looks_at_the_class")
    assert differs["states"] == {"plain": "passed", "proved": "failed", "trusted": "failed"}
    text = page.suites_table([entry])
    assert "| nflows-9.9 | 5 | 3 passed, 1 failed, 1 skipped | 2 passed, 2 failed, 1 skipped |" in text
    assert "test_looks_at_the_class`: plain: passed; proved: failed" in page.suites_details([entry])


def test_a_folder_without_sources(tmp_path, capsys):
    assert main(["peers", "--suites", str(tmp_path)]) == 2
    assert "holds no unpacked source distribution of nflows, normflows, zuko, FrEIA" in capsys.readouterr().err


def test_a_library_without_tests(tmp_path):
    (tmp_path / "FrEIA-0.2").mkdir()
    entry = suites.measure("FrEIA", tmp_path / "FrEIA-0.2")
    assert (entry["status"], entry["reason"]) == ("no tests", "its source distribution has none")
    assert "| FrEIA-0.2 | | no tests: its source distribution has none |" in page.suites_table([entry])


@pytest.mark.slow
def test_a_suite_that_cannot_be_collected_says_why(tmp_path):
    source = tmp_path / "zuko-1.0"
    (source / "tests").mkdir(parents=True)
    (source / "tests" / "test_it.py").write_text("import no_such_library")
    entry = suites.measure("zuko", source)
    assert entry["status"] == "failed"
    assert "No module named 'no_such_library'" in entry["reason"]
