"""Reversible training: gradients, what is kept, dropout, autocast, contexts, and networks that run once more."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nfkernels import ScaleMap
from nfkernels import nn as N
from nfkernels.models import Glow

FLOORED = ScaleMap("sigmoid", offset=2.0, eps=1e-3)


def moved(module, by=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p))
    return module


def pair(make, **options):
    """The same module with its activations stored and without."""
    torch.manual_seed(0)
    stored = moved(make(memory="stored", **options))
    reversible = make(memory="reversible", **options)
    reversible.load_state_dict(stored.state_dict())
    return stored, reversible


def gradients(module, loss, *inputs, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    value = loss(module(*inputs))
    into = [*(v for v in inputs if v is not None and v.requires_grad), *(p for p in module.parameters())]
    return [value.detach(), *torch.autograd.grad(value, into)]


def relative_error(found, expected):
    """Of whole gradients: the largest error over the largest entry, worst of all tensors."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)
    )


def loss_of(out):
    z, logdet = out
    return 0.5 * z.square().flatten(1).sum(1).mean() - logdet.mean()


def steps(k=4, channels=6, hidden=8, **options):
    return lambda memory, **more: N.GlowSteps(channels, k, hidden, memory=memory, **options, **more)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 6, 4, 4)),
        ({}, (2, 6, 8, 6)),
        ({"scale_map": "exp", "order": "scale_first"}, (3, 6, 5, 3)),
        ({"scale_map": "additive"}, (2, 6, 3, 3)),
        ({"channels": 70, "k": 2, "hidden": 5}, (1, 70, 5, 4)),
        ({"channels": 3, "kernel": 1, "last_kernel": 3}, (2, 3, 2, 9)),
        ({"context_channels": 3}, (2, 6, 4, 5)),
    ],
    ids=["matrices", "convolutions", "exp", "additive", "70-channels", "odd", "context"],
)
def test_gradients_in_float64_are_those_of_stored_activations(options, shape):
    stored, reversible = (m.double().eval() for m in pair(steps(**options)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    context = (
        torch.randn(shape[0], 3, dtype=torch.float64, requires_grad=True) if "context_channels" in options else None
    )
    found, expected = (gradients(m, loss_of, x, context) for m in (reversible, stored))
    assert relative_error(found, expected) < 1e-9


def test_gradients_in_float32_at_32_steps():
    stored, reversible = (m.eval() for m in pair(steps(32, 12, 16, scale_map=FLOORED)))
    x = torch.randn(4, 12, 8, 8, requires_grad=True)
    found, expected = (gradients(m, loss_of, x) for m in (reversible, stored))
    assert relative_error(found, expected) < 1e-4


def test_bfloat16_networks_give_gradients_as_good_as_stored_ones():
    stored, reversible = (m.eval() for m in pair(steps(8, 12, 32, scale_map=FLOORED)))
    x = torch.randn(4, 12, 8, 8)
    exact = gradients(copy.deepcopy(stored).double(), loss_of, x.double())[1:]
    errors = []
    for module in (stored, reversible):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(module, loss_of, x)[1:]
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, exact)) ** 0.5)
    assert 0 < errors[1] < 2 * errors[0]


def test_only_the_output_is_kept():
    def kept(memory, k, batch):
        module, x = N.GlowSteps(6, k, 8, memory=memory), torch.randn(batch, 6, 8, 8, requires_grad=True)
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(x)
        del out
        return sum(sizes.values())

    def per_sample(memory, k):
        return (kept(memory, k, 8) - kept(memory, k, 4)) / 4

    one_map = 6 * 8 * 8 * 4
    assert per_sample("reversible", 12) == per_sample("reversible", 3) <= 1.1 * one_map
    assert per_sample("stored", 12) > 3 * per_sample("stored", 3)


