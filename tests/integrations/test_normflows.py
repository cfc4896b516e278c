"""What is particular to normflows: lazy ActNorms, what is refused and why, masks that are loaded, whole models."""

import copy

import pytest
import torch

nf = pytest.importorskip("normflows", reason="normflows is not installed")

from normflows.flows.mixing import _LULinear  # noqa: E402
from normflows.nets import MLP  # noqa: E402

from nfkernels.integrations import accelerate  # noqa: E402
from nfkernels.integrations.swap import is_swapped  # noqa: E402

flows = nf.flows


def _glow(classes=None, levels=2, steps=2, hidden=8, use_lu=True, net_actnorm=False):
    """normflows' own example, small: pictures of 3 x 8 x 8."""
    torch.manual_seed(0)
    bases, layers, merges = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        blocks = [
            flows.GlowBlock(channels, hidden, use_lu=use_lu, net_actnorm=net_actnorm, init_zeros=False)
            for _ in range(steps)
        ]
        layers.append([*blocks, flows.Squeeze()])
        side = 8 // 2 ** (levels - i)
        if i:
            merges.append(flows.Merge())
            channels //= 2
        shape = channels, side, side
        bases.append(nf.distributions.GlowBase(shape, classes) if classes else nf.distributions.DiagGaussian(shape))
    return nf.MultiscaleFlow(bases, layers, merges, class_cond=classes is not None)


def _disturbed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def _pictures(rows=4):
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _outcomes(model, x, *y):
    """log_prob, forward_kld and its gradients, samples with their densities."""
    model.zero_grad()
    loss = model.forward_kld(x, *y)
    loss.backward()
    with torch.no_grad():
        torch.manual_seed(3)
        samples = model.sample(4, *y) if y else model.sample(4)
        return [model.log_prob(x, *(y or (None,) * isinstance(model, nf.MultiscaleFlow))), loss.detach(), *samples], [
            p.grad for p in model.parameters() if p.grad is not None
        ]


def _same(found, expected, tolerance):
    for got, want in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * (1 + float(want.abs().max())))


@pytest.mark.parametrize(("classes", "use_lu", "net_actnorm"), [(None, True, False), (3, False, True)])
def test_a_whole_glow(classes, use_lu, net_actnorm):
    model, x = _glow(classes, use_lu=use_lu, net_actnorm=net_actnorm).double(), _pictures().double()
    y = (torch.tensor([0, 2, 1, 1]),) if classes else ()
    model.forward_kld(x, *y)
    _disturbed(model)
    expected = _outcomes(copy.deepcopy(model), x, *y)
    report = accelerate(model, (x, *(y or (None,))))
    assert {row.layer for row in report.kept} == {"GlowBlock", "Merge"}
    assert {row.status for row in report} == {"fused", "kept"}
    names = {"AffineCouplingBlock", "Invertible1x1Conv", "ActNorm", "Squeeze"}
    assert {row.layer for row in report.fused} >= names | ({"GlowBase"} if classes else {"DiagGaussian"})
    _same(_outcomes(model, x, *y), expected, 1e-10)


def _spline_flow(kind):
    torch.manual_seed(0)
    layers = []
    for i in range(2):
        if kind == "coupled":
            layers.append(flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=5, reverse_mask=bool(i)))
        else:
            layers.append(flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, num_bins=5, permute_mask=True))
        layers.append(flows.LULinearPermute(4))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), layers)


@pytest.mark.parametrize("kind", ["coupled", "autoregressive"])
def test_a_whole_spline_flow(kind):
    model, x = _disturbed(_spline_flow(kind)).double(), 2 * torch.randn(6, 4, dtype=torch.float64)
    expected = _outcomes(copy.deepcopy(model), x)
    report = accelerate(model, x)
    assert not report.kept
    assert not report.inactive
    _same(_outcomes(model, x), expected, 1e-9)


def test_autocast_keeps_a_glow_invertible():
    """bfloat16 networks, as the two of them run them: the original's data becomes bfloat16 too."""
    model, x = _glow(steps=4), _pictures(8)
    model.log_prob(x, None)
    fused = copy.deepcopy(model)
    accelerate(fused, (x, None))
    errors = []
    for m in (model, fused):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = m.inverse_and_log_det(x)
            back, _ = m.forward_and_log_det(z)
        errors.append(float((back.float() - x).abs().max()))
    assert {t.dtype for t in (*z, log_det, back)} == {torch.float32}
    assert errors[1] < 1e-3
    assert errors[0] > 10 * errors[1], f"the original's error is {errors[0]}, ours {errors[1]}"


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("inputs", [True, False])
def test_an_actnorm_is_started_by_its_first_batch_and_then_fused(direction, inputs):
    plain, fused = flows.ActNorm((3, 1, 1)), flows.ActNorm((3, 1, 1))
    first, second = (3 + 2 * torch.randn(4, 3, 2, 2) for _ in range(2))
    accelerate(fused, first if inputs else None, call=direction)
    assert not bool(fused.data_dep_init_done)
    assert torch.equal(fused.s, torch.zeros_like(fused.s))
    for batch in (first, second, second):
        expected, got = getattr(plain, direction)(batch), getattr(fused, direction)(batch)
        torch.testing.assert_close(got, expected)
        assert bool(fused.data_dep_init_done)
    assert is_swapped(fused)
    flag = fused.data_dep_init_done
    fused._buffers["data_dep_init_done"] = None  # nobody looks at it any more
    getattr(fused, direction)(second)
    fused._buffers["data_dep_init_done"] = flag
    # A state from before the first batch starts anew.
    other = flows.ActNorm((3, 1, 1))
    fused.load_state_dict(other.state_dict())
    batch = 7 + torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(getattr(fused, direction)(batch), getattr(other, direction)(batch))
    torch.testing.assert_close(getattr(fused, direction)(second), getattr(other, direction)(second))


