"""Couplings by any mask, their masks and networks: what they compute, by hand, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nfkernels import Spline, rational_quadratic_spline
from nfkernels import nn as N
from nfkernels.nn import masks

SPLINE = Spline(4, low=-2.0, high=2.0)
P = SPLINE.params_per_element


def moved(module, by=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))
    return module.eval()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks():
    t, f = True, False
    assert masks.alternating(5).tolist() == [t, f, t, f, t]
    assert masks.alternating(4, even=False).tolist() == [f, t, f, t]
    assert masks.halves(5).tolist() == [f, f, f, t, t]
    assert masks.halves(5, "second").tolist() == [t, t, t, f, f]
    assert masks.channels(4, (3, 0)).tolist() == [t, f, f, t]
    assert masks.checkerboard(2, 3).tolist() == [[[t, f, t], [f, t, f]]]
    assert masks.checkerboard(3, even=False).tolist() == [[f, t, f]]
    drawn = masks.random(9, generator=torch.Generator().manual_seed(3))
    assert drawn.sum() == 5
    assert torch.equal(drawn, masks.random(9, generator=torch.Generator().manual_seed(3)))
    assert masks.random(9, 2).sum() == 2


def test_halves_are_the_halves_of_identity():
    for side in ("first", "second"):
        net = moved(N.MLP(*((3, 6, 4) if side == "first" else (2, 6, 6))))
        x = torch.randn(4, 5)
        expected = N.AffineCoupling(net, identity=side)(x)
        for a, b in zip(N.AffineCoupling(net, mask=masks.halves(5, side))(x), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: masks.alternating(1), "a coupling needs at least 2 features, one of which passes through, got 1"),
        (lambda: masks.halves(3, "last"), "the half that passes through is 'first' or 'second', got 'last'"),
        (lambda: masks.channels(3, [1, 3]), "there are channels 0 to 2, got 3"),
        (lambda: masks.checkerboard(1, 1), r"a checkerboard needs at least 2 positions, got sizes \(1, 1\)"),
        (lambda: masks.random(4, 4), "from 1 to 3 of 4 features can be transformed, got 4"),
        (
            lambda: N.AffineCoupling(N.MLP(1, 2, 2), mask=masks.halves(2), identity="first"),
            "AffineCoupling splits by a mask or by identity: give one of them",
        ),
        (lambda: N.AdditiveCoupling(N.MLP(1, 2, 2), identity="left"), "AdditiveCoupling needs a half .* got 'left'"),
        (
            lambda: N.Coupling(N.SplineTransform(SPLINE), N.MLP(1, 2, P), identity="first"),
            "identity goes with an affine transform: give this SplineTransform a mask",
        ),
        (lambda: N.SplineCoupling(N.MLP(1, 2, P), masks.halves(2), spline="cubic"), "unknown spline 'cubic'"),
        (
            lambda: N.SplineCoupling(N.MLP(1, 2, P + 1), masks.halves(2), spline=SPLINE)(torch.zeros(3, 2)),
            f"params have {P + 1} channels, expected a multiple of {P}: 4 widths, 4 heights and 3 slopes",
        ),
        (
            lambda: N.SplineCoupling(N.MLP(1, 2, P), masks.halves(2), spline=SPLINE)(torch.zeros(3, 3)),
            r"mask chooses among 2 channels, got data \(3, 3\)",
        ),
        (
            lambda: N.SplineCoupling(N.MLP(1, 2, P), masks.halves(2), spline=SPLINE)(
                torch.zeros(3, 2), lengths=torch.tensor([1, 1, 1])
            ),
            r"lengths \[B\] go with data \[B, C, T\]",
        ),
        (lambda: N.MixedSplineTransform(SPLINE, torch.tensor([True])), "angles need a spline with circular tails"),
        (
            lambda: N.MixedSplineTransform("circular", torch.zeros(2)),
            r"circular must be bool \[Ct\], got torch.float32",
        ),
        (lambda: N.ElementwiseSpline(0), "ElementwiseSpline needs at least 1 feature, got 0"),
        (
            lambda: N.ElementwiseSpline(2, spline=SPLINE, conditioner=N.MLP(1, 2, 3)),
            f"a conditioner of this ElementwiseSpline returns {2 * P} parameters, got one that returns 3",
        ),
        (lambda: N.ElementwiseSpline(2)(torch.zeros(3, 4)), "ElementwiseSpline was built for 2 channels on axis 1"),
        (lambda: N.ResidualNet(2, 3, 4, blocks=0), "a ResidualNet needs at least 1 block, got 0"),
        (lambda: N.ConvResidualNet(2, 3, 4, blocks=0), "a ConvResidualNet needs at least 1 block, got 0"),
        (lambda: N.ConvResidualNet(2, 3, 4, kernel=2), "a conditioner's kernel must be odd, got 2"),
        (lambda: N.ResidualNet(2, 3, 4, context_by="film"), "unknown context_by 'film': expected 'glu' or 'add'"),
        (lambda: N.ResidualNet(2, 3, 4, dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (
            lambda: N.ResidualNet(2, 3, 4)(torch.zeros(1, 2), torch.zeros(1, 2)),
            "this ResidualNet was built with context",
        ),
        (lambda: N.MLP(2, 3, 4, activation="relu6"), "unknown activation 'relu6': expected one of 'relu', 'silu'"),
        (lambda: N.Columns(N.LULinear(2), [1, 1]), r"columns are different numbers from 0 on, .*got \[1, 1\]"),
        (lambda: N.Columns(N.LULinear(2), [1, 3])(torch.zeros(2, 3)), r"acts on columns \[1, 3\], got data \(2, 3\)"),
    ],
)
def test_mistakes_get_one_sentence(act, message):
    with pytest.raises(ValueError, match=message) as found:
        act()
    assert "\n" not in str(found.value)


# --- couplings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[1, 0, 1, 0, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], ids=["strided", "half", "any"])
def test_spline_coupling_by_hand(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    net = moved(N.ResidualNet(2, 8, 3 * P, context_channels=1))
    layer = N.SplineCoupling(net, mask, spline=SPLINE)
    x, context = torch.randn(7, 5), torch.randn(7, 1)
    z, logdet = layer(x, context)
    assert torch.equal(z[:, ~mask], x[:, ~mask])
    y, total = rational_quadratic_spline(x[:, mask], net(x[:, ~mask], context), spline=SPLINE)
    torch.testing.assert_close(z[:, mask], y)
    torch.testing.assert_close(logdet, total)
    assert (z[:, mask] != x[:, mask]).any()


def test_what_passes_through_is_a_view_where_it_can_be():
    net = N.MLP(2, 4, 6)
    assert N.AffineCoupling(net, mask=masks.alternating(5))._kept_slice == slice(1, 4, 2)
    assert N.AffineCoupling(net, mask=masks.channels(5, [0, 3, 4]))._kept_slice == slice(1, 3, 1)
    assert N.AffineCoupling(N.MLP(3, 4, 4), mask=masks.channels(5, [0, 3]))._kept_slice is None


def test_a_state_brings_its_own_mask():
    one, other = (N.AffineCoupling(N.MLP(2, 4, 6), mask=masks.channels(5, c)) for c in ([0, 2, 4], [0, 1, 3]))
    moved(one), moved(other)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(other(x)[0], one(x)[0])


def test_the_network_runs_in_the_autocast_type_and_the_data_does_not():
    seen = []
    layer = moved(N.SplineCoupling(N.MLP(2, 8, 2 * P), masks.alternating(4), spline=SPLINE))
    layer.conditioner.last.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = layer(x)
        params = layer.conditioner(x[:, 1::2])
    assert seen == [torch.bfloat16] * 2
    assert z.dtype == logdet.dtype == torch.float32
    exact, _ = rational_quadratic_spline(x[:, ::2].contiguous(), params.float(), spline=SPLINE)
    torch.testing.assert_close(z[:, ::2], exact)


def test_a_new_coupling_by_mixed_spline_is_two_couplings():
    """Angles with periodic slopes and others with slope 1 at the ends, in one op."""
    circle, line = Spline.circular(4, -2.0, 2.0), Spline(4, low=-2.0, high=2.0)
    angles = torch.tensor([True, False, True])
    x, params = torch.rand(9, 3) * 5 - 2.5, torch.randn(9, 3, circle.params_per_element)
    transform = N.MixedSplineTransform(circle, angles)
    y, logdet = transform(x, params.flatten(1))
    first, a = rational_quadratic_spline(x[:, [0, 2]], params[:, [0, 2]].flatten(1), spline=circle)
    kept = torch.cat([params[:, 1, :8], params[:, 1, 9:]], 1)
    second, b = rational_quadratic_spline(x[:, 1:2], kept, spline=line)
    torch.testing.assert_close(y, torch.stack([first[:, 0], second[:, 0], first[:, 1]], 1))
    torch.testing.assert_close(logdet, a + b)
    back, _ = transform.inverse(y, params.flatten(1))
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_a_new_elementwise_spline_is_the_identity():
    for spline in (SPLINE, Spline.unit(), Spline.zuko(), Spline.circular()):
        x = torch.rand(50, 2)
        y, logdet = N.ElementwiseSpline(2, spline=spline)(x)
        torch.testing.assert_close(y, x, atol=1e-5, rtol=0)
        torch.testing.assert_close(logdet, torch.zeros(50), atol=1e-5, rtol=0)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "tanh", "elu", "leaky_relu", "softplus"])
def test_activations(name):
    act = torch.tanh if name == "tanh" else getattr(F, name)
    net, x = moved(N.MLP(3, 5, 2, activation=name)), torch.randn(4, 3)
    torch.testing.assert_close(net(x), net.last(act(net.hidden[0](act(net.first(x))))))


def test_networks_start_at_zero():
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    nets = [N.MLP(3, 8, 5, context_channels=2)]
    nets += [N.ResidualNet(3, 8, 5, context_channels=2, context_by=by) for by in ("glu", "add")]
    for net in nets:
        assert net.out_channels == 5
        assert net.context_channels == 2
        assert not net(x, context).any()
        assert net.first(torch.zeros(1, net.first.in_features)).any()


def test_residual_net_by_hand():
    """As nflows' ResidualNet has it: the context beside the input, and a gate on every block."""
    net = moved(N.ResidualNet(3, 8, 5, context_channels=2))
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    h = net.first(torch.cat([x, context], 1))
    gates = net.context(context).chunk(2, 1)
    for inner, outer, gate in zip(net.inner, net.outer, gates):
        h = h + F.glu(torch.cat([outer(F.relu(inner(F.relu(h)))), gate], 1), 1)
    torch.testing.assert_close(net(x, context), net.last(h))
    net = moved(N.ResidualNet(3, 8, 5, context_channels=2, context_by="add", blocks=1))
    first, share = net.context(context).chunk(2, 1)
    h = net.first(x) + first
    h = h + net.outer[0](F.relu(net.inner[0](F.relu(h)))) + share
    torch.testing.assert_close(net(x, context), net.last(h))


