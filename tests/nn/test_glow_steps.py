"""GlowSteps against the chain of layers that it replaces, and the two ways its networks are computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import nn as N
from nfkernels.nn import conv_net
from nfkernels.ops import random_key


def moved(module, by=0.2):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))
    return module


def as_chain(steps: N.GlowSteps, context_channels: int) -> N.Chain:
    """The same flow from separate layers, with the same numbers."""
    layers = []
    half = steps.channels // 2
    kernel = steps.weight1.shape[-1]
    for k in range(steps.steps):
        actnorm, mix = N.ActNorm(steps.channels), N.InvertibleConv1x1(steps.channels)
        network = N.ConvConditioner(
            steps.split, steps.hidden, 2 * half, context_channels=context_channels, kernel=kernel
        )
        hidden, out = slice(k * steps.hidden, (k + 1) * steps.hidden), slice(k * 2 * half, (k + 1) * 2 * half)
        with torch.no_grad():
            for name in ("log_scale", "bias"):
                getattr(actnorm, name).copy_(getattr(steps, name)[k])
            for name in ("lower", "upper", "log_s", "permutation", "sign_s"):
                getattr(mix, name).copy_(getattr(steps, name)[k])
            network.first.weight.copy_(steps.weight1[hidden])
            network.first.bias.copy_(steps.bias1[hidden])
            network.middle.weight.copy_(steps.weight2[hidden])
            network.middle.bias.copy_(steps.bias2[hidden])
            network.last.weight.copy_(steps.weight3[out])
            network.last.bias.copy_(steps.bias3[out])
            network.last_log_scale.copy_(steps.log_scale3[out])
            if context_channels:
                network.context.weight.copy_(steps.context_weight[hidden])
        layers += [actnorm, mix, N.AffineCoupling(network, order=steps.order, scale_map=steps.scale_map)]
    return N.Chain(layers).eval()


@pytest.mark.parametrize(("channels", "size", "context"), [(4, 3, 0), (5, 2, 3), (3, 6, 2)])
def test_it_is_the_chain_of_its_layers(channels, size, context):
    steps = moved(N.GlowSteps(channels, 3, 6, context_channels=context)).double().eval()
    chain = as_chain(steps, context).double()
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    c = torch.randn(2, context, dtype=torch.float64) if context else None
    for a, b in zip(steps(x, c), chain(x, c)):
        torch.testing.assert_close(a, b)
    z = torch.randn_like(x)
    for a, b in zip(steps.inverse(z, c), chain.inverse(z, c)):
        torch.testing.assert_close(a, b)


def test_it_starts_from_data_step_by_step():
    steps = moved(N.GlowSteps(4, 3, 6))
    chain = as_chain(steps, 0).train()
    x = 3 * torch.randn(32, 4, 3, 3) + 2
    z, logdet = steps(x)
    expected, total = chain(x)
    assert steps.initialized
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logdet, total, atol=1e-3, rtol=1e-4)
    for k in range(3):
        torch.testing.assert_close(steps.log_scale[k], chain[3 * k].log_scale, atol=1e-4, rtol=1e-4)


def test_a_new_step_is_volume_preserving_up_to_the_sigmoid():
    x = torch.randn(2, 4, 2, 2)
    steps = N.GlowSteps(4, 2, 8, scale_map="exp").eval()
    z, logdet = steps(x)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)  # rotations, and couplings that do nothing
    torch.testing.assert_close(z.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4),
    hidden=st.integers(1, 5), out=st.integers(1, 4), kernel=st.sampled_from([1, 3, 5]), last=st.sampled_from([1, 3, 5]),
    context=st.sampled_from(["none", "vector", "map"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matrix_products_are_the_convolutions(batch, channels, height, width, hidden, out, kernel, last, context, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    x = draw(batch, channels, height, width)
    weights = [
        draw(hidden, channels, kernel, kernel), draw(hidden), draw(hidden, hidden, 1, 1), draw(hidden),
        draw(out, hidden, last, last), draw(out),
    ]  # fmt: skip
    shapes = {"none": None, "vector": (batch, hidden), "map": (batch, hidden, height, width)}
    extra = None if context == "none" else draw(*shapes[context])
    inputs = [x, *weights] + ([] if extra is None else [extra])

    def run(matrices):
        y = conv_net.conv_net(x, conv_net.arrange(weights, matrices), extra, None, None, matrices, (kernel, last))
        return y, torch.autograd.grad(y.sin().sum(), inputs)

    (y, grads), (expected, expected_grads) = run(True), run(False)
    torch.testing.assert_close(y, expected)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b)


def test_small_images_on_the_cpu_take_the_matrix_path():
    w = torch.zeros(1)
    assert conv_net.by_matrices(torch.zeros(2, 3, 4, 4), w.dtype)
    assert not conv_net.by_matrices(torch.zeros(2, 3, 8, 8), w.dtype)
    assert not conv_net.by_matrices(torch.zeros(2, 3, 4, 4), torch.bfloat16)
    assert not conv_net.by_matrices(torch.zeros(2, 3, 4, 4, device="meta"), w.dtype)


@pytest.mark.parametrize("size", [3, 6], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("of", ["element", "channel"])
def test_dropout(of, size):
    x = torch.ones(64, 2, size, size)
    weights = [torch.ones(s) for s in ((8, 2, 1, 1), (8,), (8, 8, 1, 1), (8,), (8, 8, 1, 1), (8,))]
    weights[4] = torch.eye(8)[..., None, None]
    weights[5] = torch.zeros(8)
    matrices = conv_net.by_matrices(x, x.dtype)
    assert matrices == (size == 3)
    arranged = conv_net.arrange(weights, matrices)
    plain = conv_net.conv_net(x, arranged, None, None, None, matrices, (1, 1))
    drop = {
        "channel": conv_net.channel_factors((64, 8), 0.25, x.dtype, x.device),
        "element": lambda h: conv_net.drop_by_key(h, 0.25, random_key(1)),
    }[of]
    dropped = conv_net.conv_net(x, arranged, None, None, drop, matrices, (1, 1)) / plain
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs((dropped == 0).float().mean() - 0.25) < 0.06
    whole = (dropped == dropped[:, :, :1, :1]).all()
    assert whole == (of == "channel")


def test_dropout_acts_in_training_only():
    steps = moved(N.GlowSteps(4, 1, 8, dropout=0.5))
    x = torch.randn(4, 4, 2, 2)
    steps(x)
    assert not torch.equal(steps(x)[0], steps(x)[0])
    assert torch.equal(steps.eval()(x)[0], steps(x)[0])


def test_channels_last_reaches_the_stacked_weights():
    steps = moved(N.GlowSteps(4, 2, 6)).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = steps(x)
    steps = steps.to(memory_format=torch.channels_last)
    assert steps.weight1.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(steps(x), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = steps(x)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(z, expected[0], atol=0.3, rtol=0.1)


@pytest.mark.covering
@pytest.mark.parametrize("size", [(2, 2), (8, 8)], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_one_graph_serves_every_batch_size(size, train):
    torch._dynamo.reset()
    steps = moved(N.GlowSteps(4, 2, 5, last_kernel=1))
    steps.initialize(torch.randn(8, 4, *size))
    steps.train(train)
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    for batch in (4, 5, 3):
        x = torch.randn(batch, 4, *size, requires_grad=train)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(train):
            for a, b in zip(compiled(x), steps(x)):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_last_log_scale_multiplies_the_output():
    network = moved(N.ConvConditioner(2, 4, 3))
    x = torch.randn(2, 2, 6, 6)
    h = F.relu(network.middle(F.relu(network.first(x))))
    expected = network.last(h) * torch.exp(3 * network.last_log_scale)[:, None, None]
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


def test_matrices_and_their_inverses_agree_to_the_last_digit():
    """Made in float64 and rounded once: float32 products would be TF32 products wherever a user allows those."""
    steps = moved(N.GlowSteps(48, 3, 4), by=0.02)
    weights = steps._composed(torch.float32, inverse=False).weight.double()
    inverses = steps._composed(torch.float32, weight=False).inverse.double()
    exact = torch.linalg.inv(weights)
    assert (inverses - exact).abs().max() < 2e-7 * torch.linalg.cond(weights).max() * exact.abs().max()
    wide = [steps._composed(torch.float64, weight=w, inverse=not w) for w in (True, False)]
    eye = torch.eye(48).double().expand(3, -1, -1)
    torch.testing.assert_close(wide[0].weight @ wide[1].inverse, eye, atol=1e-9, rtol=0)
    assert torch.equal(wide[0].weight.float().double(), weights)
    torch.testing.assert_close(wide[0].logdet, steps.log_s.double().sum(), atol=1e-9, rtol=1e-9)