def test_an_unstarted_glow_is_started_by_its_first_real_batch():
    model, x = _glow(net_actnorm=True), _pictures()
    plain = copy.deepcopy(model)
    accelerate(model, (torch.rand(4, 3, 8, 8), None))
    for _ in range(2):
        torch.testing.assert_close(model.log_prob(x, None), plain.log_prob(x, None), rtol=1e-4, atol=1e-2)
    inner = [m for m in model.modules() if type(m).__name__ == "ActNorm"]
    assert all(bool(m.data_dep_init_done) for m in inner if hasattr(m, "data_dep_init_done"))


REFUSED = [
    (lambda: flows.AffineCoupling(MLP([2, 2]), scale=False), "a shift alone: one addition, nothing to fuse"),
    (lambda: flows.AffineCoupling(MLP([2, 4]), scale_map="tanh"), "scale_map='tanh'"),
    (lambda: flows.AffineConstFlow((6,)), "a few operations on small rows: nothing to gain"),
    (lambda: flows.Permute(4, "swap"), "mode='swap': two slices and one copy, nothing to fuse"),
    (
        lambda: flows.MaskedAffineFlow(torch.tensor([0.5, 1]), MLP([2, 2])),
        "a mask that is not of zeros and ones, an entry for each feature",
    ),
    (lambda: flows.MaskedAffineFlow(torch.ones(2), None, MLP([2, 2])), "no shift"),
    (
        lambda: flows.CoupledRationalQuadraticSpline(4, 1, 8, tails=None),
        "tails=None (linear and circular ones are fused)",
    ),
    (lambda: flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=100), "Spline.bins must be"),
    (lambda: flows.Merge("checkerboard"), "one copy: nothing to fuse"),
    (lambda: flows.Planar((2,)), "no adapter for normflows.flows.planar.Planar"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_kept_with_the_reason(make, reason):
    report = accelerate(make())
    assert report.rows[0].status == "kept"
    assert report.rows[0].reason.startswith(reason)


def test_a_hook_inside_a_block_keeps_it_and_one_on_its_network_does_not():
    for place, status in (("flows.1", "kept"), ("flows.1.param_map", "fused")):
        block, seen = flows.AffineCouplingBlock(MLP([2, 8, 4])), []
        block.get_submodule(place).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        z = torch.randn(5, 4)
        report = accelerate(block, z)
        assert report.rows[0].status == status
        seen.clear()
        block(z)
        assert seen == [1]


def test_not_finite_params_give_nan_where_the_original_does():
    class Edges(torch.nn.Module):
        def __init__(self, *values):
            super().__init__()
            self.register_buffer("values", torch.tensor(values))

        def forward(self, z):
            return self.values * torch.ones_like(z)

    inf = float("inf")
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    plain = flows.MaskedAffineFlow(mask, Edges(0.1, inf, 0.2, -inf, 0.3), Edges(0.1, 0.2, inf, 0.2, -inf))
    fused = copy.deepcopy(plain)
    accelerate(fused, verify=False)
    z = torch.randn(3, 5)
    for method in ("forward", "inverse"):
        want, got = getattr(plain, method)(z), getattr(fused, method)(z)
        assert torch.equal(want[0].isnan(), torch.tensor([[False, True, True, True, True]] * 3))
        assert want[1].isnan().all()
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: flows.CoupledRationalQuadraticSpline(4, 1, 8, reverse_mask=bool(i)),
        lambda i: flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, permute_mask=True, init_identity=False),
        lambda i: flows.LULinearPermute(4, identity_init=False),
        lambda i: flows.Permute(4),
        lambda i: flows.InvertibleAffine(4),
    ],
)
def test_masks_and_orders_are_those_of_the_state_that_is_loaded(make):
    torch.manual_seed(0)
    fused, other, x = make(0), _disturbed(make(1)), torch.randn(5, 4)
    accelerate(fused, x, call="inverse")
    fused.load_state_dict(other.state_dict())
    for method in ("forward", "inverse"):
        torch.testing.assert_close(getattr(fused, method)(x), getattr(other, method)(x), rtol=1e-4, atol=1e-4)


def test_a_cached_lu_layer_inverts_where_the_original_dies():
    layer, x = _disturbed(_LULinear(4)).eval(), torch.randn(5, 4)
    plain = copy.deepcopy(layer)
    layer.use_cache()
    with pytest.raises(AttributeError, match="trtrs"):
        layer.inverse(x)
    report = accelerate(layer, x)
    assert report.rows[0].status == "fused"
    assert "proved by the round trip" in report.rows[0].reason
    torch.testing.assert_close(layer.inverse(x), plain.inverse(x))
    torch.testing.assert_close(layer(x), plain(x))


def test_the_passes_of_a_plain_made_are_one_kernel(monkeypatch):
    from nfkernels.integrations.normflows import autoregressive

    calls = []
    real = autoregressive.autoregressive_inverse
    monkeypatch.setattr(autoregressive, "autoregressive_inverse", lambda *a, **k: calls.append(1) or real(*a, **k))
    layer, x = _disturbed(flows.AutoregressiveRationalQuadraticSpline(4, 1, 8)), torch.randn(5, 4)
    accelerate(layer, verify=False)
    layer(x)
    assert calls == [1]
    layer.mprqat.autoregressive_net.blocks[0].dropout.p = 0.5
    layer.train()(x)  # other numbers at every pass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.eval()(x)  # a network in another type
    assert calls == [1]
    layer(x)
    assert calls == [1, 1]
