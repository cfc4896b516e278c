"""accelerate by itself, on a layer made here: selection, proof, report, restore, and what it must leave alone."""

import copy
import os
import re
import sys

import pytest
import torch
from forked import Process
from torch import nn

import nfkernels
from nfkernels import accelerate, affine_coupling, restore
from nfkernels.integrations import Adapter, register
from nfkernels.integrations.swap import is_pending, is_swapped


class Coupled(nn.Module):
    """``x2 exp(s) + t`` of the second half, as somebody may have written it."""

    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        s, t = self.net(x[:, :2]).chunk(2, 1)
        return torch.cat([x[:, :2], x[:, 2:] * s.exp() + t], 1), s.sum(1)

    def inverse(self, z):
        s, t = self.net(z[:, :2]).chunk(2, 1)
        return torch.cat([z[:, :2], (z[:, 2:] - t) * (-s).exp()], 1), -s.sum(1)


OPTIONS = {"scale_map": "exp", "layout": "scale_shift", "identity": "first"}
ran = []


@register(Coupled)
class CoupledAdapter(Adapter):
    bypassed = ("aside",)

    def refuse(self, module):
        return "a width of 3" if module.net[0].out_features == 3 else None

    class Layer:
        def forward(self, x):
            self.calls += 1
            ran.append("forward")
            return affine_coupling(x, self.net(x[:, :2]), **OPTIONS)

        def inverse(self, z):
            return affine_coupling(z, self.net(z[:, :2]), inverse=True, **OPTIONS)


class Wrong(Coupled):
    """What the adapter below gets wrong, far from the start only."""

    def forward(self, x):
        s, t = self.net(x[:, :2]).chunk(2, 1)
        s = s.clamp(-3, 3)
        return torch.cat([x[:, :2], x[:, 2:] * s.exp() + t], 1), s.sum(1)

    def inverse(self, z):
        s, t = self.net(z[:, :2]).chunk(2, 1)
        s = s.clamp(-3, 3)
        return torch.cat([z[:, :2], (z[:, 2:] - t) * (-s).exp()], 1), -s.sum(1)


@register(Wrong)
class WrongAdapter(Adapter):
    Layer = CoupledAdapter.Layer

    def conditioners(self, module):
        return [module.net]


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return x, total


def _model(*layers):
    torch.manual_seed(0)
    return Model(*(layers or (Coupled(), Coupled())))


X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def test_fused_and_restored():
    model = _model()
    expected = model(X)
    report = accelerate(model, X)
    assert [row.status for row in report] == ["fused", "fused"]
    ran.clear()
    torch.testing.assert_close(model(X), expected)
    assert ran == ["forward", "forward"]
    assert restore(model) == 2
    assert [(row.status, row.reason) for row in report] == [
        ("kept", "restored, or changed to what cannot be fused")
    ] * 2
    assert [type(m) for m in model.layers] == [Coupled, Coupled]
    assert restore(model) == 0
    ran.clear()
    torch.testing.assert_close(model(X), expected)
    assert not ran


def test_the_run_on_example_inputs_leaves_no_trace():
    model = _model().train()
    model.layers[1].eval()
    model.layers[0].cached = 3
    torch.manual_seed(5)
    state, counts = torch.get_rng_state(), [int(m.calls) for m in model.layers]
    before = copy.deepcopy(model.state_dict())
    accelerate(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert [int(m.calls) for m in model.layers] == counts
    assert [m.training for m in model.modules()][:2] == [True, True]
    assert not model.layers[1].training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))
    assert all(p.grad is None for p in model.parameters())


def test_a_formula_that_differs_only_far_out_is_kept_with_what_differs():
    model = _model(Wrong(), Coupled())
    with torch.no_grad():
        model.layers[0].net[2].weight.zero_()
        model.layers[0].net[2].bias.zero_()
    report = accelerate(model, X)
    assert [row.status for row in report] == ["kept", "fused"]
    assert re.fullmatch(r"forward: .* differs from the original's by .* \(allowed .*\)", report.kept[0].reason)
    assert type(model.layers[0]) is Wrong


