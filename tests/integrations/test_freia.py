"""FrEIA: what is kept and why, whole models of its containers, its call's habits, the block under other names."""

import copy
import inspect
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nfkernels.integrations import accelerate, restore
from nfkernels.integrations.swap import is_swapped

pytest.importorskip("FrEIA", reason="FrEIA is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm
    from FrEIA.modules import all_in_one_block


def linear(inside, outside):
    return nn.Sequential(nn.Linear(inside, 8), nn.ReLU(), nn.Linear(8, outside))


def conv(inside, outside, kernel=3):
    return nn.Sequential(nn.Conv2d(inside, 6, kernel, padding="same"), nn.ReLU(), nn.Conv2d(6, outside, 1))


def seeded(make):
    torch.manual_seed(0)
    np.random.seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def status(model, *inputs, **options):
    report = accelerate(model, inputs or None, **options)
    return {row.path: (row.status, row.reason) for row in report}


def compare(plain, fused, *args, **options):
    """Both calls' tensors agree, and the gradients of all parameters."""
    results = []
    for model in (plain, fused):
        out, logdet = model(*args, **options)
        total = sum(o.square().sum() for o in (out if isinstance(out, (tuple, list)) else [out])) - logdet.sum()
        wanted = [p for p in model.parameters() if p.requires_grad]
        results.append((out, logdet, torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
    return results[1][:2]


def fastflow(channels=6, steps=8):
    flow = Ff.SequenceINN(channels, 4, 5)
    for k in range(steps):
        net = (lambda i, o: conv(i, o, 1)) if k % 2 else conv
        flow.append(Fm.AllInOneBlock, subnet_constructor=net, affine_clamping=2.0, permute_soft=False)
    return flow


def cflow():
    flow = Ff.SequenceINN(10)
    for _ in range(8):
        flow.append(
            Fm.AllInOneBlock, cond=0, cond_shape=(4,), subnet_constructor=linear, affine_clamping=1.9,
            global_affine_type="SOFTPLUS", permute_soft=True,
        )  # fmt: skip
    return flow


def test_a_fastflow_both_ways():
    plain = seeded(fastflow)
    fused, x = copy.deepcopy(plain), torch.randn(3, 6, 4, 5)
    found = status(fused, x)
    assert found[""] == ("kept", "a container: its layers are what is fused")
    assert [found[f"module_list.{k}"][0] for k in range(8)] == ["fused"] * 8
    z, logdet = compare(plain, fused, x)
    assert logdet.shape == (3,)
    back, inverse = compare(plain, fused, z.detach(), rev=True)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverse, -logdet, rtol=1e-3, atol=1e-3)
    compare(plain, fused, x, jac=False)
    assert restore(fused) == 8


def test_a_conditional_cflow():
    plain = seeded(cflow)
    fused, x, c = copy.deepcopy(plain), torch.randn(7, 10), torch.randn(7, 4)
    found = status(fused, x, [c])
    assert sum(s == "fused" for s, _ in found.values()) == 8
    z, _ = compare(plain, fused, x, [c])
    compare(plain, fused, z.detach(), [c], rev=True)


def test_a_graph_with_a_split():
    def make():
        first = Ff.InputNode(4, 4, 4, name="image")
        condition = Ff.ConditionNode(2, 2, 2)
        nodes = [first, Ff.Node(first, Fm.IRevNetDownsampling, {})]
        nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": 3}))
        nodes.append(Ff.Node(nodes[-1], Fm.Split, {"section_sizes": [6, 10]}))
        split = nodes[-1]
        options = {"subnet_constructor": conv, "clamp": 1.2}
        nodes.append(Ff.Node(split.out0, Fm.GLOWCouplingBlock, options, conditions=condition))
        nodes.append(Ff.OutputNode(nodes[-1]))
        nodes.append(Ff.Node(split.out1, Fm.GINCouplingBlock, options))
        nodes.append(Ff.OutputNode(nodes[-1]))
        return Ff.GraphINN([*nodes, condition])

    plain = seeded(make)
    fused, x, c = copy.deepcopy(plain), torch.randn(3, 4, 4, 4), torch.randn(3, 2, 2, 2)
    found = {type(fused.get_submodule(p)).__name__: s for p, s in status(fused, x, [c]).items()}
    assert {n for n, (s, _) in found.items() if s == "fused"} == {
        "IRevNetDownsampling", "PermuteRandom", "GLOWCouplingBlock"
    }  # fmt: skip
    assert "centred" in found["GINCouplingBlock"][1]
    z, _ = compare(plain, fused, x, [c])
    back, _ = compare(plain, fused, [t.detach() for t in z], [c], rev=True)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_hooks_and_in_place_networks():
    def net(inside, outside):
        return nn.Sequential(nn.Conv2d(inside, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, outside, 1))

    fused = seeded(lambda: Fm.AllInOneBlock([(4, 3, 3)], subnet_constructor=net))
    plain, x = copy.deepcopy(fused), torch.randn(2, 4, 3, 3)
    assert status(fused, (x,))[""][0] == "fused"
    seen = []
    fused.subnet[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fused.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    compare(plain, fused, (x.requires_grad_(),))
    assert seen == [(2, 4, 3, 3), 2]


def test_actnorm_waits_for_its_first_batch():
    torch.manual_seed(0)
    plain = Fm.ActNorm([(3, 2, 2)])
    fused, x = copy.deepcopy(plain), 3 * torch.randn(9, 3, 2, 2) + 1
    report = accelerate(fused)
    assert report.rows[0].status == "pending"
    torch.testing.assert_close(fused((x,)), plain((x,)))  # the original's own code starts it
    assert report.rows[0].status == "pending"
    torch.testing.assert_close(fused((x,)), plain((x,)))
    assert report.rows[0].status == "fused"
    torch.testing.assert_close(fused((x,), rev=True), plain((x,), rev=True))
    fused.init_on_next_batch = plain.init_on_next_batch = True  # what some do to start it anew
    torch.testing.assert_close(fused((2 * x,)), plain((2 * x,)))
    torch.testing.assert_close(fused.scale, plain.scale)
    fresh = Fm.ActNorm([(3, 2, 2)])
    fresh.load_state_dict(fused.state_dict())
    assert not fresh.init_on_next_batch


def test_a_clamp_changed_afterwards_is_followed():
    fused = seeded(lambda: Fm.AllInOneBlock([(4, 3, 3)], subnet_constructor=conv))
    plain, x = copy.deepcopy(fused), torch.randn(2, 4, 3, 3)
    accelerate(fused, ((x,),))
    plain.clamp = fused.clamp = 0.3
    compare(plain, fused, (x,))


def own_clamp(u):
    return torch.tanh(u)


def glow(**options):
    return Fm.GLOWCouplingBlock([(4,)], subnet_constructor=linear, **options)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: glow(clamp_activation=own_clamp), "of the user's own"),
        (lambda: glow(clamp=0.0), "clamp=0.0"),
        (lambda: glow(split_len=0), "one side empty"),
        (lambda: Fm.NICECouplingBlock([(4,)], subnet_constructor=linear), "nothing to fuse"),
        (lambda: Fm.IRevNetDownsampling([(4, 2, 2)], legacy_backend=True), "legacy_backend=True"),
        (lambda: Fm.HaarDownsampling([(4, 2, 2)]), "no adapter for FrEIA.modules.reshapes.HaarDownsampling"),
    ],
)
def test_kept_with_a_reason(make, reason):
    model = make()
    found = status(model)[""]
    assert found[0] == "kept"
    assert reason in found[1]
    assert not is_swapped(model)