def test_conv_residual_net_by_hand():
    net = moved(N.ConvResidualNet(2, 4, 3, context_channels=2))
    x, context = torch.randn(3, 2, 4, 5), torch.randn(3, 2)
    first, *shares = net.context(context)[:, :, None, None].chunk(3, 1)
    h = net.first(x) + first
    for inner, outer, share in zip(net.inner, net.outer, shares):
        h = h + outer(F.relu(inner(F.relu(h)))) + share
    torch.testing.assert_close(net(x, context), net.last(F.relu(h)), atol=1e-5, rtol=1e-5)
    spread = context[:, :, None, None].expand(-1, -1, 4, 5)
    torch.testing.assert_close(net(x, spread), net(x, context), atol=1e-5, rtol=1e-5)
    net = N.ConvResidualNet(2, 50, 3, dropout=0.5)
    moved(net).train()
    assert not torch.equal(net(x), net(x))


def test_dropout_is_for_training():
    for net in (N.MLP(3, 50, 5, dropout=0.5), N.ResidualNet(3, 50, 5, dropout=0.5)):
        moved(net)
        x = torch.randn(4, 3)
        assert torch.equal(net(x), net(x))
        net.train()
        assert not torch.equal(net(x), net(x))


def test_columns_leave_the_others_alone():
    inner = moved(N.LULinear(2))
    layer = N.Columns(inner, [3, 0])
    x = torch.randn(5, 4)
    y, logdet = layer(x)
    expected, total = inner(x[:, [3, 0]])
    torch.testing.assert_close(y, torch.stack([expected[:, 1], x[:, 1], x[:, 2], expected[:, 0]], 1))
    torch.testing.assert_close(logdet, total)
    norm = N.Columns(N.ActNorm(2), [1, 2])
    norm.initialize(3 + 2 * x)
    torch.testing.assert_close(norm(3 + 2 * x)[0][:, 1:3].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