def test_the_proof_runs_the_networks_themselves_only_a_few_times():
    class Counted(nn.Linear):
        count = 0

        def forward(self, x):
            Counted.count += 1
            return super().forward(x)

    model = _model(Coupled())  # whose adapter does not name its conditioner
    model.layers[0].net = nn.Sequential(Counted(2, 4))
    accelerate(model, X)
    unnamed, Counted.count = Counted.count, 0
    model.layers[0].__class__ = Named
    assert accelerate(model, X).fused
    assert Counted.count <= 8 < unnamed


class Named(Coupled):
    pass


@register(Named)
class NamedAdapter(CoupledAdapter):
    def conditioners(self, module):
        return [module.net]


def test_dry_run_changes_nothing():
    model = _model()
    report = accelerate(model, X, dry_run=True)
    assert [row.status for row in report.fused] == ["fused"] * 2
    assert "dry run" in str(report)
    assert not any(is_swapped(m) for m in model.modules())
    assert [row.status for row in accelerate(model, dry_run=True)] == ["pending"] * 2
    assert not any(is_swapped(m) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"include": "layers.1"}, [1]),
        ({"include": "layers.*"}, [0, 1]),
        ({"exclude": "layers.0"}, [1]),
        ({"include": Coupled, "exclude": ["layers.1"]}, [0]),
        ({"include": "Coupled"}, [0, 1]),
        ({"include": lambda path, module: path.endswith("0")}, [0]),
    ],
)
def test_selection(options, fused):
    model = _model()
    report = accelerate(model, X, **options)
    assert [i for i, m in enumerate(model.layers) if is_swapped(m)] == fused
    assert all("not asked for" in row.reason for row in report.kept)


def test_layers_never_called_are_inactive():
    model = _model()
    model.spare = Coupled()
    report = accelerate(model, X)
    assert [row.path for row in report.inactive] == ["spare"]
    assert not is_swapped(model.spare)


def test_shared_layers_stay_shared():
    layer = Coupled()
    model = _model(layer, layer)
    report = accelerate(model, X)
    assert len(report) == 1
    assert model.layers[0] is model.layers[1]
    assert is_swapped(layer)


def test_what_is_kept_and_why():
    class Renamed(Coupled):
        pass

    class Changed(Coupled):
        def forward(self, x):
            return super().forward(x)

    patched, hooked = Coupled(), Coupled()
    patched.forward = lambda x: Coupled.forward(patched, x)
    hooked.aside = nn.Linear(2, 2)
    hooked.aside.register_forward_hook(lambda *_: None)
    model = _model(Renamed(), Changed(), patched, hooked, Coupled(3))
    report = accelerate(model, X)
    assert [row.status for row in report] == ["fused", "kept", "kept", "kept", "kept"]
    reasons = [row.reason for row in report.kept]
    assert reasons[0] == "subclass: Changed overrides forward of Coupled"
    assert reasons[1] == "its forward has been replaced on the instance"
    assert reasons[2] == "a hook on aside, which the fused layer does not call"
    assert reasons[3] == "a width of 3"


def test_parametrized_layers_are_fused():
    model = _model()
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].net[0])
    expected = model(X)
    assert len(accelerate(model, X).fused) == 2
    torch.testing.assert_close(model(X), expected)


def test_parametrized_after_it_was_fused():
    model = _model()
    accelerate(model, X)
    layer = model.layers[0]
    layer.gain = nn.Parameter(torch.ones(2))
    torch.nn.utils.parametrize.register_parametrization(layer, "gain", nn.Identity())
    assert is_swapped(layer)
    expected = model(X)
    assert is_swapped(copy.deepcopy(layer))
    assert restore(model) == 2
    assert not is_swapped(layer)
    assert isinstance(layer, Coupled)
    assert torch.nn.utils.parametrize.is_parametrized(layer, "gain")
    torch.testing.assert_close(model(X), expected)