def test_a_subclass_that_changes_the_scale_is_kept():
    class Own(Fm.AllInOneBlock):
        def _affine(self, x, a, rev=False):
            return super()._affine(x, 2 * a, rev)

    assert "overrides _affine" in status(Own([(4,)], subnet_constructor=linear))[""][1]


@pytest.mark.parametrize("hard", [True, False])
def test_a_permutation_that_was_loaded_is_looked_at_again(hard):
    def block(soft):
        return Fm.AllInOneBlock([(5, 3, 3)], subnet_constructor=conv, permute_soft=soft)

    fused = seeded(lambda: block(not hard))
    other, x = block(hard if not hard else False), torch.randn(2, 5, 3, 3)
    accelerate(fused, ((x,),))
    fused.load_state_dict(other.state_dict())
    compare(other, fused, (x,))


def elsewhere(replace=()):
    """The block as another package keeps it: the same code in a module that no adapter names."""
    source = inspect.getsource(all_in_one_block)
    for old, new in replace:
        assert old in source
        source = source.replace(old, new)
    module = types.ModuleType("FrEIA.modules.copied")
    module.__package__ = "FrEIA.modules"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(source, "copied", "exec"), module.__dict__)
    sys.modules.setdefault(module.__name__, module)
    return module.AllInOneBlock


DIVIDED = [("torch.tanh(a[:, :ch])", "torch.tanh(a[:, :ch] / self.clamp)")]
OUT_OF_PLACE = [("a *= 0.1", "a = a * 0.1"), ("log_jac_det += ", "log_jac_det = log_jac_det + ")]
OTHER = [("torch.tanh(a[:, :ch])", "torch.atan(a[:, :ch])")]
HALVED = [("a *= 0.1", "a *= 0.05")]


@pytest.mark.parametrize("gin", [False, True])
@pytest.mark.parametrize("replace", [[], OUT_OF_PLACE, DIVIDED], ids=["same", "out of place", "divided"])
def test_the_block_under_another_name_is_proved(replace, gin):
    cls = elsewhere(replace)
    plain = seeded(lambda: cls([(5, 3, 3)], subnet_constructor=conv, affine_clamping=1.3, gin_block=gin))
    fused, x = copy.deepcopy(plain), torch.randn(3, 5, 3, 3)
    assert status(copy.deepcopy(plain), verify=False)[""][0] == "kept"
    assert status(fused, (x,))[""][0] == "fused"
    compare(plain, fused, (x,))
    compare(plain, fused, (x,), rev=True)


@pytest.mark.parametrize("replace", [OTHER, HALVED], ids=["another map", "another factor"])
def test_another_formula_is_kept(replace):
    model = seeded(lambda: elsewhere(replace)([(5, 3, 3)], subnet_constructor=conv))
    assert status(model, (torch.randn(3, 5, 3, 3),))[""][0] == "kept"
    assert not is_swapped(model)
