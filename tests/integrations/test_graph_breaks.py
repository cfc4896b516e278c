"""Whole models of other libraries under torch.compile: graph breaks counted before and after."""

import copy

import pytest
import torch

from nfkernels import accelerate


def nflows_nsf():
    nflows = pytest.importorskip("nflows")
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    assert nflows
    layers = []
    for i in range(2):
        mask = [(j + i) % 2 for j in range(4)]
        layers.append(transforms.LULinear(4))
        layers.append(
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, lambda a, b: ResidualNet(a, b, hidden_features=8), num_bins=4, tails="linear", tail_bound=3.0
            )
        )
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
    return flow, lambda m, x: m.log_prob(x), (torch.randn(16, 4),)


def zuko_nsf():
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.NSF(4, 2, transforms=2, hidden_features=(8,))
    return flow, lambda m, x, c: m(c).log_prob(x), (torch.randn(16, 4), torch.randn(16, 2))


def freia_sequence():
    pytest.importorskip("FrEIA")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    def subnet(a, b):
        return torch.nn.Conv2d(a, b, 3, padding=1)

    inn = SequenceINN(4, 6, 6)
    for _ in range(2):
        inn.append(AllInOneBlock, subnet_constructor=subnet)
    return inn, lambda m, x: m(x), (torch.randn(4, 4, 6, 6),)


def normflows_glow():
    nf = pytest.importorskip("normflows")
    # Levels from the smallest on, as normflows counts them.
    flows = [[nf.flows.GlowBlock(c, 8), nf.flows.Squeeze()] for c in (24, 12)]
    bases = [nf.distributions.DiagGaussian(shape) for shape in ((24, 2, 2), (6, 4, 4))]
    model = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()])
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        model.log_prob(x, None)
    return model, lambda m, x: m.log_prob(x, None), (x,)


def graph_breaks(model, call, inputs):
    torch._dynamo.reset()
    return torch._dynamo.explain(lambda *given: call(model, *given))(*inputs).graph_break_count


@pytest.mark.parametrize("make", [nflows_nsf, zuko_nsf, freia_sequence, normflows_glow], ids=lambda f: f.__name__)
def test_fewer_graph_breaks_than_before(make):
    torch.manual_seed(0)
    model, call, inputs = make()
    expected = call(model, *inputs)
    plain = copy.deepcopy(model)
    assert accelerate(model, inputs, call=call).fused
    after = graph_breaks(model, call, inputs)
    before = graph_breaks(plain, call, inputs) if after else 0
    torch._dynamo.reset()
    assert after < before or after == 0, f"{before} before, {after} after"
    got = torch.compile(lambda *given: call(model, *given), backend="eager")(*inputs)
    for g, e in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
