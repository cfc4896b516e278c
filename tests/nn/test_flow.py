"""The public face: densities, samples, contexts, chunks, distributions."""

from __future__ import annotations

import math

import pytest
import torch

from nfkernels import nn as N
from nfkernels.models import Glow


def tabular(context=0, embed=None, seed=0):
    torch.manual_seed(seed)
    layers = []
    for side, (kept, out) in (("first", (2, 2)), ("second", (1, 4))):
        network = N.MLP(kept, 8, out, context_channels=context)
        layers += [N.ActNorm(3), N.InvertibleConv1x1(3), N.AffineCoupling(network, identity=side)]
    flow = N.Flow(N.Chain(layers), N.DiagonalNormal(3), embed=embed).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def test_log_prob_is_base_plus_logdet():
    flow, x = tabular(), torch.randn(5, 3)
    z, logdet = flow(x)
    torch.testing.assert_close(flow.log_prob(x), flow.base.log_prob(z) + logdet)
    torch.testing.assert_close(flow.nll(x), -flow.log_prob(x).mean())
    torch.testing.assert_close(flow.encode(x), z)
    torch.testing.assert_close(flow.decode(z), x, atol=1e-5, rtol=1e-5)


def test_density_integrates_to_one():
    torch.manual_seed(0)
    flow = N.Flow(N.AffineCoupling(N.MLP(1, 8, 2), scale_map="exp"), N.StandardNormal(2)).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    side = torch.linspace(-8, 8, 200)
    grid = torch.cartesian_prod(side, side)
    area = (side[1] - side[0]) ** 2
    assert abs(flow.log_prob(grid).exp().sum() * area - 1) < 1e-2


def test_samples_have_the_density_they_report():
    flow = tabular()
    x, log_prob = flow.sample_and_log_prob(7)
    assert x.shape == (7, 3)
    assert not x.requires_grad
    torch.testing.assert_close(log_prob, flow.log_prob(x), atol=1e-4, rtol=1e-4)
    _, cold = flow.sample_and_log_prob(7, temperature=0.3, generator=torch.Generator().manual_seed(1))
    x = flow.sample(7, temperature=0.3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cold, flow.log_prob(x), atol=1e-4, rtol=1e-4)


