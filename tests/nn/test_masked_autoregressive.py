"""Autoregressive layers: against formulas, passes counted, gradients of the inverse, conditioners of one's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nfkernels import ScaleMap, Spline
from nfkernels import nn as N


def layer(features=5, transform="affine", params=2, *, dtype=torch.float64, **options) -> N.MaskedAutoregressive:
    torch.manual_seed(0)
    network = N.MaskedMLP(features, 16, params, activation=options.pop("activation", "tanh"), **options)
    made = N.MaskedAutoregressive(features, transform=transform, conditioner=network).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


class Counted(torch.nn.Module):
    """A conditioner nobody knows anything about, which counts its calls."""

    def __init__(self, network: N.MaskedMLP, passes: int | None = None) -> None:
        super().__init__()
        self.network, self.calls = network, 0
        if passes is not None:
            self.passes = passes

    def forward(self, x, context=None):
        self.calls += 1
        return self.network(x, context)


def test_the_forward_is_nflows_formula():
    maf = layer(4, ScaleMap.nflows_softplus())
    x = torch.randn(3, 4).double()
    shift, raw = maf.conditioner(x).unflatten(1, (4, 2)).unbind(2)
    scale = (F.softplus(raw) + 1e-3).clamp(max=3)
    z, logdet = maf(x)
    torch.testing.assert_close(z, x * scale + shift)
    torch.testing.assert_close(logdet, scale.log().sum(1))


def test_the_inverse_one_feature_at_a_time():
    """By hand: the loop that every textbook prints."""
    maf = layer(4, N.AffineTransform("exp", layout="scale_shift_interleaved"), order="reversed")
    z = torch.randn(3, 4).double()
    x = torch.zeros_like(z)
    for i in (3, 2, 1, 0):
        raw, shift = maf.conditioner(x).unflatten(1, (4, 2))[:, i].unbind(1)
        x[:, i] = (z[:, i] - shift) * torch.exp(-raw)
    torch.testing.assert_close(maf.inverse(z)[0], x.detach())


@pytest.mark.parametrize(("options", "expected"), [({}, 6), ({"passes": 2}, 2), ({"passes": 3}, 3), ({"passes": 1}, 1)])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_passes_end_as_soon_as_all_is_known(options, expected, grad):
    known = layer(6, **options)
    assert known.passes == expected
    network = Counted(known.conditioner, expected)
    maf = N.MaskedAutoregressive(6, conditioner=network)
    z = torch.randn(3, 6).double()
    with torch.set_grad_enabled(grad):
        x, logdet = maf.inverse(z)
    assert network.calls == expected
    torch.testing.assert_close(x, known.inverse(z)[0])
    torch.testing.assert_close(maf(x)[0], z)
    if grad:
        (x.sum() + logdet.sum()).backward()
        assert network.calls == expected + 2  # the forward's, and one for all gradients


def test_a_network_of_ones_own_takes_one_pass_per_feature():
    known = layer(5, order="random")
    network = Counted(known.conditioner)
    maf = N.MaskedAutoregressive(5, conditioner=network)
    z = torch.randn(3, 5).double()
    x, _ = maf.inverse(z)
    assert network.calls == maf.passes == 5
    torch.testing.assert_close(x, known.inverse(z)[0])
    given = N.MaskedAutoregressive(5, conditioner=Counted(layer(5, passes=2).conditioner), passes=2)
    torch.testing.assert_close(given(given.inverse(z)[0])[0], z)


@pytest.mark.parametrize(
    "transform", ["affine", "exp", "glow", "nflows", "nflows_softplus", "freia", "realnvp", "zuko"]
)
@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
def test_every_scale_map_in_both_orders(transform, order):
    scale_map = ScaleMap.zuko() if transform == "affine" else ScaleMap.parse(transform)
    for layout in ("shift_scale_interleaved", "scale_shift_interleaved"):
        maf = layer(4, N.AffineTransform(scale_map, order=order, layout=layout))
        x = torch.randn(6, 4).double()
        z, logdet = maf(x)
        for _ in range(2):
            back, inverse = maf.inverse(z)
            torch.testing.assert_close(back, x)
            torch.testing.assert_close(inverse, -logdet)
            maf.conditioner.register_forward_hook(lambda *_: None)  # the second time by passes


def test_op_and_passes_agree_with_their_gradients():
    for options in ({}, {"order": "random", "context_channels": 2}, {"residual": True, "context_channels": 2}):
        fused = layer(5, **options)
        context = torch.randn(3, 2).double().requires_grad_() if "context_channels" in options else None
        z = torch.randn(3, 5).double().requires_grad_()
        results = []
        for _ in range(2):
            x, logdet = fused.inverse(z, context)
            inputs = [z, *fused.parameters(), *([] if context is None else [context])]
            results.append((x, logdet, *torch.autograd.grad(x.square().sum() + logdet.exp().sum(), inputs)))
            fused.conditioner.register_forward_hook(lambda *_: None)
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("options", "quick"), [({"activation": "gelu"}, True), ({"layers": 9}, False)])
def test_networks_that_no_kernel_knows(options, quick):
    maf, calls = layer(4, **options), []
    z = torch.randn(3, 4).double()
    with torch.no_grad():
        x, logdet = maf.inverse(z)
        assert (maf.conditioner.network(z, None) is not None) == quick
        maf.conditioner.register_forward_hook(lambda *_: calls.append(1))
        for a, b in zip(maf.inverse(z), (x, logdet)):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(maf(x)[0], z)
    assert len(calls) == 5
    maf.inverse(z)[0].sum().backward()


SPLINES = {
    "natural": {},
    "random": {"order": "random"},
    "groups": {"passes": 3, "layers": 3},
    "ties": {"order": torch.tensor([2, 0, 2, 1, 5])},
    "one pass": {"passes": 1},
    "one layer": {"layers": 1, "activation": "relu"},
    "residual": {"residual": True, "layers": 2},
    "context": {"context_channels": 2, "order": "reversed"},
    "residual with context": {"residual": True, "context_channels": 2, "activation": "elu"},
}


@pytest.mark.parametrize("form", SPLINES)
def test_splines_are_inverted_feature_by_feature_without_the_whole_network(form):
    maf = layer(5, Spline(4), 11, **SPLINES[form])
    given = (torch.randn(3, 2).double(),) if maf.uses_context else ()
    calls = []
    z = torch.randn(3, 5).double()
    with torch.no_grad():
        quick = maf.inverse(z, *given)
        maf.conditioner.register_forward_hook(lambda *_: calls.append(1))
        slow = maf.inverse(z, *given)
    assert len(calls) == maf.passes
    for a, b in zip(quick, slow):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(maf(quick[0], *given)[0], z)
    assert maf.inverse(z[:0], *(c[:0] for c in given))[0].shape == (0, 5)


@pytest.mark.parametrize("by", ["op", "passes"])
def test_gradients_of_the_inverse_are_those_through_unrolled_passes(by):
    maf = layer(4, order="random", context_channels=2)
    if by == "passes":
        maf.conditioner.register_forward_hook(lambda *_: None)
    z, context = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 2).double().requires_grad_()
    inputs = [z, context, *maf.parameters()]

    def unrolled():
        x = torch.zeros_like(z)
        for _ in range(4):
            x, logdet = maf.transform.inverse(z, maf.conditioner(x, context))
        return x, logdet

    for loss in (lambda x, d: x.square().sum(), lambda x, d: d.exp().sum(), lambda x, d: (x.sum(1) * d).sum()):
        expected = torch.autograd.grad(loss(*unrolled()), inputs)
        for a, b in zip(torch.autograd.grad(loss(*maf.inverse(z, context)), inputs), expected):
            torch.testing.assert_close(a, b)


def test_only_some_gradients_are_wanted():
    maf = layer(4, context_channels=2)
    maf.conditioner.register_forward_hook(lambda *_: None)
    for p in maf.parameters():
        p.requires_grad_(False)
    maf.conditioner.last.bias.requires_grad_()
    context = torch.randn(3, 2).double()
    x, _ = maf.inverse(torch.randn(3, 4).double(), context)
    x.sum().backward()
    assert maf.conditioner.last.bias.grad.abs().sum() > 0
    assert maf.conditioner.first.weight.grad is None


def test_the_backward_keeps_the_output_and_not_the_passes():
    kept = []
    maf = layer(12, dtype=torch.float32)
    maf.conditioner.register_forward_hook(lambda *_: None)
    z = torch.randn(100, 12)
    own = {p.data_ptr() for p in maf.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        maf.inverse(z)
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 2 * z.numel()


def test_autocast_round_trips_in_the_networks_precision():
    maf = layer(6, dtype=torch.float32)
    x = torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = maf(x)
        back, inverse = maf.inverse(z)
        with torch.no_grad():
            again, _ = maf.inverse(z)
    assert z.dtype == logdet.dtype == back.dtype == torch.float32
    for found in (back, again):  # by a float32 network it would be off by more than the rounding that flips
        torch.testing.assert_close(found, x, atol=1e-2, rtol=0)
    torch.testing.assert_close(inverse, -logdet, atol=2e-2, rtol=0)
    back.sum().backward()
    assert torch.isfinite(maf.conditioner.first.weight.grad).all()


def test_huge_values_that_are_not_known_yet_do_not_spoil_what_is():
    """Before its turn a feature may overflow: zero times infinity would reach the others."""
    maf = N.MaskedAutoregressive(3, transform="exp", conditioner=N.MaskedMLP(3, 4, 2))
    with torch.no_grad():
        for p in maf.parameters():
            p.zero_()
        maf.conditioner.last.bias[5] = -100.0  # feature 2: x = z e^100
    z = torch.tensor([[1.0, 2.0, 3.0]])
    for _ in range(2):
        x, logdet = maf.inverse(z)
        assert x.tolist() == [[1.0, 2.0, math.inf]]
        assert torch.equal(logdet, torch.tensor([100.0]))
        maf.conditioner.register_forward_hook(lambda *_: None)


def test_compiled_inverse_is_one_graph():
    torch._dynamo.reset()
    for kind in ("affine", "hooked"):
        maf = layer(3, dtype=torch.float32)
        if kind == "hooked":
            maf = N.MaskedAutoregressive(3, conditioner=Plain(maf.conditioner))
        z = torch.randn(4, 3).requires_grad_()
        compiled = torch.compile(maf.inverse, fullgraph=True, backend="aot_eager")
        for run in (torch.no_grad(), torch.enable_grad()):
            with run:
                for a, b in zip(compiled(z), maf.inverse(z)):
                    torch.testing.assert_close(a, b)
        expected = torch.autograd.grad(maf.inverse(z)[0].square().sum(), z)
        torch.testing.assert_close(torch.autograd.grad(compiled(z)[0].square().sum(), z), expected)


class Plain(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_function_transforms_of_the_inverse():
    maf = layer(3)
    z = torch.randn(4, 3).double()
    x, logdet = maf.inverse(z)
    mapped = torch.func.vmap(lambda v: tuple(r[0] for r in maf.inverse(v[None])))(z)
    torch.testing.assert_close(mapped[0], x)
    torch.testing.assert_close(mapped[1], logdet)
    jacobian = torch.func.jacfwd(lambda v: maf.inverse(v[None])[0][0])(z[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])


def test_check_finds_a_network_that_sees_too_much():
    x = torch.randn(20, 3)
    honest = N.Flow(N.MaskedAutoregressive(3, conditioner=Plain(N.MaskedMLP(3, 8, 2))), N.StandardNormal(3))
    assert honest.check(x).ok
    cheat = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    report = N.Flow(N.MaskedAutoregressive(3, conditioner=cheat), N.StandardNormal(3)).check(x)
    assert not report.ok
    assert report.faults[0].kind == "MaskedAutoregressive"


def test_the_density_integrates_to_one():
    flow = N.Flow(layer(2, dtype=torch.float32), N.StandardNormal(2))
    side = torch.linspace(-12, 12, 300)
    area = (side[1] - side[0]) ** 2
    with torch.no_grad():
        assert abs(flow.log_prob(torch.cartesian_prod(side, side)).exp().sum() * area - 1) < 1e-2


def test_the_twin_has_one_pass_where_this_has_many():
    maf = layer(4)
    counted = Counted(maf.conditioner)
    iaf = N.MaskedAutoregressive(4, conditioner=counted).inv
    z = torch.randn(3, 4).double()
    x, logdet = iaf.inverse(z)
    assert counted.calls == 1
    back, forward = iaf(x)
    assert counted.calls == 5
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(forward, -logdet)


def test_new_layers_with_the_affine_map_are_the_identity():
    x = torch.randn(4, 3)
    z, logdet = N.MaskedAutoregressive(3)(x)
    assert torch.equal(z, x)
    assert logdet.abs().max() == 0
    assert math.isclose(
        N.MaskedAutoregressive(3, transform="glow")(x)[1][0].item(), -3 * math.log1p(math.exp(-2)), rel_tol=1e-5
    )


class Halves(torch.nn.Module):
    def forward(self, x, params, *, mask=None, channel_map=None):
        raise AssertionError


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: N.MaskedAutoregressive(0), "needs at least 1 feature, got 0"),
        (lambda: N.MaskedAutoregressive(3, conditioner=N.MaskedMLP(4, 8, 2)), "for 4 features, the layer for 3"),
        (
            lambda: N.MaskedAutoregressive(3, conditioner=N.MaskedMLP(3, 8, 5)),
            "takes 2 params per feature, but the MaskedMLP gives 5",
        ),
        (
            lambda: N.MaskedAutoregressive(3, transform=N.AffineTransform("exp")),
            "layout='shift_scale_interleaved' or 'scale_shift_interleaved', got 'shift_scale'",
        ),
        (lambda: N.MaskedAutoregressive(3, passes=2), "passes must be from 3 to 3 here, got 2"),
        (
            lambda: N.MaskedAutoregressive(3, conditioner=Plain(None), passes=4),
            "passes must be from 1 to 3 here, got 4",
        ),
        (lambda: N.MaskedAutoregressive(3, transform=Halves()), "does not say how many params"),
        (lambda: N.MaskedAutoregressive(3, transform="spliny"), "unknown scale map 'spliny'"),
        (lambda: N.MaskedAutoregressive(3)(torch.zeros(2, 4)), "built for 3 channels on axis 1, got"),
        (lambda: N.MaskedAutoregressive(3)(torch.zeros(2, 3, 2)), r"takes data \[B, 3\], got shape \(2, 3, 2\)"),
        (lambda: N.MaskedAutoregressive(3).double()(torch.zeros(2, 3)), "gives float64 but the data is float32"),
        (
            lambda: N.MaskedAutoregressive(3)(torch.zeros(2, 3), lengths=torch.tensor([1, 2])),
            "it takes no lengths",
        ),
    ],
)
def test_messages(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_against_nflows(kind):
    nflows = pytest.importorskip("nflows.transforms.autoregressive")
    torch.manual_seed(0)
    if kind == "affine":
        theirs = nflows.MaskedAffineAutoregressiveTransform(5, 24, num_blocks=2)
        transform = N.AffineTransform(ScaleMap("softplus", eps=1e-3), layout="scale_shift_interleaved")
    else:
        theirs = nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 24, num_bins=6, tails="linear")
        transform = replace(Spline.nflows(6, 1.0), prescale=1.0)
    theirs = theirs.double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    made = theirs.autoregressive_net
    network = N.MaskedMLP(5, 24, len(made.final_layer.bias) // 5, residual=True, layers=2)
    order = made.initial_layer.degrees.argsort(stable=True)  # theirs go round
    inner = [linear for block in made.blocks for linear in block.linear_layers]
    with torch.no_grad():
        network.first.weight.copy_(made.initial_layer.weight[order])
        network.first.bias.copy_(made.initial_layer.bias[order])
        for ours, linear in zip(network.hidden, inner):
            ours.weight.copy_(linear.weight[order][:, order])
            ours.bias.copy_(linear.bias[order])
        network.last.weight.copy_(made.final_layer.weight[:, order])
        network.last.bias.copy_(made.final_layer.bias)
    maf = N.MaskedAutoregressive(5, transform=transform, conditioner=network).double()
    x = torch.randn(7, 5).double()
    z, logdet = theirs(x)
    for a, b in zip(maf(x), (z, logdet)):
        torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for a, b in zip(maf.inverse(z), theirs.inverse(z)):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)  # their last knot is off by 1e-6
