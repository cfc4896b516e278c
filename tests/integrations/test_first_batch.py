"""A model whose layers its first batch initialises, accelerated before it has seen one."""

import pytest
import torch
from torch import nn

import nfkernels
from benchmarks.models.ported_glow import ActNorm


@pytest.mark.parametrize("with_example", [True, False])
def test_the_example_inputs_are_not_the_first_batch(with_example):
    torch.manual_seed(0)
    model, x = nn.Sequential(ActNorm(4)), 3 * torch.randn(8, 4, 5, 5) + 1
    nfkernels.accelerate(model, torch.randn(8, 4, 5, 5) if with_example else None)
    assert not model[0].initialized
    assert torch.equal(model[0].scale, torch.ones_like(model[0].scale))
    z, _ = model(x)
    assert model[0].initialized
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
