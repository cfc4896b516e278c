"""What single layers promise beyond the invariants: forms, orders, masks, conditioners of one's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import nn as N


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


# --- squeeze ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(b=st.integers(1, 3), c=st.integers(1, 3), h=st.integers(1, 3), w=st.integers(1, 3), f=st.integers(1, 3))
def test_squeeze_order(b, c, h, w, f):
    x = torch.randn(b, c, h * f, w * f)
    z, logdet = N.Squeeze(f)(x)
    assert torch.equal(z, F.pixel_unshuffle(x, f))
    assert not logdet.any()


def test_squeeze_names_channels_row_first():
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert N.Squeeze()(x)[0].flatten().tolist() == list(range(8))
    assert N.Squeeze()(torch.arange(4.0).reshape(1, 1, 4))[0][0].tolist() == [[0.0, 2.0], [1.0, 3.0]]


# --- couplings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
@pytest.mark.parametrize("identity", ["first", "second"])
def test_affine_coupling_formula(order, identity):
    network = moved(N.MLP(3 if identity == "first" else 2, 8, 4 if identity == "first" else 6))
    layer = N.AffineCoupling(network, scale_map="glow", order=order, identity=identity)
    x = torch.randn(4, 5)
    first, second = x[:, :3], x[:, 3:]
    kept, moving = (first, second) if identity == "first" else (second, first)
    t, r = network(kept).chunk(2, 1)
    s = torch.sigmoid(r + 2)
    y = moving * s + t if order == "scale_first" else (moving + t) * s
    z, logdet = layer(x)
    torch.testing.assert_close(z, torch.cat([kept, y] if identity == "first" else [y, kept], 1))
    torch.testing.assert_close(logdet, s.log().sum(1))


def test_learned_gain_scales_the_log_scale_and_learns():
    network = moved(N.MLP(1, 4, 2))
    layer = N.AffineCoupling(network, scale_map="exp", learned_gain=True)
    x = torch.randn(3, 2)
    _, before = layer(x)
    with torch.no_grad():
        layer.gain.fill_(2.0)
    _, after = layer(x)
    torch.testing.assert_close(after, 2 * before)
    after.sum().backward()
    assert layer.gain.grad.abs().sum() > 0
    assert N.AffineCoupling(torch.nn.Linear(1, 2), learned_gain=1).gain.shape == (1,)


def test_learned_gain_needs_a_scale():
    with pytest.raises(ValueError, match="learned_gain scales the scale map's gain, and the additive map has no scale"):
        N.AffineCoupling(N.MLP(1, 4, 1), scale_map="additive", learned_gain=True)


class Scaled(torch.nn.Module):
    """Its second argument is its own affair."""

    def forward(self, x, scale=2.0):
        assert scale == 2.0
        return torch.cat([x, x], 1)


class Named(torch.nn.Module):
    def forward(self, x, scale=2.0, *, context=None):
        assert scale == 2.0
        return torch.cat([x + context, x], 1)


class Second(torch.nn.Module):
    def forward(self, x, labels):
        return torch.cat([x + labels, x], 1)


@pytest.mark.parametrize(("network", "uses"), [(Scaled, False), (Named, True), (Second, True)])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_the_context_goes_where_it_is_asked_for(network, uses, compiled):
    torch._dynamo.reset()
    network = torch.compile(network(), backend="eager") if compiled else network()
    x, context = torch.randn(3, 2), torch.randn(3, 1)
    mask = torch.tensor([False, True])
    for layer in (N.AffineCoupling(network), N.Coupling(N.AffineTransform(), network, mask)):
        assert layer.uses_context == uses
        z, _ = layer(x, context)
        kept, moving = x.chunk(2, 1)
        torch.testing.assert_close(z[:, 1:], moving * torch.sigmoid(kept + 2) + kept + (context if uses else 0))


def test_a_compiled_network_is_looked_through():
    torch._dynamo.reset()
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(3, 2)
    compiled = torch.compile(network, backend="eager")
    for a, b in zip(N.AffineCoupling(compiled)(x), N.AffineCoupling(network)(x)):
        torch.testing.assert_close(a, b)
    sequence, mask = torch.randn(2, 4, 5), torch.tensor([3, 5])
    network = moved(N.ConvConditioner(2, 4, 4, dims=1))
    plain, wrapped = N.AffineCoupling(network), N.AffineCoupling(torch.compile(network, backend="eager"))
    for a, b in zip(wrapped(sequence, lengths=mask), plain(sequence, lengths=mask)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: N.AffineCoupling(N.MLP(2, 4, 4)), (2, 4)),
        (lambda: N.Coupling(N.AffineTransform(), N.MLP(2, 4, 4), torch.tensor([True, False, True, False])), (2, 4)),
        (lambda: N.GlowSteps(4, 1, 4), (2, 4, 2, 2)),
        (lambda: N.SplitPrior(4), (2, 4, 2, 2)),
    ],
    ids=["AffineCoupling", "Coupling", "GlowSteps", "SplitPrior"],
)
def test_a_double_flow_on_single_data_says_so(layer, shape):
    layer = layer().double().eval()
    name = type(layer).__name__
    with pytest.raises(ValueError, match=f"^the network of this {name} gives float64 but the data is float32: give"):
        layer(torch.randn(shape))


CONVOLVED = ((4, 4, 2, 2), (5, 4, 3, 2), (3, 4, 6, 5))


@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [
        ([0], [(batch, 4, 3, 2) for batch in (4, 5, 3)]),
        pytest.param([0, 2, 3], CONVOLVED, marks=pytest.mark.exhaustive),  # slow to trace
    ],
    ids=["batch", "size"],
)
def test_one_graph_of_a_convolutional_coupling_serves_every_size(dynamic, shapes):
    torch._dynamo.reset()
    layer = N.AffineCoupling(moved(N.ConvConditioner(2, 4, 4, last_kernel=1)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in shapes:
        x = torch.randn(shape)
        torch._dynamo.mark_dynamic(x, dynamic)
        for a, b in zip(compiled(x), layer(x)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_channel_mask_gives_the_network_only_what_passes():
    mask = torch.tensor([True, False, True, False])
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, context):
            seen.append((x, context))
            return torch.cat([torch.full_like(x, 2.0), torch.zeros_like(x)], 1)

    x, context = torch.randn(3, 4), torch.randn(3, 1)
    z, logdet = N.Coupling(N.AffineTransform("exp"), Network(), mask)(x, context)
    assert torch.equal(seen[0][0], x[:, [1, 3]])
    assert seen[0][1] is context
    torch.testing.assert_close(z, x + torch.tensor([2.0, 0, 2, 0]))
    assert not logdet.any()


def test_checkerboard_hides_what_it_transforms():
    mask = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    network = moved(N.ConvConditioner(2, 4, 4))
    layer = N.Coupling(N.AffineTransform(), network, mask[None])
    x = torch.randn(2, 2, 4, 4)
    z, _ = layer(x)
    assert torch.equal(z[..., ~mask], x[..., ~mask])
    assert (z[..., mask] != x[..., mask]).all()
    changed = torch.where(mask, x + 1, x)
    params = network(torch.where(mask, 0.0, x))
    torch.testing.assert_close(layer(changed)[0] - z, torch.where(mask, torch.sigmoid(params[:, 2:] + 2), 0.0))


def test_padding_changes_nothing():
    """A sample gives the same result in a longer batch: convolutions, too, must not see the padding's activations."""
    layer = N.Chain(
        moved(N.ActNorm(4)), N.InvertibleConv1x1(4), N.AffineCoupling(moved(N.ConvConditioner(2, 6, 4, dims=1)))
    ).eval()
    short = torch.randn(1, 4, 3)
    padded = F.pad(short, (0, 4))
    z, logdet = layer(short, lengths=torch.tensor([3]))
    longer, total = layer(padded, lengths=torch.tensor([3]))
    torch.testing.assert_close(longer[..., :3], z)
    assert not longer[..., 3:].any()
    torch.testing.assert_close(total, logdet)
    torch.testing.assert_close(layer(short)[0], z)


