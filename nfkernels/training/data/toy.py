"""Densities of the plane that everybody knows by sight: points drawn from them, and their exact densities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)
_AT_ONCE = 4096  # points of which the arcs' and the arms' densities are computed together

Box = tuple[tuple[float, float], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Toy:
    """A density of the plane.

    Args:
        name: on the command line.
        title: in sentences and pictures.
        draw: independent points, float64 `[N, 2]`, from a number and a generator.
        density: ``log p`` in nats, float64 `[N]`, of points `[N, 2]` in float64.
        view: (left, right), (bottom, top) of a picture that shows nearly all points.
    """

    name: str
    title: str
    draw: Callable[[int, torch.Generator], Tensor]
    density: Callable[[Tensor], Tensor]
    view: Box

    def sample(self, count: int, *, seed: int) -> Tensor:
        """``count`` independent points, float32 `[count, 2]` on the CPU. One seed gives the same points everywhere."""
        return self.draw(count, torch.Generator().manual_seed(seed)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` in nats, float64 `[N]` on the CPU, of points `[N, 2]`: exact but for rounding; of the
        pinwheel -inf beyond eight standard deviations. ``ValueError`` for another shape."""
        if x.dim() != 2 or x.shape[1] != 2:
            raise ValueError(f"points of the plane are [N, 2], got a tensor of shape {tuple(x.shape)}")
        parts = x.detach().cpu().double().split(_AT_ONCE)
        return torch.cat([self.density(part) for part in parts])


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _choice(of: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(of, (count,), generator=generator)


# --- two moons: scikit-learn's make_moons(noise=0.1), its points spread at random rather than evenly -----------------

_MOON_NOISE = 0.1


def _arcs(angle: Tensor) -> Tensor:
    """The two half circles `[2, N, 2]`, without noise."""
    upper = torch.stack((angle.cos(), angle.sin()), -1)
    return torch.stack((upper, torch.tensor((1.0, 0.5)) - upper))


def _draw_moons(count: int, generator: torch.Generator) -> Tensor:
    which, angle = _choice(2, count, generator), math.pi * _uniform(count, generator)
    return _arcs(angle)[which, torch.arange(count)] + _MOON_NOISE * _normal(count, generator)


def _moons_density(x: Tensor) -> Tensor:
    """Every point of the arcs carries a normal: an integral over the angle, by Gauss and Legendre."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(96))
    centres = _arcs(math.pi / 2 * (nodes + 1)).flatten(0, 1)
    squares = (x[:, None] - centres).square().sum(-1) / _MOON_NOISE**2
    log_weights = (weights / 4).log().repeat(2)  # the nodes' weights add up to 2, and so do the moons
    return torch.logsumexp(log_weights - squares / 2, 1) - _LOG_2PI - 2 * math.log(_MOON_NOISE)


# --- rings: four circles, normal noise around each point of them -----------------------------------------------------

_RADII, _RING_NOISE = (0.75, 1.5, 2.25, 3.0), 0.08


def _draw_rings(count: int, generator: torch.Generator) -> Tensor:
    radius = torch.tensor(_RADII, dtype=torch.float64)[_choice(len(_RADII), count, generator)]
    angle = 2 * math.pi * _uniform(count, generator)
    circle = torch.stack((angle.cos(), angle.sin()), -1)
    return radius[:, None] * circle + _RING_NOISE * _normal(count, generator)


def _rings_density(x: Tensor) -> Tensor:
    """The mean of a normal around the points of a circle is a Bessel function of the distance from the middle."""
    radius, distance, variance = torch.tensor(_RADII, dtype=torch.float64), x.norm(dim=1)[:, None], _RING_NOISE**2
    bessel = torch.special.i0e(distance * radius / variance).log()  # exp(-|.|) I0(.)
    each = bessel - (distance - radius).square() / (2 * variance)
    return torch.logsumexp(each, 1) - math.log(len(_RADII)) - _LOG_2PI - math.log(variance)


# --- checkerboard: every other of 4 x 4 squares with a side of 2 ------------------------------------------------------


def _draw_checkerboard(count: int, generator: torch.Generator) -> Tensor:
    column, row = _choice(4, count, generator), 2 * _choice(2, count, generator)
    corner = torch.stack((column, row + column % 2), -1)
    inside = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return 2 * (corner + inside) - 4


def _checkerboard_density(x: Tensor) -> Tensor:
    square = torch.floor(x / 2)
    filled = (square.sum(1) % 2 == 0) & (x >= -4).all(1) & (x < 4).all(1)
    return torch.where(filled, x.new_tensor(-math.log(32)), -math.inf)


# --- pinwheel: five normal arms that are turned the more the farther out they are (Johnson et al. 2016) ---------------

_ARMS, _ALONG, _ACROSS, _TURN, _SCALE = 5, 0.3, 0.1, 0.25, 2.0


def _draw_pinwheel(count: int, generator: torch.Generator) -> Tensor:
    arm = 2 * math.pi / _ARMS * _choice(_ARMS, count, generator)
    along, across = (_normal(count, generator) * torch.tensor((_ALONG, _ACROSS)) + torch.tensor((1.0, 0.0))).unbind(1)
    angle = arm + _TURN * along.exp()
    cos, sin = angle.cos(), angle.sin()
    return _SCALE * torch.stack((along * cos - across * sin, along * sin + across * cos), 1)


def _pinwheel_density(x: Tensor) -> Tensor:
    """The turn keeps the radius: along the circle, all points of the five normals that it brings to ``x`` are found.

    A point of a normal at the angle a comes to a + TURN exp(r cos a); of a fine grid over a those cells are searched
    in which that passes x's own angle, and the root in each is polished by Newton's method.
    """
    x = x / _SCALE
    radius, angle = x.norm(dim=1)[:, None, None], torch.atan2(x[:, 1], x[:, 0])[:, None, None]
    wanted = angle - 2 * math.pi / _ARMS * torch.arange(_ARMS)[:, None]
    # An arm points to the right, and nothing to speak of lies more than eight deviations beside it.
    beside = 8 * _ACROSS / radius
    grid = torch.where(beside < 1, beside.clamp(max=1).asin(), math.pi) * torch.linspace(-1, 1, 65, dtype=x.dtype)

    def excess(a: Tensor, radius: Tensor, wanted: Tensor) -> Tensor:
        return torch.remainder(a + _TURN * (radius * a.cos()).exp() - wanted + math.pi, 2 * math.pi) - math.pi

    ends = excess(grid, radius, wanted)
    left, right = ends[..., :-1], ends[..., 1:]
    cells = ((left * right <= 0) & ((left - right).abs() < math.pi) & (left != 0)).nonzero(as_tuple=True)
    radius, wanted, grid = radius[cells[0], 0, 0], wanted[cells[0], cells[1], 0], grid[cells[0], 0]
    low, high = (grid.gather(1, cells[2][:, None] + k)[:, 0] for k in (0, 1))
    left, right = left[cells], right[cells]
    a = low + (high - low) * left / (left - right)
    for polishing in (True, True, True, True, False):
        slope = 1 - _TURN * radius * a.sin() * (radius * a.cos()).exp()
        if polishing:
            a = a - excess(a, radius, wanted) / slope
    along, across = (radius * a.cos() - 1) / _ALONG, radius * a.sin() / _ACROSS
    each = -0.5 * (along.square() + across.square()) - slope.abs().log()
    summed = x.new_full(ends[..., 1:].shape, -math.inf).index_put(cells, each).flatten(1).logsumexp(1)
    return summed - _LOG_2PI - math.log(_ARMS * _ALONG * _ACROSS * _SCALE**2)


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("moons", "two moons", _draw_moons, _moons_density, ((-1.6, 2.6), (-1.15, 1.65))),
        Toy("rings", "four rings", _draw_rings, _rings_density, ((-3.6, 3.6), (-3.6, 3.6))),
        Toy("checkerboard", "checkerboard", _draw_checkerboard, _checkerboard_density, ((-4.6, 4.6), (-4.6, 4.6))),
        Toy("pinwheel", "pinwheel", _draw_pinwheel, _pinwheel_density, ((-4.4, 4.4), (-4.4, 4.4))),
    )
}
