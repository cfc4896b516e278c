"""``python -m benchmarks peers --sizes``: which sizes are swapped, and whether that pays."""

import pytest
import torch
from torch import nn

from benchmarks.peers import page, sizes
from benchmarks.peers.measure import QUICK
from nfkernels import affine_coupling
from nfkernels.integrations import Adapter, register


class Plain(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.net = nn.Linear(columns // 2, columns)

    def forward(self, x):
        first, rest = x.chunk(2, 1)
        shift, log_s = self.net(first).chunk(2, 1)
        return torch.cat([first, rest * log_s.exp() + shift], 1), log_s.sum(1)


@register(Plain)
class PlainAdapter(Adapter):
    def pays_from(self, module: nn.Module) -> float:
        return 100

    class Layer:
        def forward(self, x):
            return affine_coupling(x, self.net(x.chunk(2, 1)[0]), scale_map="exp", identity="first")


LAYER = sizes.Layer("torch", "Plain", Plain)


def test_every_size_is_timed_and_those_that_are_swapped_are_told():
    entries = [sizes.measure(LAYER, rows, 4, QUICK) for rows in (24, 25)]
    assert [e["swapped"] for e in entries] == [False, True]
    assert all(e[name]["before_ms"]["median"] > 0 for e in entries for name in ("forward", "step"))


def test_a_layer_that_is_refuted_is_no_measurement(monkeypatch):
    monkeypatch.setattr(PlainAdapter.Layer, "forward", lambda self, x: (x, x.sum(1)))
    with pytest.raises(RuntimeError, match="torch Plain was kept: forward: output"):
        sizes.measure(LAYER, 25, 4, QUICK)


def _size(rows, swapped, step):
    ratios = {"forward": {"ratio": {"median": 1.5}}, "step": {"ratio": {"median": step}}}
    return {"rows": rows, "columns": 4, "swapped": swapped} | ratios


def test_the_table_and_what_is_wrong_with_it():
    common = {"library": "some", "status": "measured"}
    good = common | {"id": "a", "sizes": [_size(64, False, 0.8), _size(512, True, 0.96)]}
    bad = common | {"id": "b", "sizes": [_size(64, True, 0.9), _size(512, True, 1.2)]}
    gone = common | {"id": "c", "status": "failed", "reason": "no c"}
    assert page.sizes_table([good, bad, gone]).splitlines() == [
        "| layer | 64 x 4 | 512 x 4 |",
        "| --- | ---: | ---: |",
        "| `a` | (1.50 0.80) | 1.50 0.96 |",
        "| `b` | 1.50 0.90 | 1.50 1.20 |",
        "| `c` | no c | no c |",
    ]
    assert page.sizes_problems([good, bad, gone]) == ["c: failed: no c", "b, 64 x 4: 0.9x: slower by more than 5 %"]
