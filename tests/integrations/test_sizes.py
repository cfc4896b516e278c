"""Where a swap does not pay it is not made: tables on a CPU, below what an adapter's ``pays_from`` says."""

import math

import pytest
import torch
from torch import nn

from nfkernels import affine_coupling
from nfkernels.integrations import Adapter, accelerate, register
from nfkernels.integrations.swap import is_swapped

OPTIONS = {"scale_map": "exp", "identity": "first"}


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x):
        first, rest = x.chunk(2, 1)
        shift, log_s = self._params(first, x.dim()).chunk(2, 1)
        return torch.cat([first, rest * log_s.exp() + shift], 1), log_s.flatten(1).sum(1)

    def _params(self, first, dim):
        return self.net(first) if dim == 2 else self.net(first.movedim(1, -1)).movedim(-1, 1)


class Never(Coupled):
    pass


@register(Coupled)
class CoupledAdapter(Adapter):
    def pays_from(self, module: nn.Module) -> float:
        return 1000

    class Layer:
        def forward(self, x):
            return affine_coupling(x, self._params(x[:, :2], x.dim()), **OPTIONS)


@register(Never)
class NeverAdapter(CoupledAdapter):
    def pays_from(self, module: nn.Module) -> float:
        return math.inf


@pytest.fixture(autouse=True)
def whatever_the_size():
    """Here the sizes count."""


SMALL, LARGE, IMAGE = torch.randn(249, 4), torch.randn(250, 4), torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize("x", [LARGE, IMAGE], ids=["large", "image"])
def test_what_pays_is_fused(x):
    layer = Coupled()
    assert [row.status for row in accelerate(layer, x)] == ["fused"]
    assert is_swapped(layer)


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (Coupled(), SMALL, "a table (249, 4) on a CPU: the original is as fast below 1,000 numbers"),
        (Never(), LARGE, "a table (250, 4) on a CPU: the original is as fast"),
    ],
)
def test_what_does_not_pay_is_kept(layer, x, reason):
    report = accelerate(layer, x)
    assert [(row.status, row.reason) for row in report] == [("kept", reason)]
    assert not is_swapped(layer)


def test_the_first_call_that_is_large_enough_proves():
    layer = Coupled()
    report = accelerate(layer)
    assert (report.rows[0].status, report.rows[0].reason) == ("pending", "tables on a CPU from 1,000 numbers on")
    layer(SMALL)
    assert report.rows[0].status == "pending"
    layer(LARGE)
    assert (report.rows[0].status, report.rows[0].reason) == ("fused", "")
    assert accelerate(Never()).rows[0].reason == "not for tables on a CPU"


def test_without_a_proof_the_size_is_not_known():
    layer = Coupled()
    accelerate(layer, verify=False)
    assert is_swapped(layer)
