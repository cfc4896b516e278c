"""Numbers that a reader relies on, against flows whose bits are known."""

import dataclasses
import math

import pytest
import torch
from tiny import glow, stripes, tabular

from nfkernels.nn import Bijection, Chain, ImageFlow, Uniform
from nfkernels.training import (
    DataError,
    ImageData,
    evaluate,
    independent_pixel_bits,
    load_images,
    round_trip_error,
    split,
    uniform_bits,
)
from nfkernels.training.evaluation import images_at_once, reconstruction


class Identity(Bijection):
    """Flat, and wrong by ``error`` on the way back."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = torch.nn.Parameter(torch.tensor(error))

    def forward(self, x, context=None, *, lengths=None):
        return x, x.new_zeros(len(x))

    def inverse(self, z, context=None, *, lengths=None):
        return z + self.error, z.new_zeros(len(z))


def test_a_uniform_flow_needs_log2_levels_bits():
    flow = ImageFlow(Chain(Identity()), Uniform((1, 4, 4)), (1, 4, 4), grey_levels=5)
    outcome = evaluate(flow, stripes(7), draws=3)
    assert outcome.mean == pytest.approx(math.log2(5), abs=1e-6)
    assert outcome.mean == pytest.approx(uniform_bits(5), abs=1e-6)
    assert outcome.standard_error == pytest.approx(0, abs=1e-6)
    assert (outcome.samples, outcome.draws, outcome.unit) == (7, 3, "bits/dim")


def test_mean_over_draws_and_standard_error_over_images():
    flow, data = glow().train(), stripes(6)
    outcome = evaluate(flow, data, draws=4, seed=3)
    assert flow.training  # left as it was
    flow.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        draws = [flow.bits_per_dim(data.images, generator=generator) for _ in range(4)]
    per_image = torch.stack(draws).mean(0).double()
    assert outcome.mean == pytest.approx(per_image.mean().item(), abs=1e-6)
    assert outcome.standard_error == pytest.approx(per_image.std().item() / math.sqrt(6), abs=1e-6)
    assert evaluate(flow, data, draws=4, seed=3) == outcome
    assert evaluate(flow, data, draws=4, seed=4) != outcome
    assert math.isnan(evaluate(flow, stripes(1), draws=1).standard_error)


def test_more_samples_than_fit_one_forward():
    flow, x = tabular(), torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    outcome = evaluate(flow, x, draws=20)
    assert outcome.mean == pytest.approx(-flow.log_prob(x).mean().item(), abs=1e-5)
    assert (outcome.samples, outcome.draws, outcome.unit) == (600, 1, "nats")


def test_round_trip_error_is_the_largest():
    data = stripes(20)
    assert round_trip_error(glow(), data) < 1e-5
    broken = ImageFlow(Chain(Identity(error=0.25)), Uniform((1, 4, 4)), (1, 4, 4), grey_levels=5)
    assert round_trip_error(broken, data) == pytest.approx(0.25, abs=1e-6)


def test_a_reconstruction_counts_what_comes_back_wrong():
    data = stripes(20)
    good = reconstruction(glow(), data, images=7)
    assert (good.images, good.values, good.wrong, good.grey_levels) == (7, 7 * 16, 0, 0)
    assert good.largest < 1e-5
    # A grey level is 0.2: an error of 0.25 puts every value below the highest, 4, one too high.
    broken = ImageFlow(Chain(Identity(error=0.25)), Uniform((1, 4, 4)), (1, 4, 4), grey_levels=5)
    bad = reconstruction(broken, data)
    assert (bad.images, bad.wrong, bad.grey_levels) == (20, int((data.images < 4).sum()), 1)
    assert bad.largest == pytest.approx(0.25, abs=1e-6)
    with torch.no_grad():
        broken.bijection[0].error.fill_(math.nan)
    assert math.isnan(reconstruction(broken, data).largest)
    assert math.isnan(round_trip_error(broken, data))


def test_large_images_go_through_a_flow_in_small_parts():
    assert images_at_once((3, 32, 32)) == 256
    assert images_at_once((3, 256, 256)) == 21
    assert images_at_once((3, 4096, 4096)) == 1


def test_more_importance_samples_give_a_tighter_bound():
    flow, data = glow(), stripes(12)
    usual, tighter = (evaluate(flow, data, draws=4, importance_samples=k) for k in (1, 16))
    assert (tighter.draws, tighter.importance_samples) == (4, 16)
    assert tighter.mean < usual.mean
    with pytest.raises(ValueError, match="importance_samples is 0"):
        evaluate(flow, data, importance_samples=0)


def one_pixel(*values):
    return ImageData(torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1), None, 2, None, "pixel")


def test_independent_pixels_by_hand():
    # Nothing to choose on: one is added to each count, so P(1) = (1 + 1) / (3 + 2).
    outcome = independent_pixel_bits(one_pixel(0, 0, 1), one_pixel(), one_pixel(1, 1))
    assert outcome.mean == pytest.approx(-math.log2(2 / 5))
    # A validation part like the training part: the smallest constant fits best.
    outcome = independent_pixel_bits(one_pixel(0, 0, 0), one_pixel(0), one_pixel(0))
    assert outcome.mean == pytest.approx(-math.log2(3.001 / 3.002))
    with pytest.raises(DataError, match="another image shape"):
        independent_pixel_bits(stripes(3), stripes(3), one_pixel(1))
    with pytest.raises(DataError, match="no images"):
        independent_pixel_bits(stripes(3), stripes(3), one_pixel())


def test_independent_pixels_on_the_digits():
    pytest.importorskip("sklearn")
    outcome = independent_pixel_bits(*split(load_images("digits"), seed=0))
    assert outcome.mean == pytest.approx(2.436, abs=0.002)
    assert 0.005 < outcome.standard_error < 0.03


def test_data_that_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"images \[1, 6, 6\], the flow was built for \[1, 4, 4\]"):
        evaluate(glow(), ImageData(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), None, 5, None, "large"))
    with pytest.raises(ValueError, match="draws is 0"):
        evaluate(glow(), stripes(2), draws=0)


def test_more_classes_than_the_flow_has_are_told():
    data = stripes(8, labels=True)
    more = dataclasses.replace(data, classes=("rows", "columns", "neither"))
    with pytest.raises(DataError, match="stripes has 3 classes, the flow was built for 2"):
        evaluate(glow(classes=2), more)
    evaluate(glow(), more, draws=1)  # nobody asks for the classes