def test_without_example_inputs_the_first_call_proves():
    model = _model(Coupled(), Wrong())
    with torch.no_grad():
        expected = model(X)
    report = accelerate(model)
    assert [row.status for row in report] == ["pending", "pending"]
    assert "proved at first call" in str(report)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.testing.assert_close(model(X), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.status for row in report] == ["fused", "kept"]
    assert type(model.layers[1]) is Wrong
    assert accelerate(model).rows[0].reason == "already"


def test_a_pending_layer_waits_where_it_cannot_be_proved():
    model = _model()
    report = accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model.__class__.forward(copy.deepcopy(model), X))
    rows = torch.vmap(lambda x: model.layers[0].inverse(x[None])[0])(X)
    assert rows.shape == (9, 1, 4)
    assert is_pending(model.layers[0])
    model(X)
    assert len(report.fused) == 2


def test_restored_while_pending():
    model = _model()
    report = accelerate(model)
    assert restore(model) == 2
    assert [(row.status, row.reason) for row in report] == [("kept", "restored")] * 2


def test_unverified():
    model = _model(Wrong())
    assert len(accelerate(model, verify=False).fused) == 1
    assert is_swapped(model.layers[0])


def test_a_pending_model_is_copied_and_pickled_as_what_it_is():
    import pickle

    model = _model()
    accelerate(model)
    assert is_pending(copy.deepcopy(model).layers[0])
    assert type(copy.copy(model.layers[0])) is type(model.layers[0])
    assert type(pickle.loads(pickle.dumps(model)).layers[0]) is Coupled


def test_gradient_checkpointing_and_ema_and_optimizers_see_nothing():
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    accelerate(model, X)
    z, logdet = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
    (z.square().sum() - logdet.sum()).backward()
    optimizer.step()
    average.update_parameters(model)
    torch.testing.assert_close(average(X)[0], model(X)[0])