def test_conv_conditioner_context_vector_is_a_constant_map():
    network = moved(N.ConvConditioner(2, 5, 3, context_channels=4))
    x, context = torch.randn(2, 2, 6, 6), torch.randn(2, 4)
    expected = network(x, context[..., None, None].expand(-1, -1, 6, 6))
    torch.testing.assert_close(network(x, context), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(network(x, context), network(x, -context))


def test_networks_start_at_zero():
    x = torch.randn(2, 3, 4, 4)
    assert not N.ConvConditioner(3, 4, 2)(x).any()
    assert not N.MLP(3, 4, 2)(x[..., 0, 0]).any()
    z, logdet = N.SplitPrior(3)(x)
    assert torch.equal(z, x)
    assert not logdet.any()


# --- priors, 1x1, standardize, chain ----------------------------------------------------------------------------------


def test_split_prior_standardises_by_the_learned_prior():
    layer = moved(N.SplitPrior(4))
    x = torch.randn(2, 4, 6, 6)
    mu, log_sigma = layer.conditioner(x[:, :2]).chunk(2, 1)
    z, logdet = layer(x)
    torch.testing.assert_close(z[:, :2], x[:, :2])
    torch.testing.assert_close(z[:, 2:], (x[:, 2:] - mu) / log_sigma.exp())
    torch.testing.assert_close(logdet, -log_sigma.sum((1, 2, 3)))


@pytest.mark.parametrize("parametrization", ["plu", "full"])
def test_conv1x1_starts_as_a_rotation_and_mixes_every_position_alike(parametrization):
    layer = N.InvertibleConv1x1(6, parametrization)
    x = torch.randn(2, 6, 3, 2)
    z, logdet = layer(x)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.square().sum(1), x.square().sum(1), atol=1e-4, rtol=1e-4)
    alone, _ = layer(x[:, :, 1, 1])
    torch.testing.assert_close(z[:, :, 1, 1], alone)


