"""Image flows and Glow ports that do something more than their look-alikes: what was proved must be all they do."""

import copy

import numpy as np
import pytest
import torch
from foreign import glow_ports as g
from torch import nn

import nfkernels
from nfkernels import accelerate
from nfkernels.integrations.swap import is_swapped


class ActNorm(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.bias, self.logs = (nn.Parameter(0.1 * torch.randn(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x):
        return (x + self.bias) * self.logs.exp(), self._count(x) * self.logs.sum()

    def _count(self, x):
        return x.shape[2] * x.shape[3]

    def reverse(self, z):
        return z * (-self.logs).exp() - self.bias


class Clamped(ActNorm):
    def forward(self, x):
        logs = self.logs.clamp(-1, 1)
        return (x + self.bias) * logs.exp(), self._count(x) * logs.sum()

    def reverse(self, z):
        return z * (-self.logs.clamp(-1, 1)).exp() - self.bias


class NoisyTraining(ActNorm):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class LateStart(ActNorm):
    """A flag of another name."""

    begun = False

    def forward(self, x):
        if self.training and not self.begun:
            self.begun = True
            with torch.no_grad():
                self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
        return super().forward(x)


class Branching(ActNorm):
    def forward(self, x):
        return super().forward(x / 2 if x.abs().max() > 8 else x)


class Keeping(ActNorm):
    def forward(self, x):
        y, self.logdet = super().forward(x)
        return y


class Number(ActNorm):
    def forward(self, x):
        y, logdet = super().forward(x)
        return y, logdet.item()


class OneSize(ActNorm):
    def _count(self, x):
        return 16


class OfTheBatch(ActNorm):
    def _count(self, x):
        return x.numel() // x.shape[1]


def _each(model, x):
    return [layer(x) for layer in model]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Clamped, NoisyTraining, LateStart, Branching, Keeping, Number, OneSize])
def test_look_alikes_that_do_more_are_kept(kind, training):
    model = nn.ModuleList([kind().double().train(training)])
    report = accelerate(model, torch.randn(4, 6, 4, 4, dtype=torch.float64), call=_each)
    assert [row.status for row in report] == ["kept"], str(report)


@pytest.mark.parametrize("kind", [ActNorm, OfTheBatch])
def test_one_row_is_no_proof_of_how_rows_count(kind):
    model = nn.ModuleList([kind()])
    plain = copy.deepcopy(model)
    assert accelerate(model, torch.randn(1, 6, 4, 4), call=_each).fused
    x = torch.randn(5, 6, 3, 7)
    torch.testing.assert_close(model[0](x), plain[0](x))


class LastAxis(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.randn(4)), nn.Parameter(0.1 * torch.randn(4))

    def forward(self, x):
        return (x + self.shift) * self.log_scale.exp(), self.log_scale.sum()

    def inverse(self, y):
        return y / self.log_scale.exp() - self.shift


def test_data_of_another_rank_goes_to_the_original():
    model = nn.ModuleList([LastAxis()])
    plain = copy.deepcopy(model)
    assert accelerate(model, torch.randn(8, 4), call=_each).fused
    for shape in ((8, 4, 4), (3, 4, 6, 4), (2, 3, 4), (4,)):
        x = torch.randn(shape)
        torch.testing.assert_close(model[0](x), plain[0](x))


# --- steps of a port --------------------------------------------------------------------------------------------------


class Step(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.actnorm, self.invconv = g.RoActNorm(channels), g.RoInvConv2d(channels)
        self.coupling = g.RoAffineCoupling(channels)

    def forward(self, x):
        x, a = self.actnorm(x)
        x, b = self.invconv(x)
        x, c = self.coupling(x)
        return x, a + b + c

    def reverse(self, z):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(z)))


class NoisyStep(Step):
    def forward(self, x):
        z, logdet = super().forward(x)
        return (z + 0.1 * torch.randn_like(z) if self.training else z), logdet


class BranchingStep(Step):
    def forward(self, x):
        return super().forward(x / 2 if x.abs().max() > 12 else x)


def _flow(*kinds):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(kind() for kind in kinds)), torch.randn(4, 8, 4, 4)
    _through(model, x)
    return model.eval(), x


def _through(model, x):
    total = 0
    for step in model:
        x, logdet = step(x)
        total = total + logdet
    return x, total


