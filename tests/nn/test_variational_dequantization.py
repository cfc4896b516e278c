"""Learned dequantisation: its density, its rounding, its training; and bits per dimension with importance samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nfkernels import nn as N
from nfkernels.models import Glow
from nfkernels.training import ImageData, evaluate


def moved(module, by=0.2, seed=0):
    """Every parameter off its start, where a dequantizer does nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def glow(shape=(1, 4, 4), *, by=0.1, **options):
    torch.manual_seed(0)
    given = {"levels": 1, "steps": 1, "hidden": 6, "grey_levels": 17, "dequantization": "variational", **options}
    return moved(Glow(shape, **given), by).eval()


def images(flow, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, flow.grey_levels, (n, *flow.event_shape), dtype=torch.uint8, generator=g)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# --- the density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 2)])
def test_a_new_one_is_uniform(shape):
    layer = N.VariationalDequantization(shape)
    noise = torch.rand(100, *shape)
    noise[0], noise[1] = 0, 1 - 2.0**-24
    u, logdet = layer(noise, torch.rand(100, *shape))
    torch.testing.assert_close(u, noise, atol=2e-7, rtol=0)
    torch.testing.assert_close(logdet, torch.zeros(100), atol=2e-5, rtol=0)
    flow = glow(shape, by=0)
    uniform = Glow(shape, levels=1, steps=1, hidden=6, grey_levels=17)
    state = {k: v for k, v in flow.state_dict().items() if not k.startswith("dequantizer.")}
    uniform.load_state_dict(state)
    data = images(flow)
    found, expected = (f.eval().bits_per_dim(data, generator=seeded()) for f in (flow, uniform))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 4, 2), (3, 2, 2)])
def test_log_q_is_that_of_the_dense_jacobian(shape):
    flow = glow(shape).double()
    data = images(flow, 1)
    noise = flow.noise(data, generator=seeded())
    image = (2 * data.double() + 1) / 17 - 1

    def draw(v):
        return flow.dequantizer(v.reshape(noise.shape), image)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(draw, noise.flatten())
    x, log_q = flow.dequantize_and_log_prob(data, generator=seeded())
    torch.testing.assert_close(log_q[0], -torch.linalg.slogdet(jacobian).logabsdet)
    assert log_q.abs() > 0.1
    torch.testing.assert_close(x.flatten(), (data.flatten() + draw(noise.flatten())) / 17)
    u, logdet = flow.dequantizer(noise, image)
    back, inverse = flow.dequantizer.inverse(u, image)
    torch.testing.assert_close(back, noise, atol=1e-9, rtol=0)
    torch.testing.assert_close(inverse, -logdet, atol=1e-7, rtol=0)


def test_q_depends_on_the_image():
    flow = glow()
    noise = torch.rand(1, 1, 4, 4).expand(2, -1, -1, -1)
    u, logdet = flow.dequantizer(noise, torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]))
    assert (u[0] - u[1]).abs().max() > 1e-3
    assert logdet[0] != logdet[1]


def test_the_bound_by_hand():
    flow = glow()
    data = images(flow)
    x, log_q = flow.dequantize_and_log_prob(data, generator=seeded())
    bits = -(flow.log_prob(x) - log_q) / (16 * math.log(2)) + math.log2(17)
    torch.testing.assert_close(flow.bits_per_dim(data, generator=seeded()), bits)
    torch.testing.assert_close(flow.nll(data, generator=seeded()), bits.mean())
    z, logdet = flow(data, generator=seeded())
    torch.testing.assert_close(flow.base.log_prob(z) + logdet, flow.log_prob(x) - log_q)
    torch.testing.assert_close(flow.nll(x), -flow.log_prob(x).mean() / (16 * math.log(2)) + math.log2(17))
    uniform = glow(dequantization="uniform")
    assert torch.equal(uniform.dequantize_and_log_prob(data)[1], torch.zeros(5))


# --- importance samples -----------------------------------------------------------------------------------------------


