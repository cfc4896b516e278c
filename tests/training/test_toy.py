"""The toy densities: points and densities belong together, and are those that everybody knows."""

import functools
import math

import pytest
import torch

from nfkernels.training.data.toy import TOYS

NAMES = ("moons", "rings", "checkerboard", "pinwheel")


SIDE, LARGER = 160, 1.25  # pixels of a picture a bit larger than the view


@functools.cache
def picture(name):
    """The log-density `[SIDE, SIDE]` in the middle of each pixel (the first axis is x), the pixels' area, the box."""
    box = [((low + high) / 2, (high - low) / 2 * LARGER) for low, high in TOYS[name].view]
    sides = [m + h * (torch.arange(SIDE, dtype=torch.float64) * 2 + 1 - SIDE) / SIDE for m, h in box]
    log_p = TOYS[name].log_prob(torch.cartesian_prod(*sides)).view(SIDE, SIDE)
    return log_p, 4 * box[0][1] * box[1][1] / SIDE**2, [(m - h, m + h) for m, h in box]


def test_there_are_these():
    assert tuple(TOYS) == NAMES
    assert all(toy.name == name and toy.title for name, toy in TOYS.items())


@pytest.mark.parametrize("name", NAMES)
def test_points_follow_the_seed_and_nothing_else(name):
    toy = TOYS[name]
    first = toy.sample(100, seed=3)
    assert first.shape == (100, 2)
    assert first.dtype == torch.float32
    torch.manual_seed(99)
    assert torch.equal(first, toy.sample(100, seed=3))
    assert not torch.equal(first, toy.sample(100, seed=4))
    assert toy.sample(0, seed=0).shape == (0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one_and_its_view_shows_the_points(name):
    log_p, area, _ = picture(name)
    edges_cut_pixels = 0.03 if name == "checkerboard" else 1e-4
    assert log_p.exp().sum() * area == pytest.approx(1, abs=edges_cut_pixels)
    drawn, view = TOYS[name].sample(5000, seed=0), TOYS[name].view
    inside = torch.stack([(drawn[:, k] > low) & (drawn[:, k] < high) for k, (low, high) in enumerate(view)])
    assert inside.all(0).float().mean() > 0.99


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_points_are_as_frequent_as_their_density_says(name):
    """Counts in 20 x 20 cells against the density's integral over each: chi-squared, 1 in 10^6 by chance."""
    count, cells = 40_000, 20
    log_p, area, box = picture(name)
    expected = count * area * log_p.exp().view(cells, SIDE // cells, cells, SIDE // cells).sum((1, 3))
    drawn = TOYS[name].sample(count, seed=1).double()
    place = [((drawn[:, k] - low) / (high - low) * cells).long() for k, (low, high) in enumerate(box)]
    seen = torch.bincount(place[0] * cells + place[1], minlength=cells**2).view(cells, cells)
    enough = expected > 10
    freedom = int(enough.sum())
    assert freedom > 40
    squares = ((seen - expected).square() / expected)[enough].sum().item()
    assert squares < freedom + 4.75 * math.sqrt(2 * freedom) + 15
    assert seen[expected < 1e-6].sum() <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_the_mean_log_density_is_minus_the_entropy(name):
    log_p, area, _ = picture(name)
    minus_entropy = (log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum() * area
    of_points = TOYS[name].log_prob(TOYS[name].sample(10_000, seed=2))
    assert abs(of_points.mean() - minus_entropy) < 4 * of_points.std() / 100 + 1e-3


def test_the_checkerboard_is_eight_squares():
    drawn = TOYS["checkerboard"].sample(20_000, seed=0)
    square = torch.floor(drawn / 2).long()
    assert ((square.sum(1) % 2) == 0).all()
    assert len(square.unique(dim=0)) == 8
    assert torch.allclose(TOYS["checkerboard"].log_prob(drawn), torch.tensor(-math.log(32.0), dtype=torch.float64))
    assert TOYS["checkerboard"].log_prob(torch.tensor([[1.0, -1.0], [5.0, 5.0]])).tolist() == [-math.inf, -math.inf]


def test_the_moons_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = torch.from_numpy(datasets.make_moons(40_000, noise=0.1, random_state=0)[0])
    ours = TOYS["moons"].sample(40_000, seed=0).double()
    assert torch.allclose(theirs.mean(0), ours.mean(0), atol=0.02)
    assert torch.allclose(theirs.T.cov(), ours.T.cov(), atol=0.02)
    likely = [TOYS["moons"].log_prob(points).mean().item() for points in (theirs, ours)]
    assert likely[0] == pytest.approx(likely[1], abs=0.02)


def test_rings_have_their_radii():
    radius = TOYS["rings"].sample(20_000, seed=0).norm(dim=1)
    near = (radius[:, None] - torch.tensor((0.75, 1.5, 2.25, 3.0))).abs().min(1)
    assert (near.values < 0.36).all()
    assert (near.indices.bincount() / 20_000 - 0.25).abs().max() < 0.02


def test_the_pinwheel_has_five_like_arms():
    """A fifth of a turn changes nothing."""
    toy = TOYS["pinwheel"]
    drawn = toy.sample(500, seed=0).double()
    turn = torch.tensor(2 * math.pi / 5, dtype=torch.float64)
    rotation = torch.stack((torch.stack((turn.cos(), turn.sin())), torch.stack((-turn.sin(), turn.cos()))))
    assert torch.allclose(toy.log_prob(drawn), toy.log_prob(drawn @ rotation), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_far_away_and_wrong_shapes(name):
    toy = TOYS[name]
    assert (toy.log_prob(torch.tensor([[50.0, -50.0], [0.0, 1e4]])) < -100).all()
    assert not toy.log_prob(torch.zeros(1, 2)).isnan().any()
    assert toy.log_prob(torch.zeros(0, 2)).shape == (0,)
    with pytest.raises(ValueError, match=r"\[N, 2\], got a tensor of shape \(3,\)"):
        toy.log_prob(torch.zeros(3))