def test_the_report_as_text():
    report = accelerate(_model(Coupled(), Coupled(3)), X)
    assert str(report).splitlines() == [
        "Model: 1 fused, 1 kept as they are",
        "layer     class    status  why",
        "layers.0  Coupled  fused",
        "layers.1  Coupled  kept    a width of 3",
    ]
    assert str(accelerate(nn.Linear(2, 2))) == "Linear: no flow layer found"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: accelerate(3), TypeError, "accelerate expects a torch.nn.Module, got int"),
        (lambda: restore(None), TypeError, "restore expects a torch.nn.Module, got NoneType"),
        (
            lambda: accelerate(_model(), X, include="layer.*"),
            ValueError,
            "include='layer.*' matches no module of Model",
        ),
        (lambda: accelerate(_model(), X, exclude=3), TypeError, "exclude expects globs, classes or functions"),
        (lambda: accelerate(_model(), X[:, :1]), ValueError, r"Model could not be run on the example inputs \(Tensor"),
        (lambda: accelerate(_model(), X, call="log_prob"), ValueError, "Model could not be run on the example inputs"),
        (lambda: register("a.B")(Coupled), TypeError, "register expects a subclass of Adapter with a Layer"),
    ],
)
def test_mistakes_are_told(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nothing_is_swapped_when_the_model_cannot_be_run():
    model = _model()
    with pytest.raises(ValueError):
        accelerate(model, torch.randn(2, 1))
    assert [type(m) for m in model.layers] == [Coupled, Coupled]


def test_a_model_that_differs_as_a_whole_is_left_as_it_was(monkeypatch):
    """Layers that agree by themselves and not together: here, one that looks at its neighbour's class."""

    class Nosy(Model):
        def forward(self, x):
            z, logdet = super().forward(x)
            return z + is_swapped(self.layers[0]), logdet

    torch.manual_seed(0)
    model = Nosy(Coupled())
    report = accelerate(model, X)
    assert [row.status for row in report] == ["kept"]
    assert "whole model" in str(report)
    assert type(model.layers[0]) is Coupled


def test_example_inputs_run_through_call():
    model = _model()
    report = accelerate(model, X, call=lambda m, x: m.layers[1].inverse(x))
    assert [row.status for row in report] == ["inactive", "fused"]
    assert len(accelerate(model, {"x": X}, call=lambda m, given: m(**given)).fused) == 2


def test_exported_at_the_top():
    assert nfkernels.accelerate is accelerate
    assert "accelerate" in nfkernels.__all__


def _replicas_gradients(rank, fused):
    model = _model()
    if fused:
        accelerate(model, X)
    replica = nn.parallel.DistributedDataParallel(model)
    z, logdet = replica(X[rank::2][:4])
    (z.square().sum() - logdet.sum()).backward()
    return [p.grad.clone() for p in model.parameters()]


def _worker(rank, store, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # The replicas go before the group does: the last reference to it, from a replica, would wait for threads that wait.
    results = [_replicas_gradients(rank, fused) for fused in (False, True)]
    if rank == 0:
        torch.save(results, path)
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    code = "import sys, test_accelerate; test_accelerate._worker(int(sys.argv[1]), *sys.argv[2:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    given = [str(tmp_path / "store"), str(tmp_path / "grads")]
    ranks = [Process(["-c", code, str(rank), *given], env=environment) for rank in range(2)]
    for rank in ranks:
        _, told = rank.communicate(100)
        assert rank.returncode == 0, told
    plain, fused = torch.load(tmp_path / "grads", weights_only=True)
    torch.testing.assert_close(fused, plain)


class Wrapped(nn.Module):
    """A layer that hands on to another one, which the adapter below spares it; its buffer picks the formula."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.coupled = Coupled()
        self.inner.register_buffer("twice", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        z, logdet = self.inner.coupled(x)
        return (z + z, logdet) if self.inner.twice else (z, logdet)


@register(Wrapped)
class WrappedAdapter(Adapter):
    class Layer:
        def forward(self, x):
            z, logdet = affine_coupling(x, self.inner.coupled.net(x[:, :2]), **OPTIONS)
            return z, logdet

    class Twice:
        def forward(self, x):
            z, logdet = affine_coupling(x, self.inner.coupled.net(x[:, :2]), **OPTIONS)
            return z + z, logdet

    def layer(self, module):
        return self.Twice if bool(module.inner.twice) else self.Layer

    def parts(self, module):
        return [module.inner.coupled]


def test_parts_of_a_fused_layer_share_its_fate():
    for inputs in (X, None):
        model = _model(Wrapped())
        expected = model(X)
        report = accelerate(model, inputs)
        torch.testing.assert_close(model(X), expected)
        assert [(row.path, row.status) for row in report] == [
            ("layers.0", "fused"),
            ("layers.0.inner.coupled", "fused"),
        ]
        assert report.rows[1].reason == "as a part of layers.0"
        assert not is_swapped(model.layers[0].inner.coupled)
        assert restore(model) == 1


def test_a_hook_on_a_part_keeps_the_whole_and_frees_the_part():
    model = _model(Wrapped())
    model.layers[0].inner.coupled.register_forward_hook(lambda *_: None)
    report = accelerate(model, X)
    assert [row.status for row in report] == ["kept", "fused"]
    assert report.rows[0].reason == "a hook on inner.coupled, which the fused layer does not call"


def test_what_submodules_load_is_looked_at_once_they_are_loaded():
    model, other = _model(Wrapped()), _model(Wrapped())
    other.layers[0].inner.twice.fill_(True)
    expected = other(X)
    accelerate(model, X)
    hooks = dict(model.layers[0]._load_state_dict_post_hooks)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(X), expected)
    assert is_swapped(model.layers[0])
    assert model.layers[0]._load_state_dict_post_hooks == hooks