def log_likelihood(flow, image, nodes=8):
    """``log P(image)`` by Gauss-Legendre quadrature over the image's grey levels."""
    at, weight = np.polynomial.legendre.leggauss(nodes)
    at, weight = torch.tensor(at + 1) / 2, torch.tensor(weight) / 2
    d = image.numel()
    u = torch.cartesian_prod(*[at] * d).reshape(-1, *image.shape)
    log_weight = torch.cartesian_prod(*[weight.log()] * d).reshape(-1, d).sum(1)
    x = (image + u) / flow.grey_levels
    return torch.logsumexp(flow.log_prob(x) + log_weight, 0) - d * math.log(flow.grey_levels)


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
@torch.no_grad()
def test_many_importance_samples_give_the_likelihood(dequantization):
    flow = glow((1, 2, 2), grey_levels=2, dequantization=dequantization)
    flow.bijection[1].levels[0][1].log_scale.fill_(1.2)  # narrow, so that one sample is far from the truth
    data = images(flow, 2)
    truth = -torch.stack([log_likelihood(flow, image) for image in data]) / (4 * math.log(2))
    one = flow.bits_per_dim(data, draws=200, generator=seeded())
    assert (one - truth).min() > 0.06
    many = flow.bits_per_dim(data, importance_samples=5000, generator=seeded(), batch_size=10_000)
    torch.testing.assert_close(many.double(), truth, atol=0.02, rtol=0)