def test_context_batches_as_torch_does():
    flow = tabular(context=2, embed=torch.nn.Linear(4, 2))
    context = torch.randn(5, 4)
    x, log_prob = flow.sample_and_log_prob(3, context)
    assert x.shape == (3, 5, 3)
    assert log_prob.shape == (3, 5)
    for i in range(3):
        torch.testing.assert_close(log_prob[i], flow.log_prob(x[i], context), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(flow.log_prob(x[0], context), flow.log_prob(x[0], -context))


def test_gradients_flow_through_samples():
    flow = tabular()
    x, log_prob = flow.rsample_and_log_prob(64)
    target = -0.5 * (x - 3).square().sum(1)
    (log_prob - target).mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0 or p.numel() == 1, name
    assert flow.rsample(2).requires_grad


def test_reverse_kl_learns_the_target():
    torch.manual_seed(0)
    flow = N.Flow(N.Inverse(N.ActNorm(2)).inv, N.StandardNormal(2)).eval()
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    target = torch.distributions.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]))
    for _ in range(150):
        x, log_prob = flow.rsample_and_log_prob(128)
        loss = (log_prob - target.log_prob(x).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_chunks_give_equal_results(size):
    flow, x = tabular(context=2), torch.randn(7, 3)
    context = torch.randn(7, 2)
    torch.testing.assert_close(flow.log_prob(x, context, batch_size=size), flow.log_prob(x, context))
    torch.testing.assert_close(flow.encode(x, context, batch_size=size), flow.encode(x, context))
    z = flow.encode(x, context)
    torch.testing.assert_close(flow.decode(z, context, batch_size=size), flow.decode(z, context))
    results = [
        flow.sample_and_log_prob(2, context, generator=torch.Generator().manual_seed(0), batch_size=s)
        for s in (size, None)
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_generator_and_temperature():
    flow = tabular()
    a, b = (flow.sample(4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    mode = flow.sample(4, temperature=0)
    assert torch.equal(mode, mode[:1].expand_as(mode))


def test_as_a_distribution():
    flow = tabular()
    d = flow.to_distribution()
    assert isinstance(d, torch.distributions.Distribution)
    assert (d.batch_shape, d.event_shape) == ((), (3,))
    x = d.rsample((4, 2))
    assert x.shape == (4, 2, 3)
    assert x.requires_grad
    torch.testing.assert_close(d.log_prob(x), flow.log_prob(x.reshape(-1, 3)).reshape(4, 2))
    assert d.sample().shape == (3,)
    flow = tabular(context=2)
    context = torch.randn(5, 2)
    d = flow.to_distribution(context)
    assert (d.batch_shape, d.event_shape) == ((5,), (3,))
    x = d.sample((4,))
    assert x.shape == (4, 5, 3)
    torch.testing.assert_close(d.log_prob(x)[2], flow.log_prob(x[2], context))
    torch.testing.assert_close(d.log_prob(x[0, 0])[3], flow.log_prob(x[0, :1], context[3:4])[0])


def test_initialize_sets_what_starts_from_data():
    flow = N.Flow(N.Chain(N.ActNorm(3), N.AffineCoupling(N.MLP(2, 4, 2), scale_map="exp")), N.StandardNormal(3))
    x = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    before = flow.eval().log_prob(x).mean()
    flow.initialize(x)
    assert flow.bijection[0].initialized
    after = flow.log_prob(x).mean()
    assert after > before
    # The entropy of the data, whose scales multiply to 1.
    assert abs(after + 1.5 * math.log(2 * math.pi * math.e)) < 0.1


def test_double_precision_through_everything():
    flow = tabular().double()
    assert flow.sample(2).dtype == torch.float64
    assert flow.log_prob(torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_no_float64_state():
    for module in (tabular(), N.GlowSteps(4, 2, 4, context_channels=2), N.Standardize(torch.zeros(2).double())):
        for name, value in module.state_dict().items():
            assert value.dtype != torch.float64, name


# --- sequences --------------------------------------------------------------------------------------------------------


def moved(flow):
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow.eval()


def sequences(base, squeeze=True, context=0):
    network = N.ConvConditioner(2, 6, 4, dims=1, context_channels=context)
    inner = [N.InvertibleConv1x1(4), N.AffineCoupling(network)]
    layers = [N.ActNorm(2), N.Squeeze(2), *inner, N.Squeeze(2).inv] if squeeze else [N.ActNorm(4), *inner]
    return moved(N.Flow(N.Chain(layers), base))


BASES = {
    "standard": (lambda: N.StandardNormal((2, 8)), True),
    "diagonal": (lambda: N.DiagonalNormal((2, 8)), True),
    "uniform": (lambda: N.Uniform((2, 8), -50.0, 50.0), True),
    "unsqueezed": (lambda: N.DiagonalNormal((4, 8)), False),
}


@pytest.mark.parametrize("name", BASES)
def test_a_padded_batch_is_its_sequences_alone(name):
    base, squeeze = BASES[name]
    flow = sequences(base(), squeeze, context=3)
    channels = 2 if squeeze else 4
    lengths = torch.tensor([8, 2, 6, 0])
    x, context = torch.randn(4, channels, 8), torch.randn(4, 3)
    valid = torch.arange(8) < lengths[:, None]
    alone = []
    for i in range(3):
        one, n = x[i : i + 1, :, : lengths[i]], lengths[i : i + 1]
        alone.append(flow.log_prob(one, context[i : i + 1], lengths=n)[0])
        z, logdet = flow.bijection(one, context[i : i + 1])
        if name in ("standard", "uniform"):  # and by hand, without any lengths
            density = type(flow.base)(z.shape[1:], *([-50.0, 50.0] if name == "uniform" else [])).log_prob(z)
            torch.testing.assert_close(alone[-1], (density + logdet)[0], atol=1e-4, rtol=1e-4)
    found = flow.log_prob(x, context, lengths=lengths)
    torch.testing.assert_close(found[:3], torch.stack(alone), atol=1e-4, rtol=1e-4)
    assert found[3] == 0, "no position, no density"
    other = torch.where(valid[:, None], x, float("nan"))
    assert torch.equal(flow.log_prob(other, context, lengths=lengths), found), "padding changes nothing"
    torch.testing.assert_close(flow.nll(other, context, lengths=lengths), -found.mean())
    for size in (1, 3):
        chunks = flow.log_prob(x, context, lengths=lengths, batch_size=size)
        torch.testing.assert_close(chunks, found, atol=1e-5, rtol=1e-5)
    z = flow.encode(x, context, lengths=lengths, batch_size=3)
    torch.testing.assert_close(z, flow(other, context, lengths=lengths)[0])
    back = flow.decode(z, context, lengths=lengths, batch_size=3)
    torch.testing.assert_close(back, torch.where(valid[:, None], x, 0.0), atol=1e-4, rtol=1e-4)


def test_lengths_of_the_latent_follow_the_flow():
    flow = moved(N.Flow(N.Chain(N.Squeeze(2), N.ActNorm(4)), N.StandardNormal((4, 4))))
    x, lengths = torch.randn(3, 2, 8), torch.tensor([8, 4, 2])
    alone = []
    for one, n in zip(x, lengths.tolist()):
        z, logdet = flow.bijection(one[None, :, :n])
        alone.append((N.StandardNormal(z.shape[1:]).log_prob(z) + logdet)[0])
    torch.testing.assert_close(flow.log_prob(x, lengths=lengths), torch.stack(alone))
    z = flow.encode(x, lengths=lengths)
    expected = torch.where((torch.arange(8) < lengths[:, None])[:, None], x, 0.0)
    torch.testing.assert_close(flow.decode(z, lengths=lengths), expected, atol=1e-5, rtol=1e-5)


def test_masked_sequences_start_and_train():
    flow = N.Flow(N.Chain(N.ActNorm(2), N.AffineCoupling(N.ConvConditioner(1, 4, 2, dims=1))), N.StandardNormal((2, 6)))
    lengths = torch.tensor([6, 3, 1])
    x = 3 * torch.randn(3, 2, 6) + 5
    x[1, :, 3:] = 1e4
    flow.nll(x, lengths=lengths).backward()
    assert flow.bijection[0].initialized
    assert flow.bijection[0].log_scale.abs().max() < 3, "padding is no data to start from"
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())
    twin = N.Flow(N.Chain(N.ActNorm(2)), N.StandardNormal((2, 6)))
    twin.initialize(x, lengths=lengths)
    torch.testing.assert_close(twin.bijection[0].log_scale, flow.bijection[0].log_scale)


# --- contexts that do not fit -----------------------------------------------------------------------------------------


def test_a_context_that_no_layer_uses_is_refused():
    flow, context = tabular(), torch.randn(4, 2)
    x = torch.randn(4, 3)
    for act in (
        lambda: flow(x, context),
        lambda: flow.log_prob(x, context),
        lambda: flow.nll(x, context),
        lambda: flow.encode(x, context),
        lambda: flow.decode(x, context),
        lambda: flow.sample(2, context),
        lambda: flow.initialize(x, context),
        lambda: N.Flow(flow.bijection, flow.base, embed=torch.nn.Embedding(3, 2)).log_prob(x, torch.tensor([0] * 4)),
    ):
        with pytest.raises(ValueError, match=r"^no layer of this flow uses a context"):
            act()
    for network in (N.MLP(3, 4, 2), N.ConvConditioner(3, 4, 2, dims=1)):
        with pytest.raises(ValueError, match="was built with context_channels=0: it takes no context"):
            network(x, context)


def test_one_layer_that_uses_the_context_is_enough():
    torch.manual_seed(0)
    layers = [N.AffineCoupling(N.MLP(2, 4, 2)), N.AffineCoupling(N.MLP(1, 4, 4, context_channels=2), identity="second")]
    flow = moved(N.Flow(N.Chain(N.Inverse(N.Chain(layers)), N.ActNorm(3)), N.StandardNormal(3)))
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, -context))

    class Own(N.Bijection):
        def forward(self, x, context=None, *, lengths=None):
            return x + context, x.new_zeros(x.shape[0])

    own = N.Flow(N.Chain(Own()), N.StandardNormal(3))
    torch.testing.assert_close(own.encode(x, torch.ones(4, 3)), x + 1)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_context_of_another_length_is_refused(batch_size):
    flow, x = tabular(context=2), torch.randn(4, 3)
    for act in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(ValueError, match=r"^a context has one entry per sample, got 3 for 4 samples$"):
            act(x, torch.randn(3, 2), batch_size=batch_size)
    with pytest.raises(ValueError, match=r"got 3 for 4 samples$"):
        flow.nll(x, torch.randn(3, 2))
    listed = torch.randn(4, 2)
    expected = flow.log_prob(x, listed)
    torch.testing.assert_close(flow.log_prob(x, listed.tolist(), batch_size=batch_size), expected)


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_one_context_for_all_samples_is_embedded_once(batch_size):
    seen = []
    embed = torch.nn.Linear(4, 2)
    embed.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    flow, x, context = tabular(context=2, embed=embed), torch.randn(5, 3), torch.randn(1, 4)
    expected = flow.log_prob(x, context.repeat(5, 1))
    seen.clear()
    torch.testing.assert_close(flow.log_prob(x, context, batch_size=batch_size), expected)
    torch.testing.assert_close(
        flow.decode(flow.encode(x, context), context, batch_size=batch_size), x, atol=1e-4, rtol=0
    )
    assert set(seen) == {1}


def test_samples_embed_a_context_once():
    seen = []
    embed = torch.nn.Linear(4, 2)
    embed.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    flow, context = tabular(context=2, embed=embed), torch.randn(3, 4)
    x, log_prob = flow.sample_and_log_prob(6, context, batch_size=4)
    assert seen == [3]
    for i in range(6):
        torch.testing.assert_close(log_prob[i], flow.log_prob(x[i], context), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"draws": 2}, {"importance_samples": 5}, {"importance_samples": 5, "batch_size": 2}]
)
def test_one_label_for_all_images(options):
    torch.manual_seed(0)
    flow = Glow((1, 4, 4), levels=1, steps=1, hidden=4, classes=3).eval()
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    found = [
        flow.bits_per_dim(images, torch.tensor(labels), generator=torch.Generator().manual_seed(0), **options)
        for labels in ([1], [1] * 5)
    ]
    torch.testing.assert_close(*found)
