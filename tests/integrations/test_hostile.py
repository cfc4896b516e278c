"""What users do to a model after ``accelerate``: it behaves as the original does, or stays the original."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nfkernels

ROWS = 16


def _nflows(uninitialised: bool = False):
    pytest.importorskip("nflows")
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)

    torch.manual_seed(0)
    layers = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            [0, 1, 0, 1], net, num_bins=4, tails="linear", tail_bound=2.0
        ),
        transforms.QRLinear(4, 4),
        transforms.ActNorm(4),
    ]
    flow, x = Flow(transforms.CompositeTransform(layers), StandardNormal([4])), torch.randn(ROWS, 4)
    if not uninitialised:
        flow.log_prob(x)
    return flow, x


def _same(flow, fused, call, tolerance=1e-4):
    torch.testing.assert_close(call(fused), call(flow), atol=tolerance, rtol=tolerance)


def _gradients(flow, x, run):
    flow.zero_grad()
    run(flow, x).sum().backward()
    return [p.grad.clone() for p in flow.parameters()]


@pytest.mark.parametrize("uninitialised", [False, True], ids=("started", "first batch"))
@pytest.mark.parametrize("given", [False, True], ids=("pending", "proved"))
def test_a_first_call_inside_of_a_checkpoint(uninitialised, given):
    """A checkpoint repeats the call and counts what is saved: no class changes in between."""
    flow, x = _nflows(uninitialised)
    fused = copy.deepcopy(flow)
    report = nfkernels.accelerate(fused, x if given else None)

    def run(model, x):
        return checkpoint(model.log_prob, x, use_reentrant=False)

    for _ in range(2):
        for a, e in zip(_gradients(fused, x, run), _gradients(flow, x, run), strict=True):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)
    _same(flow, fused, lambda m: m.log_prob(x))
    assert not report.pending
    assert report.fused


@pytest.mark.parametrize("first", [lambda x: x[:0], lambda x: x * float("nan"), lambda x: x * float("inf")])
def test_a_first_batch_that_proves_nothing_decides_nothing(first):
    flow, x = _nflows()
    report = nfkernels.accelerate(flow)
    with contextlib.suppress(RuntimeError):  # the original's, of an empty batch
        flow.log_prob(first(x))
    assert not report.kept
    flow.log_prob(x)
    assert not report.kept
    assert not report.pending


def test_inputs_that_prove_nothing_are_named():
    flow, x = _nflows()
    report = nfkernels.accelerate(flow, x * float("nan"))
    assert any("not finite" in row.reason for row in report.kept), report


def test_a_hook_that_comes_between_accelerate_and_the_first_call():
    flow, x = _nflows()
    report, called = nfkernels.accelerate(flow), []
    flow._transform._transforms[1].orthogonal.register_forward_hook(lambda *_: called.append(1))
    flow.log_prob(x)
    flow.log_prob(x)
    assert len(called) == 2
    assert "a hook on orthogonal" in report.kept[0].reason


def test_a_method_that_is_replaced_on_a_layer_in_a_chain():
    flow, x = _nflows()
    nfkernels.accelerate(flow, x)
    flow._transform._transforms[0].inverse = lambda x, context=None: (x + 100, x.new_zeros(len(x)))
    assert flow._transform.inverse(x)[0].mean() > 50


def test_accelerating_twice_leaves_the_parts_of_what_is_fused():
    flow, x = _nflows()
    first = nfkernels.accelerate(flow, x)
    again = nfkernels.accelerate(flow)
    assert len(again.fused) == len(first.fused)
    assert not again.pending
    layers = sum("as a part" not in row.reason for row in first.fused)
    assert nfkernels.restore(flow) == layers


def test_zuko_transforms_of_what_is_not_fused_are_the_originals():
    """Their generic ``call_and_ladj`` calls the transform itself: the fused one, for ever."""
    zuko = pytest.importorskip("zuko")
    order, square = torch.randperm(4), torch.eye(4) + 0.1 * torch.randn(4, 4)
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(4), torch.ones(4), buffer=True)
    flow = zuko.flows.Flow(
        [
            zuko.lazy.UnconditionalTransform(zuko.transforms.PermutationTransform, order, buffer=True),
            zuko.lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, square),
        ],
        base,
    )
    fused, x = copy.deepcopy(flow), torch.randn(ROWS, 4)
    assert len(nfkernels.accelerate(fused, x).fused) >= 2
    _same(flow, fused, lambda m: m().log_prob(x))
    _same(flow, fused, lambda m: m.transform.transforms[1]().call_and_ladj(x[:, :1]))
    low = x.bfloat16()
    assert torch.equal(fused.transform.transforms[0]()(low), flow.transform.transforms[0]()(low))
    assert torch.equal(fused.transform.transforms[0]().call_and_ladj(low)[0], low[:, order])


def test_normflows_actnorm_of_features_on_something_of_more_axes():
    nf = pytest.importorskip("normflows")
    layer = nf.flows.ActNorm(4)
    layer(torch.randn(ROWS, 4) * 2 + 1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    fused, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(3, 4, 4)
    nfkernels.accelerate(fused, torch.randn(ROWS, 4), call=lambda m, x: m[0](x))
    torch.testing.assert_close(fused[0](x)[0], layer(x)[0])
    torch.testing.assert_close(fused[0].inverse(x)[0], layer.inverse(x)[0])


def _reduced(flow):
    flow._transform._transforms[0].tail_bound = 1.0


def _smaller(flow):
    torch.manual_seed(1)
    old = flow._transform._transforms[0].transform_net
    wide = old.final_layer.out_features
    flow._transform._transforms[0].transform_net = type(old)(2, wide, hidden_features=32, num_blocks=1)


def _started_anew(flow):
    flow._transform._transforms[2].initialized = torch.tensor(False)


def _refused(flow):
    flow._transform._transforms[0].tails = "other"


@pytest.mark.parametrize("change", [_reduced, _smaller, _started_anew, _refused])
def test_a_setting_that_is_changed_later(change):
    """``module.tail_bound = 1`` and the like choose the layer anew."""
    flow, x = _nflows()
    fused = copy.deepcopy(flow)
    nfkernels.accelerate(fused, x)
    outcomes = []
    for model in (flow, fused):
        change(model)
        try:
            outcomes.append((model.log_prob(2 * x), model.log_prob(x), model._transform.inverse(x)))
        except Exception as error:
            outcomes.append(type(error))
    if isinstance(outcomes[0], type):
        assert outcomes[0] is outcomes[1]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-4, rtol=1e-4)
    nfkernels.restore(fused)


def test_a_setting_that_is_changed_later_in_normflows():
    nf = pytest.importorskip("normflows")
    layer = nf.flows.AffineCoupling(nf.nets.MLP([2, 8, 4], init_zeros=False))
    model, x = nn.ModuleList([layer]), [torch.randn(8, 2), torch.randn(8, 2)]
    fused = copy.deepcopy(model)
    nfkernels.accelerate(fused, (x,), call=lambda m, x: m[0](x))
    layer.scale_map = fused[0].scale_map = "sigmoid"
    torch.testing.assert_close(fused[0](x), layer(x))
    layer.scale_map = fused[0].scale_map = "exp"
    torch.testing.assert_close(fused[0](x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_autocast_is_the_originals(dtype):
    pytest.importorskip("nflows")
    nf = pytest.importorskip("normflows")
    from nflows import transforms

    for layer in (transforms.QRLinear(4, 4), transforms.LULinear(4), nf.flows.LULinearPermute(4)):
        x, fused = torch.randn(8, 4), nn.Sequential(copy.deepcopy(layer))
        assert nfkernels.accelerate(fused, x).fused
        model, fused, x = layer.to(dtype), fused[0].to(dtype), x.to(dtype)
        for method in ("forward", "inverse"):
            outcomes = []
            for m in (model, fused):
                try:
                    outcomes.append(getattr(m, method)(x))
                except Exception as error:
                    outcomes.append(type(error))
            if isinstance(outcomes[0], type):
                assert outcomes[0] is outcomes[1]
            else:
                torch.testing.assert_close(outcomes[1], outcomes[0], atol=0.1, rtol=0.1)


def test_normflows_data_wider_than_the_layer():
    nf = pytest.importorskip("normflows")
    layer, x = nf.flows.LULinearPermute(4), torch.randn(8, 4)
    fused = nn.Sequential(copy.deepcopy(layer))
    nfkernels.accelerate(fused, x)
    assert fused[0](x.double())[0].dtype == layer(x.double())[0].dtype


def test_a_parametrization_after_accelerate_comes_and_goes():
    flow, x = _nflows()
    fused = copy.deepcopy(flow)
    nfkernels.accelerate(fused, x)
    for model in (flow, fused):
        torch.manual_seed(0)
        actnorm = model._transform._transforms[2]
        nn.utils.parametrize.register_parametrization(actnorm, "shift", nn.Sigmoid(), unsafe=True)
    _same(flow, fused, lambda m: m.log_prob(x))
    for model in (flow, fused):
        nn.utils.parametrize.remove_parametrizations(model._transform._transforms[2], "shift")
    _same(flow, fused, lambda m: m.log_prob(x))


def test_a_layer_built_by_the_class_of_a_fused_one_is_an_original():
    flow, x = _nflows()
    original = type(flow._transform._transforms[1])
    nfkernels.accelerate(flow, x)
    fused = flow._transform._transforms[1]
    assert type(fused) is not original
    assert type(type(fused)(6, 2)) is original


def test_replicas_of_fused_layers():
    """As DataParallel makes them."""
    flow, x = _nflows()
    nfkernels.accelerate(flow, x)
    layer = flow._transform._transforms[2]
    replica = layer._replicate_for_data_parallel()
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        setattr(replica, name, tensor)
    assert type(replica) is type(layer)
    torch.testing.assert_close(replica(x)[0], layer(x)[0])
