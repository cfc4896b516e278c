"""Angles: their splines, rotations, features and base distribution."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import nn as N
from nfkernels.nn.circle import wrap


def circular(**options):
    torch.manual_seed(0)
    layer = N.CircularSpline(2, bins=5, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    return layer


def test_wrap_never_gives_the_upper_end():
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([-math.pi, math.pi], dtype=dtype)
        x = torch.cat(
            [ends, ends.nextafter(ends - 1), ends.nextafter(ends + 1), -torch.logspace(-30, -5, 9, dtype=dtype)]
        )
        y = wrap(torch.cat([x, x + math.pi, x - math.pi]), -math.pi, math.pi)
        assert (y >= -math.pi).all()
        assert (y < math.pi).all()


def test_circular_spline_takes_angles_modulo_the_period():
    layer = circular().double()
    x = torch.rand(20, 2, dtype=torch.float64) * 2 * math.pi - math.pi
    z, logdet = layer(x)
    assert z.min() >= -math.pi
    assert z.max() < math.pi
    for turns in (-2, 1):
        for a, b in zip(layer(x + turns * 2 * math.pi), (z, logdet)):
            torch.testing.assert_close(a, b)
        back, inverse = layer.inverse(z + turns * 2 * math.pi)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse, -logdet)


def test_circular_spline_is_smooth_where_the_ends_meet():
    layer = circular(low=0.0, high=1.0).double()
    seam = -layer.phase.detach()  # what the rotation brings to the interval's end
    x = torch.stack([seam - 1e-7, seam + 1e-7])
    x.requires_grad_()
    z, logdet = layer(x)
    gap = (z[1] - z[0]).remainder(1.0)
    assert (torch.minimum(gap, 1 - gap) < 1e-5).all()
    torch.testing.assert_close(logdet[0], logdet[1], atol=1e-4, rtol=0)


def test_circular_spline_with_a_uniform_base_is_a_density_of_the_circle():
    flow = N.Flow(circular(), N.Uniform(2, -math.pi, math.pi))
    n = 200
    axis = (torch.arange(n) + 0.5) / n * 2 * math.pi - math.pi
    grid = torch.cartesian_prod(axis, axis)
    total = flow.log_prob(grid).exp().mean() * (2 * math.pi) ** 2
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-3, rtol=0)
    ends = torch.tensor([-math.pi, math.pi]).float()
    beside = torch.cat([ends, ends.nextafter(ends + 1), ends.nextafter(ends - 1)])
    assert torch.isfinite(flow.log_prob(beside[:, None].expand(-1, 2))).all()


def test_phase_shift_turns_angles_alone():
    layer = N.PhaseShift(3, [0, 2], low=0.0, high=360.0)
    with torch.no_grad():
        layer.phase.fill_(100.0)
    z, logdet = layer(torch.tensor([[10.0, 10.0, 300.0]]))
    torch.testing.assert_close(z, torch.tensor([[110.0, 10.0, 40.0]]))
    assert not logdet.any()
    torch.testing.assert_close(layer.inverse(z)[0], torch.tensor([[10.0, 10.0, 300.0]]))


def test_periodic_features_are_cosine_and_sine():
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, x, context=None):
            seen.append((x, context))
            return x

    layer = N.PeriodicFeatures(Seen(), 3, [2, 0], low=0.0, high=360.0)
    context = torch.ones(1, 2)
    layer(torch.tensor([[90.0, 5.0, 180.0]]), context)
    torch.testing.assert_close(seen[0][0], torch.tensor([[0.0, 5.0, -1.0, 1.0, 0.0]]), atol=1e-6, rtol=0)
    assert seen[0][1] is context
    assert N.PeriodicFeatures(N.MLP(3, 4, 2), 2, [1]).context_channels == 0
    assert N.PeriodicFeatures(N.MLP(3, 4, 2, context_channels=5), 2, [1]).context_channels == 5


def test_circular_normal():
    base = N.CircularNormal(3, [1], low=0.0, high=4.0)
    z = torch.tensor([[0.5, 1.0, -2.0], [0.5, 9.0, -2.0]])
    expected = -0.5 * (0.25 + 4.0) - math.log(2 * math.pi) - math.log(4.0)
    torch.testing.assert_close(base.log_prob(z), torch.full((2,), expected))
    x = base.sample(4000, torch.Generator().manual_seed(0), temperature=0.5)
    assert x[:, 1].min() >= 0
    assert x[:, 1].max() < 4
    torch.testing.assert_close(x.mean(0), torch.tensor([0.0, 2.0, 0.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.5, 4 / math.sqrt(12), 0.5]), atol=0.05, rtol=0)
    assert N.CircularNormal(2).circular.all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: N.PhaseShift(2, [2]), "circular names columns 0 to 1, got 2"),
        (
            lambda: N.PhaseShift(2, low=1.0, high=0.0),
            "PhaseShift needs a period from low to a higher high, got 1.0 and",
        ),
        (lambda: N.PhaseShift(2)(torch.zeros(1, 3)), "PhaseShift was built for 2 channels"),
        (
            lambda: N.PeriodicFeatures(N.MLP(3, 4, 2), 3, [0]),
            "3 inputs with 1 angles are 4 features, but .* in_channels=3",
        ),
        (lambda: N.CircularNormal(2, [-1]), "circular names columns 0 to 1, got -1"),
        (lambda: N.CircularNormal(2).sample(1, temperature=-1), "temperature must be a finite number of at least 0"),
        (lambda: N.CircularNormal(2).log_prob(torch.zeros(1, 3)), r"this base is over \(2,\), got a tensor of shape"),
        (lambda: N.CircularSpline(2, low=0.0, high=float("inf")), "finite low < high"),
    ],
)
def test_mistakes_get_one_sentence(act, message):
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)