@pytest.mark.parametrize("of", ["element", "channel"])
@pytest.mark.parametrize("size", [3, 6], ids=["matrices", "convolutions"])
def test_dropout_drops_the_same_again(of, size):
    stored, reversible = pair(steps(3, dropout=0.4, dropout_of=of))
    for m in (stored, reversible):
        m.double().initialized.fill_(True)
        m.train()
    x = torch.randn(3, 6, size, size, dtype=torch.float64, requires_grad=True)
    found, expected = (gradients(m, loss_of, x, seed=5) for m in (reversible, stored))
    assert relative_error(found, expected) < 1e-9
    other = gradients(reversible, loss_of, x, seed=6)
    assert relative_error(other, expected) > 1e-3


def test_each_network_runs_once_in_the_forward_and_once_in_the_backward(monkeypatch):
    from nfkernels.nn import glow_body

    calls = []
    original = glow_body.conv_net
    monkeypatch.setattr(glow_body, "conv_net", lambda *args: (calls.append(1), original(*args))[1])
    module = N.GlowSteps(4, 5, 6, memory="reversible").eval()
    z, logdet = module(torch.randn(2, 4, 3, 3))
    assert len(calls) == 5
    (z.sum() + logdet.sum()).backward()
    assert len(calls) == 10


def test_a_whole_glow_with_classes_trains_alike():
    options = {"levels": 2, "steps": 3, "hidden": 8, "classes": 3, "grey_levels": 17, "dropout": 0.2}
    torch.manual_seed(0)
    stored = Glow((1, 8, 8), **options)
    images = torch.randint(0, 17, (8, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 3, (8,))
    stored.initialize(images, labels)
    moved(stored, 0.02)
    reversible = Glow((1, 8, 8), memory="reversible", **options)
    reversible.load_state_dict(stored.state_dict())
    losses = []
    for flow in (stored, reversible):
        adam = torch.optim.AdamW(flow.train().parameters(), lr=1e-3)
        torch.manual_seed(3)
        losses.append([])
        for _ in range(5):
            loss = flow.nll(images, labels, generator=torch.Generator().manual_seed(1))
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_loss_of_the_log_determinant_or_of_z_alone():
    stored, reversible = (m.double().eval() for m in pair(steps(3)))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    for loss in (lambda out: out[0].sin().sum(), lambda out: out[1].square().sum()):
        for a, b in zip(gradients(reversible, loss, x), gradients(stored, loss, x)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_frozen_parameters_and_data_without_gradient():
    stored, reversible = (m.double().eval() for m in pair(steps(3)))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    for m in (stored, reversible):
        m.weight2.requires_grad_(False)
        m.lower.requires_grad_(False)
        loss_of(m(x)).backward()
    assert reversible.weight2.grad is None
    assert reversible.lower.grad is None
    for a, b in zip(reversible.parameters(), stored.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_gradient_scaling_as_amp_does_it():
    _, reversible = (m.eval() for m in pair(steps(3)))
    x = torch.randn(2, 6, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = gradients(reversible, loss_of, x)[1:]
        scaled = gradients(reversible, lambda out: 1024.0 * loss_of(out), x)[1:]
    for a, b in zip(once, scaled):
        torch.testing.assert_close(1024.0 * a, b)


# --- ReversibleSequential ---------------------------------------------------------------------------------------------


class Halve(N.Bijection):
    """A user's own layer with nothing but an inverse, whose forward draws random numbers."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.7))
        self.runs = 0

    def forward(self, x, context=None, *, lengths=None):
        self.runs += 1
        noise = nn.functional.dropout(torch.ones_like(x[:1]), 0.5, self.training)
        return x * self.log_scale.exp() + noise, self.log_scale * x[0].numel() * x.new_ones(len(x))

    def inverse(self, z, context=None, *, lengths=None):
        noise = nn.functional.dropout(torch.ones_like(z[:1]), 0.5, self.training)
        return (z - noise) * (-self.log_scale).exp(), -self.log_scale * z[0].numel() * z.new_ones(len(z))


def network(inputs, outputs, compiled=False):
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, outputs))
    return torch.compile(net, backend="aot_eager") if compiled else net


def users_chain(compiled=False):
    torch.manual_seed(0)
    step = [N.Chain(N.ActNorm(6), N.InvertibleConv1x1(6), N.AffineCoupling(network(3, 6, compiled))) for _ in range(2)]
    layers = [*step, Halve(), N.LULinear(6), N.Permutation(6)]
    return moved(N.Chain(*layers)).double()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_any_layers_with_random_numbers(compiled):
    chain = users_chain(compiled)
    reversible = N.ReversibleSequential(*chain.layers)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    chain(x)  # the data-dependent start
    found, expected = (gradients(m, loss_of, x, seed=2) for m in (reversible, chain))
    assert relative_error(found, expected) < 1e-9


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn_again():
    chain = users_chain().train()
    after = []
    for module in (chain, N.ReversibleSequential(*chain.layers)):
        x = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
        gradients(module, loss_of, x, seed=4)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_autocast_of_the_forward_holds_in_the_backward():
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    reversible = N.ReversibleSequential(N.AffineCoupling(Net(2, 4)), Halve().eval())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(reversible(torch.randn(3, 4)))
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_contexts_and_layers_that_share_parameters():
    net = N.MLP(2, 6, 4, context_channels=3)
    chain = moved(N.Chain(N.AffineCoupling(net), N.Permutation(4), N.AffineCoupling(net))).double()
    x, c = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    found, expected = (gradients(m, loss_of, x, c) for m in (N.ReversibleSequential(*chain.layers), chain))
    assert relative_error(found, expected) < 1e-9


def same_gradients(layers, x, *, seed=2, started=True):
    """Of a Chain and of a ReversibleSequential of these layers in float64, moved from where they start."""
    layers = moved(nn.ModuleList(layers)).double()
    if started:
        N.Chain(*layers)(x)
    makes = (N.ReversibleSequential, N.Chain)
    found, expected = (gradients(make(*copy.deepcopy(layers)), loss_of, x, seed=seed) for make in makes)
    return relative_error(found, expected) < 1e-9


def inner_chain(make):
    return make(N.AffineCoupling(network(3, 6)), N.InvertibleConv1x1(6), N.AffineCoupling(network(3, 6)))


@pytest.mark.parametrize(
    "inner",
    [
        lambda: inner_chain(N.ReversibleSequential),
        lambda: inner_chain(N.Chain).inv,
        lambda: N.Chain(inner_chain(N.ReversibleSequential).inv, N.ActNorm(6)).inv,
    ],
    ids=["reversible", "inverted", "deeper"],
)
def test_chains_inside_drop_the_same_again(inner):
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert same_gradients([inner(), N.AffineCoupling(network(3, 6))], x)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("of", ["element", "channel"])
def test_glow_steps_among_the_layers(of, started):
    """In the forward that starts them from data, too."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    steps = N.GlowSteps(6, 2, 4, dropout=0.4, dropout_of=of)
    assert same_gradients([N.ActNorm(6), steps], x, started=started)


def test_the_backward_starts_nothing_from_data():
    """An inverted layer's inverse is the layer's own forward."""
    norm, x = moved(N.ActNorm(6)).double().train(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert same_gradients([norm.inv, N.AffineCoupling(network(3, 6))], x)
    before = copy.deepcopy(norm.state_dict())
    loss_of(N.ReversibleSequential(norm.inv)(x)).backward()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


class Double(nn.Module):
    def forward(self, v):
        return 2 * v


def test_parametrized_gains_and_matrices():
    coupling, conv = N.AffineCoupling(network(3, 6), learned_gain=3), N.InvertibleConv1x1(6, "full")
    parametrize.register_parametrization(coupling, "gain", Double())
    parametrize.register_parametrization(conv, "weight", Double())
    assert same_gradients([coupling, conv], torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


def test_frozen_parameters_of_a_functional_call_are_remembered():
    chain = users_chain().eval()
    for p in chain.layers[0].parameters():
        p.requires_grad_(False)
    others = {n: (1.1 * p).detach().requires_grad_(p.requires_grad) for n, p in chain.named_parameters()}
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (N.ReversibleSequential(*chain.layers), chain):
        loss = loss_of(torch.func.functional_call(module, others, (x,)))
        found.append(torch.autograd.grad(loss, [x, *(p for p in others.values() if p.requires_grad)]))
    assert relative_error(*found) < 1e-9


@pytest.mark.parametrize("what", ["frozen parameter", "lengths", "context"])
def test_what_is_written_before_the_backward_is_told(what):
    layers = N.ReversibleSequential(
        N.AffineCoupling(N.ConvConditioner(2, 4, 4, context_channels=1, dims=1)), N.ActNorm(4)
    )
    layers.eval()[1].bias.requires_grad_(False)
    lengths, context = torch.tensor([3, 5]), torch.randn(2, 1, 5)
    z, logdet = layers(torch.randn(2, 4, 5) * (torch.arange(5) < lengths[:, None])[:, None], context, lengths=lengths)
    written = {"frozen parameter": layers[1].bias, "lengths": lengths, "context": context}[what]
    written.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (z.sum() + logdet.sum()).backward()


@pytest.mark.parametrize("size", [4, 8], ids=["matrices", "convolutions"])
def test_autocast_around_the_backward_changes_nothing(size):
    _, reversible = (m.eval() for m in pair(steps(4, 12, 16, scale_map=FLOORED)))
    x, found = torch.randn(2, 12, size, size), []
    for enabled in (True, False):
        loss = loss_of(reversible(x))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss, [reversible.weight1, reversible.weight2, reversible.weight3]))
    assert relative_error(*found) < 1e-5


def test_memory_that_is_none_is_refused():
    with pytest.raises(ValueError, match="unknown memory 'half': expected 'stored' or 'reversible'"):
        N.GlowSteps(4, 1, 4, memory="half")


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_is_told_for_every_step_and_grows_from_the_output_on():
    torch.manual_seed(0)
    flow = moved(Glow((3, 16, 16), levels=2, steps=[3, 16], hidden=8, scale_map=FLOORED, memory="reversible"), 0.05)
    flow.train()
    found = N.drift(flow, torch.rand(4, 3, 16, 16))
    assert flow.training
    assert [len(errors) for errors in found.values()] == [3, 16]
    deep = next(reversed(found.values()))
    assert 0 < deep[-1] < deep[0] < 1e-3


def test_drift_of_a_chain_counts_its_layers_and_not_what_is_inside_them():
    chain = N.ReversibleSequential(N.ActNorm(4), N.Chain(N.InvertibleConv1x1(4), N.GlowSteps(4, 2, 3)))
    found = N.drift(chain, torch.randn(2, 4, 3, 3))
    assert list(found) == [""]
    assert len(found[""]) == 3
    assert max(found[""]) < 1e-5


class Doubled(N.AffineCoupling):
    """A user's subclass, whose forward is not the one that ``from_output`` was written for."""

    def forward(self, x, context=None, *, lengths=None):
        z, logdet = super().forward(x, context, lengths=lengths)
        return 2 * z, logdet + math.log(2) * x[0].numel()

    def inverse(self, z, context=None, *, lengths=None):
        x, logdet = super().inverse(z / 2, context, lengths=lengths)
        return x, logdet - math.log(2) * z[0].numel()


@pytest.mark.parametrize("how", ["subclass", "hook"])
def test_a_layer_that_was_made_something_else_is_inverted_and_run_again(how):
    kind = Doubled if how == "subclass" else N.AffineCoupling
    layers = [kind(network(2, 4)), N.LULinear(4)]
    chain = moved(N.Chain(*layers)).double().eval()
    if how == "hook":  # one that leaves the values alone, but not their gradients
        layers[0].register_forward_hook(lambda module, args, out: (out[0] - 0.5 * (out[0] - out[0].detach()), out[1]))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found, expected = (gradients(m, loss_of, x) for m in (N.ReversibleSequential(*layers), chain))
    assert relative_error(found, expected) < 1e-9