@pytest.mark.parametrize("kind", [NoisyStep, BranchingStep])
@pytest.mark.parametrize("options", [{"fuse": "steps"}, {"memory": "reversible"}], ids=str)
def test_a_step_that_does_more_has_its_layers_fused(kind, options):
    model, x = _flow(Step, kind, Step)
    plain = copy.deepcopy(model)
    report = accelerate(model, x, call=_through, **options)
    assert [is_swapped(step) for step in model] == [True, False, True], str(report)
    assert all(is_swapped(layer) for layer in (model[1].actnorm, model[1].coupling))
    assert "no steps" in next(row.reason for row in report if row.path == "1")
    outs = []
    for one in (plain, model):
        torch.manual_seed(3)
        outs.append(_through(one.train(), 3 * x))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_a_container_of_an_excluded_layer_is_kept():
    model, x = _flow(Step, Step)
    report = accelerate(model, x, call=_through, fuse="steps", exclude="1.actnorm")
    swapped = [is_swapped(m) for m in (model[0], model[1], model[1].actnorm, model[1].coupling)]
    assert swapped == [True, False, False, True]
    assert "excluded" in next(row.reason for row in report if row.path == "1")


def test_a_hook_put_on_since_gives_the_layers_back_to_be_fused():
    model, x = _flow(Step, Step)
    plain = copy.deepcopy(model)
    accelerate(model, x, call=_through, fuse="steps")
    calls = []
    model[0].invconv.register_forward_hook(lambda *_: calls.append(1))
    accelerate(model, x, call=_through, fuse="steps")
    assert is_swapped(model[0].actnorm)
    calls.clear()
    torch.testing.assert_close(_through(model, x), _through(plain, x), rtol=1e-4, atol=1e-4)
    assert calls == [1]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_run_that_fails_leaves_the_model_as_it_was(fails_at):
    model, x = _flow(Step, Step)
    classes, runs = [type(m) for m in model.modules()], []

    def call(model, x):
        runs.append(1)
        if len(runs) == fails_at:
            raise RuntimeError("no")
        return _through(model, x)

    with pytest.raises(ValueError, match="could not be run"):
        accelerate(model, x, call=call)
    assert [type(m) for m in model.modules()] == classes


def test_other_options_the_second_time_are_told_about():
    model, x = _flow(Step, Step)
    accelerate(model, x, call=_through, fuse="steps")
    assert "restore(model) first" in str(accelerate(model, x, call=_through, memory="reversible", channels_last=True))


def test_channels_last_leaves_the_first_batch_to_the_first_batch():
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    flows = [[*(nf.flows.GlowBlock(12, 8, split_mode="channel", scale=True) for _ in range(2)), nf.flows.Squeeze()]]
    model = nf.MultiscaleFlow([nf.distributions.DiagGaussian((12, 4, 4))], flows, [], class_cond=False)
    plain, x = copy.deepcopy(model), torch.rand(4, 3, 8, 8) * 3 + 1
    accelerate(model, (x, None), channels_last=True)
    torch.testing.assert_close(model.forward_kld(x), plain.forward_kld(x))
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected)


def test_a_scripted_part_is_left_alone():
    model = nn.Sequential(ActNorm(), torch.jit.script(nn.Sequential(nn.BatchNorm2d(6))))
    mean = dict(model[1].named_buffers())["0.running_mean"].clone()
    run = lambda m, x: m[1](m[0](x)[0])  # noqa: E731
    assert nfkernels.accelerate(model, torch.randn(4, 6, 3, 3) + 2, call=run).fused
    torch.testing.assert_close(dict(model[1].named_buffers())["0.running_mean"], mean)


# --- other values in place, as DistributedDataParallel copies the first rank's over the others' -----------------------


def _freia(seed):
    framework = pytest.importorskip("FrEIA.framework")
    modules = pytest.importorskip("FrEIA.modules")
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = framework.SequenceINN(8)
    for _ in range(2):
        model.append(modules.AllInOneBlock, subnet_constructor=nn.Linear)
    return model, lambda m, x: m(x)[0]


def _normflows(seed):
    nf = pytest.importorskip("normflows")
    torch.manual_seed(seed)
    np.random.seed(seed)
    flows = [
        layer
        for _ in range(2)
        for layer in (nf.flows.AffineCouplingBlock(nn.Linear(4, 8)), nf.flows.InvertibleAffine(8))
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(8), flows), lambda m, x: m.log_prob(x)


@pytest.mark.parametrize("make", [_freia, _normflows])
def test_permutations_copied_over_by_another_process(make):
    model, call = make(1)
    others, _ = make(2)
    x = torch.randn(8, 8)
    plain = copy.deepcopy(model)
    assert accelerate(model, x).fused
    call(model, x)
    for one in (model, plain):
        mine = [*one.parameters(), *one.buffers()]
        for t, other in zip(mine, [*others.parameters(), *others.buffers()], strict=True):
            t.detach().copy_(other)
    torch.testing.assert_close(call(model, x), call(plain, x), rtol=1e-4, atol=1e-4)