def test_standardize_undoes_a_known_distribution():
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.1])
    x = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1).sample((5,))
    flow = N.Flow(N.Standardize(loc, scale), N.StandardNormal(2))
    expected = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)
    assert all(b.dtype == torch.float32 for b in N.Standardize(torch.zeros(2, dtype=torch.float64)).buffers())


def test_chain_is_a_sequence():
    a, b, c = N.ActNorm(2), N.InvertibleConv1x1(2), N.ActNorm(2)
    chain = N.Chain([a, b, c])
    assert len(chain) == 3
    assert list(chain) == [a, b, c]
    assert chain[1] is b
    assert list(chain[1:]) == [b, c]


def test_multi_scale_keeps_half_and_lets_half_leave():
    levels = [N.Squeeze(), N.Squeeze()]
    layer = N.MultiScale(levels, [(4, 4, 4), (8, 2, 2)])
    x = torch.randn(2, 1, 8, 8)
    z, _ = layer(x)
    first, last = layer.split(z)
    squeezed = F.pixel_unshuffle(x, 2)
    assert torch.equal(first, squeezed[:, 2:])
    assert torch.equal(last, F.pixel_unshuffle(squeezed[:, :2], 2))


# --- bases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_bases_against_torch_distributions(shape):
    z = torch.randn(4, *shape)
    normal = torch.distributions.Normal(torch.zeros(shape), torch.ones(shape))
    torch.testing.assert_close(N.StandardNormal(shape).log_prob(z), normal.log_prob(z).flatten(1).sum(1))
    base = moved(N.DiagonalNormal(shape))
    diagonal = torch.distributions.Normal(base.loc, base.log_scale.exp())
    torch.testing.assert_close(base.log_prob(z), diagonal.log_prob(z).flatten(1).sum(1))
    uniform = N.Uniform(shape, -1.0, 3.0)
    inside = ((z >= -1) & (z < 3)).flatten(1).all(1)
    expected = torch.where(inside, -math.log(4) * z[0].numel(), -math.inf)
    torch.testing.assert_close(uniform.log_prob(z), expected)
    assert torch.isfinite(uniform.log_prob(uniform.sample(8))).all()


@pytest.mark.parametrize("base", [N.StandardNormal(4), moved(N.DiagonalNormal(4))], ids=["standard", "diagonal"])
def test_temperature_scales_the_standard_deviation(base):
    def draw(temperature):
        return base.sample(2000, torch.Generator().manual_seed(0), temperature).detach()

    centre = draw(0.0)
    assert torch.equal(centre, centre[:1].expand_as(centre))
    torch.testing.assert_close(draw(0.5) - centre, 0.5 * (draw(1.0) - centre))
    expected = getattr(base, "log_scale", torch.zeros(4)).exp().detach()
    torch.testing.assert_close(draw(1.0).std(0), expected, rtol=0.1, atol=0)


def test_samples_follow_the_dtype_the_flow_was_moved_to():
    assert N.StandardNormal(2).double().sample(3).dtype == torch.float64
    assert N.Uniform(2).double().sample(3).dtype == torch.float64
    assert N.StandardNormal(2).to("meta").sample(3).is_meta
