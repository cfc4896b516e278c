"""Flow.compile_graph: the same numbers as the flow's own calls, replayed where they can be."""

import copy
import warnings

import pytest
import torch
from recorders import Stub, Told

from nfkernels.nn import MLP, ActNorm, AffineCoupling, Chain, Flow, GraphedFlow, StandardNormal


def _flow(context=0):
    torch.manual_seed(0)
    layers = [ActNorm(4)]
    for identity in ("first", "second"):
        network = MLP(2, 8, 4, context_channels=context)
        torch.nn.init.normal_(network.last.weight, std=0.3)
        layers.append(AffineCoupling(network, identity=identity))
    flow = Flow(Chain(*layers), StandardNormal(4))
    flow.initialize(torch.randn(64, 4), torch.randn(64, context) if context else None)
    return flow.eval()


def test_log_prob_and_sample_are_replayed_and_follow_the_weights():
    flow, stub, told = _flow(), Stub(), Told()
    graphed = GraphedFlow(flow, recorder=stub, tell=told)
    graphed.prepare(torch.randn(5, 4))
    assert len(stub.recordings) == 2
    before = [r.count for r in stub.recordings]
    x = torch.randn(5, 4)
    assert torch.equal(graphed.log_prob(x), flow.log_prob(x))
    torch.manual_seed(3)
    drawn = graphed.sample(5, temperature=0.7)
    torch.manual_seed(3)
    assert torch.equal(drawn, flow.sample(5, temperature=0.7))
    assert [r.count for r in stub.recordings] == [n + 1 for n in before]
    with torch.no_grad():
        for weight in flow.parameters():
            weight.mul_(1.1)
    assert torch.equal(graphed.log_prob(x), flow.log_prob(x))
    assert not told


def test_with_a_context():
    flow, stub = _flow(context=3), Stub()
    x, context = torch.randn(5, 4), torch.randn(5, 3)
    graphed = GraphedFlow(flow, recorder=stub).prepare(x, context)
    assert torch.equal(graphed.log_prob(x, context), flow.log_prob(x, context))
    torch.manual_seed(1)
    drawn = graphed.sample(2, context)
    torch.manual_seed(1)
    assert torch.equal(drawn, flow.sample(2, context))
    assert drawn.shape == (2, 5, 4)


def test_steps_are_those_of_the_loop_that_everybody_writes():
    plain, stub = _flow().train(), Stub()
    replayed = copy.deepcopy(plain)
    batches = [torch.randn(16, 4) for _ in range(8)]
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = plain.nll(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    graphed = GraphedFlow(replayed, torch.optim.Adam(replayed.parameters(), lr=1e-2), recorder=stub)
    found = [graphed.step(x) for x in batches]
    assert torch.equal(torch.stack(found), torch.stack(losses))
    for a, b in zip(plain.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert stub.recordings[0].count == len(batches) - 3


def test_each_mode_has_its_own_steps():
    flow, stub = _flow().train(), Stub()
    graphed = GraphedFlow(flow, torch.optim.SGD(flow.parameters(), lr=0.1), recorder=stub)
    x = torch.randn(8, 4)
    for _ in range(5):
        graphed.step(x)
    flow.eval()
    for _ in range(5):
        graphed.step(x)
    assert len(stub.recordings) == 2


def test_another_loss():
    flow = _flow().train()
    graphed = flow.compile_graph(
        torch.randn(8, 4),
        optimizer=torch.optim.SGD(flow.parameters(), lr=0.1),
        loss=lambda x, context: flow.encode(x).square().mean(),
    )
    x = torch.randn(8, 4)
    with torch.no_grad():
        expected = flow.encode(x).square().mean()
    assert torch.equal(graphed.step(x), expected)


def test_on_the_cpu_calls_are_plain_and_nothing_is_said():
    flow = _flow()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed = flow.compile_graph(torch.randn(5, 4))
    x = torch.randn(7, 4)
    assert torch.equal(graphed.log_prob(x), flow.log_prob(x))
    assert graphed.sample(3).shape == (3, 4)


def test_training_mode_is_not_replayed():
    flow, stub = _flow().train(), Stub()
    graphed = GraphedFlow(flow, recorder=stub).prepare(torch.randn(5, 4))
    for _ in range(6):
        graphed.log_prob(torch.randn(5, 4))
        graphed.sample(5)
    assert not stub.recordings


def test_what_is_wrong_is_said():
    flow = _flow()
    with pytest.raises(ValueError, match="needs an optimiser"):
        flow.compile_graph(torch.randn(5, 4)).step(torch.randn(5, 4))
    with pytest.raises(ValueError, match="NaN"):
        flow.compile_graph(torch.full((5, 4), torch.nan))
    with pytest.raises(ValueError, match="no layer of this flow uses a context"):
        flow.compile_graph(torch.randn(5, 4)).log_prob(torch.randn(5, 4), torch.randn(5, 1))
