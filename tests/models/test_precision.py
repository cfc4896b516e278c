"""Precision in use: a trained Glow reconstructs its data, with its networks in bfloat16 too."""

from __future__ import annotations

import pytest
import torch

from nfkernels import models


def blobs(n: int, seed: int) -> torch.Tensor:
    """Images with structure to learn: a bright spot somewhere on a slope, 32 grey levels."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.arange(8.0)
    cy, cx, size = (torch.rand(n, 1, 1, generator=g) * s + o for s, o in ((7, 0), (7, 0), (2, 0.7)))
    spot = torch.exp(-((axis[:, None] - cy) ** 2 + (axis - cx) ** 2) / size**2)
    slope = axis * torch.rand(n, 1, 1, generator=g) * 0.05
    return ((spot * 0.7 + slope).clamp(0, 0.99) * 32).to(torch.uint8)[:, None]


def trained(steps: int, autocast: bool) -> models.Glow:
    torch.manual_seed(0)
    flow = models.Glow((1, 8, 8), levels=2, steps=4, hidden=32, grey_levels=32)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    first = None
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = flow.nll(blobs(32, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < first - 0.5, "the flow did not learn: its precision would mean nothing"
    return flow.eval()


def reconstruction(flow: models.Glow, autocast: bool) -> torch.Tensor:
    x = (blobs(64, 10_000).float() + torch.rand(64, 1, 8, 8)) / 32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, logdet = flow(x)
        back = flow.decode_continuous(z)
    assert z.dtype == logdet.dtype == back.dtype == torch.float32
    return (back - x).abs()


@pytest.mark.parametrize("steps", [60, pytest.param(250, marks=pytest.mark.exhaustive)])
def test_trained_glow_reconstructs(steps):
    flow = trained(steps, autocast=True)
    error = reconstruction(flow, autocast=True)
    assert error.mean() < 1e-4
    assert error.max() < 1e-2
    assert reconstruction(flow, autocast=False).max() < 1e-5


@pytest.mark.parametrize("steps", [60, pytest.param(250, marks=pytest.mark.exhaustive)])
def test_bfloat16_networks_cost_little_likelihood(steps):
    flow = trained(steps, autocast=True)
    data = blobs(256, 20_000)
    with torch.no_grad():
        exact = flow.bits_per_dim(data, generator=torch.Generator().manual_seed(0)).mean()
        with torch.autocast("cpu", torch.bfloat16):
            low = flow.bits_per_dim(data, generator=torch.Generator().manual_seed(0)).mean()
    assert abs(low - exact) < 0.02
