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
    assert nfkernels.restore(flow) == sum("as a part" not in row.reason for row in first.fused)


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
