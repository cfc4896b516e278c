"""Outlier scores against what they are defined as; compressed sizes; the area under the ROC curve."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from known_flows import gaussian, posterior

from nfkernels import models
from nfkernels.diagnostics import auroc, compressed_bits, level_log_probs, outlier_scores


def glow(levels=2, classes=None):
    torch.manual_seed(0)
    flow = models.Glow((1, 8, 8), levels=levels, steps=2, hidden=8, grey_levels=17, classes=classes)
    flow.nll(torch.randint(0, 17, (32, 1, 8, 8), dtype=torch.uint8), None if classes is None else torch.arange(32) % 3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return flow.eval()


# --- levels ---


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_levels_add_up_to_the_log_likelihood(levels):
    flow = glow(levels)
    x = torch.rand(7, 1, 8, 8)
    found = level_log_probs(flow, x)
    assert found.shape == (7, levels)
    torch.testing.assert_close(found.sum(1), flow.log_prob(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(level_log_probs(flow, x, batch_size=3), found, rtol=1e-5, atol=1e-4)


def test_a_level_is_what_its_latents_and_layers_say():
    flow = glow(2)
    x = torch.rand(3, 1, 8, 8)
    _, coarse = flow.split_latent(flow.encode(x))
    level = flow.bijection[1].levels[1]
    h = torch.randn(3, 8, 4, 4)
    own = -0.5 * (coarse**2).flatten(1).sum(1) - 0.5 * math.log(2 * math.pi) * coarse[0].numel()
    inputs = []
    handle = level.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    flow.encode(x)
    handle.remove()
    assert inputs[0].shape[1] < h.shape[1]
    torch.testing.assert_close(level_log_probs(flow, x)[:, 1], own + level(inputs[0])[1], rtol=1e-5, atol=1e-4)


def test_a_flow_without_levels_is_refused():
    with pytest.raises(ValueError, match="this Flow has no levels"):
        level_log_probs(gaussian(), torch.zeros(2, 2))


# --- scores ---


def test_scores_of_samples():
    flow, x, known = gaussian(1.0), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(50, 2)
    scores = outlier_scores(flow, x, reference=known)
    assert list(scores) == ["likelihood", "typicality"]
    base = math.log(2 * math.pi)
    assert scores["likelihood"].tolist() == pytest.approx([base, base + 12.5])
    assert scores["typicality"].tolist() == pytest.approx([1.0, 11.5])  # the reference lies at base + 1
    assert scores["likelihood"].dtype == torch.float64
    assert list(outlier_scores(flow, x)) == ["likelihood"]


def test_a_context_goes_with_its_sample():
    theta, x = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [10.0]])
    one, two = outlier_scores(posterior(features=1), theta, x, batch_size=1)["likelihood"].tolist()
    assert one == pytest.approx(two)


def test_scores_of_images():
    flow = glow()
    images = torch.randint(0, 17, (20, 1, 8, 8), dtype=torch.uint8)

    def scores(**how):
        return outlier_scores(flow, images, generator=torch.Generator().manual_seed(0), **how)

    found = scores(reference=images)
    assert list(found) == ["likelihood", "typicality", "complexity", "level 1", "level 2"]
    torch.testing.assert_close(found["level 1"] + found["level 2"], found["likelihood"])
    torch.testing.assert_close(found["complexity"], found["likelihood"] - compressed_bits(images))
    bits = flow.bits_per_dim(images, draws=20).double()
    torch.testing.assert_close(found["likelihood"], bits, rtol=0.05, atol=0.1)
    assert list(scores()) == ["likelihood", "complexity", "level 1", "level 2"]


def test_classes_go_with_images():
    flow = glow(classes=3)
    images = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
    assert outlier_scores(flow, images, torch.arange(5) % 3)["level 1"].shape == (5,)


def test_without_a_class_all_of_them_count_alike():
    flow = glow(classes=3)
    images = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)

    def bits(labels):
        found = outlier_scores(flow, images, labels, generator=torch.Generator().manual_seed(0))
        return found["likelihood"], set(found)

    each = torch.stack([bits(torch.full((5,), label))[0] for label in range(3)])
    nats = (each * 64 * math.log(2)).neg().logsumexp(0) - math.log(3)
    found, names = bits(None)
    torch.testing.assert_close(found, -nats / (64 * math.log(2)))
    assert names == {"likelihood", "complexity"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(0, 2)}, "no samples to score"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, "data must be a floating point tensor, got torch.int64"),
        ({"reference": torch.zeros(0, 2)}, "reference has no samples"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        outlier_scores(gaussian(), **{"x": torch.zeros(2, 2), **options})


# --- complexity ---


def test_simple_images_are_short():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
    flat = torch.full_like(noise, 77)
    ramp = (torch.arange(32).view(1, 1, 32, 1) * 3 + torch.arange(32) * 2).expand(1, 3, 32, 32).to(torch.uint8)
    noisy, plain, smooth = compressed_bits(torch.cat([noise, flat, ramp])).tolist()
    assert 8.0 <= noisy < 8.1, "nothing compresses noise"
    assert plain < smooth < 0.5


def test_it_is_the_best_of_pngs_filters():
    image = torch.randint(0, 256, (1, 1, 5, 7), dtype=torch.uint8)
    h, w = 5, 7
    pixel = [[int(image[0, 0, i, j]) if i >= 0 <= j else 0 for j in range(-1, w)] for i in range(-1, h)]

    def paeth(a, b, c):
        p = a + b - c
        return min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]

    filters = [
        lambda a, b, c: 0, lambda a, b, c: a, lambda a, b, c: b, lambda a, b, c: (a + b) // 2, paeth,
    ]  # fmt: skip
    sizes = []
    for predict in filters:
        rest = bytes(
            (pixel[i + 1][j + 1] - predict(pixel[i + 1][j], pixel[i][j + 1], pixel[i][j])) % 256
            for i in range(h)
            for j in range(w)
        )
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
        sizes.append(len(packer.compress(rest) + packer.flush()))
    assert compressed_bits(image).tolist() == [min(sizes) * 8 / 35]


def test_only_images_are_compressed():
    with pytest.raises(ValueError, match=r"expected uint8 images \[N, C, H, W\], got torch.float32 \[2, 3\]"):
        compressed_bits(torch.zeros(2, 3))
    assert compressed_bits(torch.zeros(0, 1, 4, 4, dtype=torch.uint8)).shape == (0,)


# --- telling apart ---


@pytest.mark.parametrize(
    ("inside", "outside", "area"),
    [
        ([1, 2, 3], [4, 5], 1.0),
        ([4, 5], [1, 2, 3], 0.0),
        ([1, 1], [1, 1, 1], 0.5),
        ([1, 2], [2, 3], 0.875),
        ([0, math.inf], [math.inf, -math.inf], 0.375),
    ],
)
def test_auroc(inside, outside, area):
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(area)


def test_auroc_of_two_normals():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator) + 1
    assert auroc(a, b) == pytest.approx(
        torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.5**0.5)).item(), abs=0.01
    )


def test_auroc_refuses_what_has_no_order():
    with pytest.raises(ValueError, match="1 of 2 scores outside are NaN"):
        auroc(torch.zeros(2), torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="no scores inside"):
        auroc(torch.zeros(0), torch.zeros(1))
