"""What a layer of a small flow costs beside its arithmetic: how many calls reach PyTorch's dispatcher.

On tables of a few columns a call's fixed price is the price. The bounds are what there is today: a change that adds
calls to every layer shows here.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nfkernels.models import MAF, NSF, RealNVP

FREE = ("aten.t.", "aten.detach.", "aten.view.", "aten.expand.", "aten.slice.", "aten.alias.", "aten.lift_fresh.")
LAYERS = 5


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith(FREE):
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _count(function):
    with _Counting() as counting:
        function()
    return counting.calls


def _log_prob(flow, x):
    with torch.no_grad():
        flow.log_prob(x)


def _sample(flow, x):
    flow.sample(len(x))


def _step(flow, x):
    flow.nll(x).backward()


# Calls of each kind in a whole flow of five layers, networks included (two blocks of two layers, or two hidden layers).
MOST = {
    ("NSF", "log_prob"): 120,
    ("NSF", "sample"): 115,
    ("NSF", "step"): 300,
    ("MAF", "log_prob"): 60,
    ("MAF", "sample"): 10,
    ("MAF", "step"): 140,
    ("RealNVP", "log_prob"): 45,
    ("RealNVP", "sample"): 40,
    ("RealNVP", "step"): 130,
}
FLOWS = {
    "NSF": lambda: NSF(10, layers=LAYERS, hidden=16),
    "MAF": lambda: MAF(10, layers=LAYERS, hidden=16),
    "RealNVP": lambda: RealNVP(10, layers=LAYERS, hidden=16),
}


@pytest.mark.parametrize(("model", "what"), MOST, ids=lambda v: v)
def test_calls_of_a_whole_flow(model, what):
    torch.manual_seed(0)
    flow, x = FLOWS[model](), torch.randn(8, 10)
    calls = _count(lambda: {"log_prob": _log_prob, "sample": _sample, "step": _step}[what](flow, x))
    assert sum(calls.values()) <= MOST[model, what], calls


def test_a_spline_coupling_is_one_op_and_its_network():
    torch.manual_seed(0)
    flow, x = FLOWS["NSF"](), torch.randn(8, 10)
    calls = _count(lambda: _step(flow, x))
    for direction in ("forward", "backward"):
        assert calls[f"nfkernels._rational_quadratic_spline_{direction}.default"] == LAYERS
    assert not any("gather" in name or "index" in name or "searchsorted" in name for name in calls), calls


def test_samples_of_a_masked_flow_take_one_op_per_layer():
    torch.manual_seed(0)
    flow = FLOWS["MAF"]()
    assert (
        _count(lambda: _sample(flow, torch.randn(8, 10)))["nfkernels._autoregressive_inverse_forward.default"] == LAYERS
    )