@torch.no_grad()
def test_more_importance_samples_are_a_tighter_bound():
    flow = glow(by=0.2)
    data = images(flow, 8)
    means = [
        flow.bits_per_dim(data, draws=240 // k, importance_samples=k, generator=seeded(), batch_size=1000).mean()
        for k in (1, 4, 16, 60)
    ]
    assert all(more < less - 0.01 for less, more in itertools.pairwise(means)), means


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
@torch.no_grad()
def test_chunks_change_nothing_and_bound_what_goes_together(dequantization):
    flow = glow(classes=3, dequantization=dequantization)
    data, labels = images(flow), torch.tensor([0, 1, 2, 1, 0])
    seen = []
    for part in (flow.bijection, flow.dequantizer):
        if part is not None:
            part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    expected = flow.bits_per_dim(data, labels, draws=2, importance_samples=7, generator=seeded())
    assert set(seen) == {5}
    for batch_size, largest in ((1, 1), (3, 3), (5, 5), (12, 10), (1000, 35)):
        seen.clear()
        found = flow.bits_per_dim(
            data, labels, draws=2, importance_samples=7, generator=seeded(), batch_size=batch_size
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert max(seen) == largest
    # By hand: the draws one after the other.
    g = seeded()
    weights = []
    for _ in range(14):
        x, log_q = flow.dequantize_and_log_prob(data, generator=g)
        weights.append(flow.log_prob(x, labels) - log_q)
    bound = (torch.stack(weights).reshape(2, 7, 5).logsumexp(1) - math.log(7)).mean(0)
    torch.testing.assert_close(expected, -bound / (16 * math.log(2)) + math.log2(17), atol=1e-5, rtol=1e-5)


# --- numbers at the edge ----------------------------------------------------------------------------------------------


class Ends(N.Bijection):
    """A dequantizer that always draws one number, as one that has saturated does."""

    def __init__(self, u):
        super().__init__()
        self.u = u

    def forward(self, x, context=None, *, lengths=None):
        return torch.full_like(x, self.u), x.new_zeros(len(x))


@pytest.mark.parametrize("u", [0.0, 1e-30, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0])
def test_no_u_leaves_its_grey_level(u):
    for levels in range(2, 257):
        data = torch.arange(levels, dtype=torch.uint8).reshape(1, 1, 1, levels)
        flow = N.ImageFlow(N.Chain(), N.StandardNormal((1, 1, levels)), (1, 1, levels), grey_levels=levels)
        assert flow.dequantizer is None
        flow.dequantizer = Ends(u)
        x = flow.dequantize(data)
        assert x.dtype == torch.float32
        assert x.max() < 1
        assert torch.equal(flow.quantize(x), data), levels


@pytest.mark.parametrize("by", [30.0, -30.0])
def test_a_saturated_sigmoid_still_has_its_density_and_gradient(by):
    flow = glow(by=0, grey_levels=256)
    with torch.no_grad():
        for coupling in flow.dequantizer.couplings:
            coupling.conditioner.last.bias[:2] = by
    data = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    noise = flow.noise(data, generator=seeded())
    u, logdet = flow.dequantizer(noise, torch.zeros(2, 1, 4, 4))
    if by > 0:
        assert u.max() == 1
    # Every value was moved by 60 in all: slopes near e^-60, which float32 has no room for beside 1.
    wide = flow.dequantizer.double()(noise.double(), torch.zeros(2, 1, 4, 4).double())[1]
    flow.dequantizer.float()
    torch.testing.assert_close(logdet.double(), wide, atol=1e-2, rtol=0)
    x = flow.dequantize(data)
    assert torch.equal(flow.quantize(x), data)
    flow.nll(data).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize(("levels", "channels"), [(2, 1), (256, 3)])
def test_draws_come_back_exactly(levels, channels):
    flow = glow((channels, 16, 16), grey_levels=levels, by=0.3)
    data = torch.cat([images(flow, 6), torch.zeros(1, channels, 16, 16).byte()])
    data = torch.cat([data, torch.full_like(data[:1], levels - 1)])
    x = flow.dequantize(data, generator=seeded())
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() < 1
    assert torch.equal(flow.quantize(x), data)
    assert flow.dequantizer(torch.rand(0, channels, 16, 16), torch.rand(0, channels, 16, 16))[1].shape == (0,)


def test_autocast_reaches_the_networks_only():
    flow = glow()
    data = images(flow)
    seen = []
    flow.dequantizer.features.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    for coupling in flow.dequantizer.couplings:
        coupling.conditioner.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
        coupling.register_forward_hook(lambda *a: seen.append(a[-1][0].dtype))
    exact = flow.dequantize_and_log_prob(data, generator=seeded())
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = flow.dequantize_and_log_prob(data, generator=seeded())
        flow.nll(data).backward()
    half, full = torch.bfloat16, torch.float32
    assert seen[:9] == [half, *[half, full] * 4]
    for a, b, tolerance in zip(found, exact, (5e-3, 0.1)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.dequantizer.parameters())


# --- one state of the generator, files, classes -----------------------------------------------------------------------


def test_one_state_of_the_generator_is_one_noise():
    flow = glow()
    data = images(flow)
    first = flow.dequantize_and_log_prob(data, generator=seeded())
    again = flow.dequantize_and_log_prob(data, generator=seeded())
    other = flow.dequantize_and_log_prob(data, generator=seeded(4))
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert torch.equal(flow.dequantize(data, generator=seeded()), first[0])
    assert flow.nll(data, generator=seeded()) == flow.nll(data, generator=seeded())
    torch.manual_seed(7)
    third = flow.dequantize(data)
    torch.manual_seed(7)
    assert torch.equal(flow.dequantize(data), third)


@pytest.mark.parametrize("made", ["glow", "by hand"])
def test_saved_and_loaded(made, tmp_path):
    flow = glow()
    if made == "by hand":
        layer = moved(N.VariationalDequantization((1, 2, 2), steps=3, hidden=5))
        flow = N.ImageFlow(N.Chain(), N.StandardNormal((1, 2, 2)), (1, 2, 2), grey_levels=9, dequantizer=layer)
    flow.save(tmp_path / "flow")
    loaded = N.load(tmp_path / "flow")
    assert type(loaded.dequantizer) is N.VariationalDequantization
    data = images(flow)
    assert torch.equal(flow.bits_per_dim(data, generator=seeded()), loaded.bits_per_dim(data, generator=seeded()))


def test_a_uniform_flow_s_file_is_what_it_was(tmp_path):
    """Nothing about dequantisation is in it: older files load, and older programs load it."""
    torch.manual_seed(0)
    flow = Glow((1, 4, 4), levels=1, steps=1, hidden=4)
    flow.save(tmp_path / "flow")
    assert b"dequanti" not in (tmp_path / "flow").read_bytes()
    assert N.load(tmp_path / "flow").dequantizer is None


def test_with_classes_every_parameter_learns():
    flow = glow(classes=3, by=0.2).train()
    data, labels = images(flow), torch.tensor([0, 1, 2, 1, 0])
    flow.nll(data, labels).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    bits = [flow.eval().bits_per_dim(data, y, generator=seeded()) for y in (labels, (labels + 1) % 3)]
    assert not torch.allclose(*bits)
    drawn = flow.sample(2, torch.tensor([0, 2]), generator=seeded())
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (2, 2, 1, 4, 4)


def test_initialize_starts_a_dequantizer_s_layers():
    def build():
        layer = N.Chain(N.Logit(1e-6), N.ActNorm(1), N.Sigmoid())
        bijection = N.Chain(N.ActNorm(1))
        return N.ImageFlow(bijection, N.StandardNormal((1, 4, 4)), (1, 4, 4), dequantizer=layer)

    flow = build()
    data = images(flow, 50)
    flow.initialize(data)
    assert flow.dequantizer.layers[1].initialized
    # Logistic noise has the standard deviation pi / sqrt(3).
    torch.testing.assert_close(
        flow.dequantizer.layers[1].log_scale.detach(), torch.tensor([-math.log(1.8138)]), atol=0.1, rtol=0
    )
    x = flow.dequantize(data)
    z = flow.bijection(x)[0]
    torch.testing.assert_close(z.std(), torch.tensor(1.0), atol=0.05, rtol=0)
    other = build()
    other.train().nll(data)  # the first training batch does the same
    assert other.dequantizer.layers[1].initialized
    third = build()
    third.initialize(torch.rand(50, 1, 4, 4))  # x needs no dequantizer
    assert not third.dequantizer.layers[1].initialized


# --- training ---------------------------------------------------------------------------------------------------------


def stripes(n):
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (n, 1, 4, 1), generator=g).expand(n, 1, 4, 4)
    return (rows ^ (torch.rand(n, 1, 4, 4, generator=g) < 0.05)).to(torch.uint8)


def trained(dequantization, data, steps=60):
    torch.manual_seed(0)
    flow = Glow((1, 4, 4), levels=1, steps=2, hidden=16, grey_levels=2, dequantization=dequantization)
    flow.initialize(data)
    optimizer, g = torch.optim.Adam(flow.parameters(), 1e-2), seeded(0)
    for _ in range(steps):
        batch = data[torch.randint(0, len(data), (64,), generator=g)]
        optimizer.zero_grad()
        flow.nll(batch, generator=g).backward()
        optimizer.step()
    return flow.eval()


def test_trained_it_is_a_tighter_bound_than_uniform_noise():
    data = stripes(512)
    uniform, variational = trained("uniform", data), trained("variational", data)
    with torch.no_grad():
        bits = [flow.bits_per_dim(data, draws=8, generator=seeded()).mean() for flow in (uniform, variational)]
    assert bits[1] < bits[0] - 0.015, bits
    found = evaluate(variational, ImageData(data, None, 2, None, "stripes"), draws=8)
    assert found.mean == pytest.approx(float(bits[1]), abs=0.01)


@pytest.mark.slow
def test_images_to_loss_is_one_graph():
    torch._dynamo.reset()
    flow = glow().train()
    data = images(flow)
    flow.nll(data)  # starts what starts from data

    def run(function):
        torch.manual_seed(0)
        flow.zero_grad()
        z, logdet = function(data)
        (flow.base.log_prob(z) + logdet).mean().backward()
        return [z.detach(), logdet.detach(), *(p.grad.clone() for p in flow.parameters())]

    compiled = run(torch.compile(flow, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, run(flow)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_training_does_not_wait_for_the_device():
    flow = glow().train()
    data = images(flow)
    flow.nll(data)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("linear_bijection", "batches", "image_flow", "squeeze", "bijection"):
            patch.setattr(f"nfkernels.nn.{module}.reads_values", lambda x: False)
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host read"))
        flow.nll(data).backward()
        flow.bits_per_dim(data, importance_samples=3, batch_size=20)


# --- what is refused --------------------------------------------------------------------------------------------------

NOISE = torch.rand(2, 1, 4, 4)
MISTAKES = {
    "odd": (lambda: N.VariationalDequantization((1, 4, 3)), "squeezes images by 2: both sides must be even, got 4 x 3"),
    "shape": (lambda: N.VariationalDequantization((4, 4)), r"shape is \(channels, height, width\), got \(4, 4\)"),
    "steps": (lambda: N.VariationalDequantization((1, 4, 4), steps=0), "at least 1 step and 1 hidden channel, got 0"),
    "noise": (
        lambda: N.VariationalDequantization((3, 4, 4))(NOISE, NOISE),
        r"this VariationalDequantization is for images \[B, 3, 4, 4\], got noise \(2, 1, 4, 4\)",
    ),
    "no image": (
        lambda: N.VariationalDequantization((1, 4, 4))(NOISE),
        r"takes the images as its context, floating point \(2, 1, 4, 4\) like the noise, got none",
    ),
    "bytes": (
        lambda: N.VariationalDequantization((1, 4, 4))(NOISE, NOISE.byte()),
        r"like the noise, got torch.uint8 \(2, 1, 4, 4\)",
    ),
    "one image": (
        lambda: N.VariationalDequantization((1, 4, 4))(NOISE, NOISE[:1]),
        r"like the noise, got torch.float32 \(1, 1, 4, 4\)",
    ),
    "unknown": (lambda: glow(dequantization="learned"), "unknown dequantization 'learned': expected 'uniform' or 'var"),
    "samples": (
        lambda: glow().bits_per_dim(torch.zeros(1, 1, 4, 4).byte(), importance_samples=0),
        "importance_samples must be at least 1, got 0",
    ),
    "values": (lambda: glow().nll(torch.full((1, 1, 4, 4), 17).byte()), "has the value 17, but this flow has 17 grey"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_messages(name):
    act, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)


def test_a_dequantizer_is_a_bijection():
    with pytest.raises(TypeError, match="dequantizer must be a Bijection or None, got Linear"):
        N.ImageFlow(N.Chain(), N.StandardNormal((1, 2, 2)), (1, 2, 2), dequantizer=torch.nn.Linear(1, 1))
