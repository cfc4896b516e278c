"""The Glow: its density by hand, its samples, its latents, its classes."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import models
from nfkernels import nn as N


def glow(shape=(1, 8, 8), *, move=0.1, **options):
    torch.manual_seed(0)
    flow = models.Glow(shape, **{"levels": 2, "steps": 2, "hidden": 8, "grey_levels": 17, **options})
    flow.initialize(images(flow), labels(flow))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(move * torch.randn_like(p))
    return flow.eval()


def images(flow, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, flow.grey_levels, (n, *flow.event_shape), dtype=torch.uint8, generator=g)


def labels(flow, n=6):
    return None if flow.classes is None else torch.arange(n) % flow.classes


def test_bits_per_dim_by_hand():
    flow = glow()
    data = images(flow)
    total = 0
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        z, logdet = flow(flow.dequantize(data, generator=g))
        log_prob = -0.5 * z.square().sum(1) - 32 * math.log(2 * math.pi) + logdet
        total += -log_prob / (64 * math.log(2)) + math.log2(17)
    found = flow.bits_per_dim(data, draws=4, generator=torch.Generator().manual_seed(3))
    assert found.shape == (6,)
    torch.testing.assert_close(found, total / 4, atol=1e-4, rtol=1e-4)
    one = flow.bits_per_dim(data, generator=torch.Generator().manual_seed(3), batch_size=4)
    torch.testing.assert_close(flow.nll(data, generator=torch.Generator().manual_seed(3)), one.mean())


def test_uniform_model_has_the_bits_of_its_grey_levels():
    for levels in (2, 17, 256):
        flow = N.ImageFlow(N.Chain(), N.Uniform((1, 2, 3)), (1, 2, 3), grey_levels=levels)
        data = torch.randint(0, levels, (5, 1, 2, 3), dtype=torch.uint8)
        torch.testing.assert_close(flow.bits_per_dim(data, draws=2), torch.full((5,), math.log2(levels)))


@pytest.mark.parametrize("levels", [17, 256])
def test_dequantised_images_stay_below_one_and_come_back(levels):
    """Half a million draws for the brightest level: some round to 1 in float32 unless that is seen to."""
    flow = N.ImageFlow(N.Chain(), N.Uniform((1, 1, 1)), (2, 512, 512), grey_levels=levels)
    white = torch.full((1, 2, 512, 512), levels - 1, dtype=torch.uint8)
    for data in (white, torch.arange(levels, dtype=torch.uint8).repeat(2**19 // levels + 1)[: 2**19].view_as(white)):
        x = flow.dequantize(data)
        assert x.min() >= 0
        assert x.max() < 1
        assert torch.equal(flow.quantize(x), data)


def test_one_state_of_the_generator_is_one_noise():
    flow, g = glow(), torch.Generator().manual_seed(5)
    data = images(flow)
    first, second = flow.dequantize(data, generator=g), flow.dequantize(data, generator=g)
    assert not torch.equal(first, second)
    g.manual_seed(5)
    assert torch.equal(flow.dequantize(data, generator=g), first)
    state = g.get_state()
    assert torch.equal(flow.dequantize(data, generator=g), second)
    g.set_state(state)
    assert torch.equal(flow.dequantize(data, generator=g), second)
    torch.manual_seed(7)  # torch's own generator, where none is given
    third = flow.dequantize(data)
    torch.manual_seed(7)
    assert torch.equal(flow.dequantize(data), third)


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_rows_of_a_batch_get_the_noise_that_they_have_in_it(dequantization):
    flow = glow(dequantization=dequantization)
    data = images(flow)

    def seeded():
        return torch.Generator().manual_seed(5)

    whole = flow.noise(data, generator=seeded())
    for first, last in ((0, len(data)), (0, 2), (1, 4), (len(data) - 1, len(data)), (2, 2)):
        part = flow.noise(data[first:last], generator=seeded(), rows=(first, len(data)))
        assert torch.equal(part, whole[first:last])
    assert not torch.equal(flow.noise(data[1:2], generator=seeded()), whole[1:2])
    assert torch.equal(flow.nll(data, noise=whole), flow.nll(data, generator=seeded()))
    for rows in ((-1, len(data)), (1, len(data))):
        with pytest.raises(ValueError, match=r"images are not rows -?1 to"):
            flow.noise(data, rows=rows)


def test_every_image_is_decoded_exactly():
    flow = glow((3, 8, 4), grey_levels=256)
    data = images(flow)
    z = flow.encode(data)
    assert z.shape == (6, 96)
    assert torch.equal(flow.decode(z), data)
    assert torch.equal(flow.decode(flow.encode(data, batch_size=4), batch_size=5), data)
    x = torch.rand(6, 3, 8, 4)
    torch.testing.assert_close(flow.decode_continuous(flow.encode(x)), x, atol=1e-5, rtol=0)


def test_logdet_is_that_of_the_dense_jacobian():
    flow = glow((1, 4, 4)).double()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.reshape(x.shape))[0].flatten(), x.flatten())
    torch.testing.assert_close(flow(x)[1][0], torch.linalg.slogdet(jacobian).logabsdet)


def test_samples():
    flow = glow()
    drawn = flow.sample(5, generator=torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (5, 1, 8, 8)
    assert drawn.max() < 17
    assert torch.equal(drawn, flow.sample(5, generator=torch.Generator().manual_seed(1), batch_size=2))
    assert not torch.equal(drawn, flow.sample(5, generator=torch.Generator().manual_seed(2)))
    mode = flow.sample(3, temperature=0)
    assert torch.equal(mode, mode[:1].expand_as(mode))
    assert torch.equal(mode[:1], flow.decode(torch.zeros(1, 64)))
    assert flow.sample(0).shape == (0, 1, 8, 8)
    x = flow.rsample(4)
    assert x.requires_grad
    assert x.is_floating_point()
    x, log_prob = flow.sample_and_log_prob(4)
    torch.testing.assert_close(log_prob, flow.log_prob(x), atol=1e-2, rtol=1e-3)


def test_latents_by_level():
    flow = glow((3, 8, 8), levels=3)
    z = flow.encode(images(flow))
    parts = flow.split_latent(z)
    assert [tuple(p.shape) for p in parts] == [(6, 6, 4, 4), (6, 12, 2, 2), (6, 48, 1, 1)]
    assert torch.equal(torch.cat([p.flatten(1) for p in parts], 1), z)
    # The coarsest latents decide nothing about how the finest were made: only their level's output changes.
    other = torch.cat([torch.randn_like(parts[0]).flatten(1), z[:, 96:]], 1)
    back = flow.encode(flow.decode_continuous(other))
    torch.testing.assert_close(back, other, atol=1e-3, rtol=1e-3)


def test_classes_condition_everything():
    flow = glow(classes=4, move=0.2)
    data, y = images(flow), labels(flow)
    assert torch.equal(flow.decode(flow.encode(data, y), y), data)
    right, wrong = flow.log_prob(torch.rand(6, 1, 8, 8), y), flow.log_prob(torch.rand(6, 1, 8, 8), (y + 1) % 4)
    assert not torch.allclose(right, wrong)
    drawn = flow.sample(3, torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 2, 1, 8, 8)
    for one in (1, torch.tensor(1)):
        assert flow.sample(3, one).shape == (3, 1, 8, 8)
    same = [flow.sample(3, c, generator=torch.Generator().manual_seed(0)) for c in (1, torch.tensor([1]))]
    assert torch.equal(same[0], same[1][:, 0])
    flow.nll(data, y).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    d = flow.to_distribution(torch.tensor([0, 1, 2]))
    assert (d.batch_shape, d.event_shape) == ((3,), (1, 8, 8))
    assert d.sample((2,)).shape == (2, 3, 1, 8, 8)
    x = torch.rand(2, 3, 1, 8, 8)
    torch.testing.assert_close(d.log_prob(x)[1], flow.log_prob(x[1], torch.tensor([0, 1, 2])))


def test_a_new_class_conditional_glow_ignores_its_labels():
    torch.manual_seed(0)
    flow = models.Glow((1, 4, 4), levels=1, steps=1, hidden=4, classes=3).eval()
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(flow(x, torch.tensor([0, 1, 2]))[0], flow(x, torch.tensor([2, 0, 1]))[0])


def test_first_training_batch_initialises_every_level():
    flow = models.Glow((1, 8, 8), levels=2, steps=2, hidden=8, grey_levels=17)
    before = flow.eval().bits_per_dim(images(flow)).mean()
    assert not flow.bijection[1].levels[1][1].initialized
    flow.train().nll(images(flow, 64))
    assert all(level[1].initialized for level in flow.bijection[1].levels)
    assert flow.eval().bits_per_dim(images(flow)).mean() < before


def test_forward_is_one_graph():
    torch._dynamo.reset()
    flow = glow((1, 4, 4), levels=1, steps=1, classes=3)
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, y), flow(x, y)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["eval", "train"])
def test_one_graph_serves_every_batch_size(train):
    torch._dynamo.reset()
    flow = glow((1, 8, 8), steps=2).train(train)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for batch in (4, 5, 3):
        x = torch.rand(batch, 1, 8, 8)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(train):
            for a, b in zip(compiled(x), flow(x)):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", ["nll", "forward", "encode", "initialize", "bits_per_dim", "dequantize"])
def test_values_that_are_no_grey_levels_are_refused_everywhere(act):
    flow = glow()
    data = images(flow)
    data[2, 0, 3, 3] = 255
    with pytest.raises(ValueError, match=r"^an image has the value 255, but this flow has 17 grey levels$"):
        getattr(flow, act)(data)


def test_data_that_is_not_finite_starts_nothing():
    flow = models.Glow((1, 8, 8), levels=2, steps=2, hidden=8)
    x = torch.rand(3, 1, 8, 8)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="GlowSteps cannot start from this batch: 1 of 64 values is NaN"):
        flow.nll(x)
    assert not any(b for name, b in flow.named_buffers() if name.endswith("initialized"))
    assert torch.isfinite(flow.nll(torch.rand(3, 1, 8, 8)))


@pytest.mark.slow
def test_training_step_is_one_graph():
    torch._dynamo.reset()
    flow = glow((1, 4, 4), steps=1).train()
    data = images(flow)

    def run(function):
        torch.manual_seed(0)
        flow.zero_grad()
        z, logdet = function(data)
        (0.5 * z.square().sum(1) - logdet).mean().backward()
        return [p.grad.clone() for p in flow.parameters()]

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")(data)
    assert compiled[0].dtype == compiled[1].dtype == torch.float32
    x = torch.rand(6, 1, 4, 4)
    eager = run(lambda _: flow(x))
    traced = run(lambda _: torch.compile(flow, fullgraph=True, backend="aot_eager")(x))
    for a, b in zip(eager, traced):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_training_mode_does_not_wait_for_the_device():
    """Where looking at values is not free, a training step reads none."""
    flow = glow(classes=3).train()
    data, y = images(flow), labels(flow)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("linear_bijection", "batches", "image_flow", "squeeze", "bijection"):
            patch.setattr(f"nfkernels.nn.{module}.reads_values", lambda x: False)
        patch.setattr("nfkernels.models.glow.reads_values", lambda x: False)
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host read"))
        flow.nll(data, y).backward()


def test_meta_construction_takes_weights():
    flow = glow(classes=3)
    with torch.device("meta"):
        empty = models.Glow((1, 8, 8), levels=2, steps=2, hidden=8, grey_levels=17, classes=3)
    empty.load_state_dict(flow.state_dict(), assign=True)
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(empty.eval().sample(2, 1, generator=g[0]), flow.sample(2, 1, generator=g[1]))


SHAPE = r"this flow takes images \[B, 1, 8, 8\], got a tensor of shape"
BLACK = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
MISTAKES = {
    "odd": (
        lambda: models.Glow((1, 28, 27), levels=3),
        "images of 28 x 27 cannot be squeezed 3 times: with levels=3 both sides must be multiples of 8, "
        "for example 32 x 24",
    ),
    "shape": (lambda: models.Glow((8, 8)), r"an image's shape is \(channels, height, width\), got \(8, 8\)"),
    "levels": (lambda: models.Glow((1, 8, 8), levels=0), "a Glow needs at least 1 level, got 0"),
    "steps": (lambda: models.Glow((1, 8, 8), steps=[1, 2, 3]), "one number or one per level: got 3 for 2 levels"),
    "grey levels": (lambda: models.Glow((1, 8, 8), grey_levels=300), "grey_levels must be from 2 to 256"),
    "classes": (lambda: models.Glow((1, 8, 8), classes=0), "classes must be at least 1, got 0"),
    "uint8 log_prob": (lambda: glow().log_prob(BLACK), "got torch.uint8: for images use bits_per_dim"),
    "float bits": (lambda: glow().bits_per_dim(BLACK.float()), "takes uint8 images, got torch.float32: for x in"),
    "int bits": (lambda: glow().nll(BLACK.long()), "images must be uint8, got torch.int64"),
    "channels": (lambda: glow().nll(torch.zeros(2, 3, 8, 8).byte()), SHAPE),
    "rank": (lambda: glow().bits_per_dim(torch.zeros(8, 8).byte()), SHAPE),
    "size": (lambda: glow().encode(torch.zeros(2, 1, 8, 6).byte()), SHAPE),
    "float size": (lambda: glow().log_prob(torch.zeros(2, 1, 8, 6)), SHAPE),
    "initialize size": (lambda: glow().initialize(torch.zeros(2, 1, 8, 6)), SHAPE),
    "values": (lambda: glow().bits_per_dim(BLACK + 17), "has the value 17, but this flow has 17 grey levels"),
    "draws": (lambda: glow().bits_per_dim(BLACK, draws=0), "draws must be at least 1"),
    "nan": (lambda: glow().log_prob(BLACK + float("nan")), "64 of 64 values are NaN or infinite in sample 0"),
    "unwanted label": (lambda: glow().sample(1, 3), "built without classes: it takes no context"),
    "no label": (lambda: glow(classes=3).sample(1), r"built with 3 classes: give the labels as context="),
    "high label": (lambda: glow(classes=3).sample(1, 3), "label 3 is out of range: this flow has classes 0 to 2"),
    "low label": (lambda: glow(classes=3).sample(1, torch.tensor([1, -1])), "label -1 is out of range"),
    "float label": (lambda: glow(classes=3).sample(1, torch.tensor([1.0])), "labels must be integers"),
    "latents": (lambda: glow().decode(torch.zeros(1, 63)), r"this flow has latents \[B, 64\], got .*\(1, 63\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_messages(name):
    act, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)
