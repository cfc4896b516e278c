"""Layers known by their structure: look-alikes are refused by numbers, ordinary modules are never touched."""

import copy

import pytest
import torch
from foreign import glow_port_cases, loss_of, speech_cases
from foreign import glow_ports as g
from foreign import speech_flows as s
from torch import nn
from torch.utils._pytree import tree_flatten

import nfkernels
from nfkernels.integrations import accelerate, registry
from nfkernels.integrations.swap import is_swapped

VARIANTS = [*glow_port_cases.VARIANTS, *speech_cases.VARIANTS]


def _report(module, *inputs, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        module(*inputs)
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return accelerate(module, inputs, **options)


def _leaves(out):
    return [t for t in tree_flatten(out)[0] if torch.is_tensor(t)]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_options_of_the_same_layers(case):
    torch.manual_seed(1)
    plain, inputs = case.make(), case.inputs()
    case.call(plain, *inputs)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.05 * torch.randn_like(p))
    fused = copy.deepcopy(plain)
    report = accelerate(fused, inputs, call=case.call)
    assert [row.status for row in report] == ["fused"], str(report)
    outs = []
    for module in (plain, fused):
        module.zero_grad()
        out = case.call(module, *inputs)
        loss_of(out).backward()
        back = case.inverse(module, out, *inputs) if case.inverse else ()
        outs.append((out, back, [p.grad for p in module.parameters()]))
    assert tree_flatten(outs[0])[1] == tree_flatten(outs[1])[1]
    for expected, got in zip(_leaves(outs[0]), _leaves(outs[1])):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- look-alikes: the same keys, another formula ----------------------------------------------------------------------


class OtherScale(g.RoAffineCoupling):
    """``eps`` beside the sigmoid, or an exp with a clamp that only large values reach."""

    def __init__(self, channels, scale):
        super().__init__(channels)
        self.of = scale

    def forward(self, input):
        a, b = input.chunk(2, 1)
        raw, t = self.net(a).chunk(2, 1)
        s = self.of(raw)
        return torch.cat([a, (b + t) * s], 1), s.log().flatten(1).sum(1)

    def reverse(self, output):
        a, b = output.chunk(2, 1)
        raw, t = self.net(a).chunk(2, 1)
        return torch.cat([a, b / self.of(raw) - t], 1)


class WrongWayBack(g.RoAffineCoupling):
    """Undone in the other order."""

    def reverse(self, output):
        a, b = output.chunk(2, 1)
        raw, t = self.net(a).chunk(2, 1)
        return torch.cat([a, (b - t) / torch.sigmoid(raw + 2)], 1)


class HalfTheLogdet(g.RoAffineCoupling):
    def forward(self, input):
        z, logdet = super().forward(input)
        return z, 0.5 * logdet


class NoGradientOfScale(g.RoAffineCoupling):
    """The same numbers, but its log-determinant is held fixed."""

    def forward(self, input):
        z, logdet = super().forward(input)
        return z, logdet.detach()


class OddChannels(g.RoAffineCoupling):
    """Every other channel passes through, where a half is expected."""

    def forward(self, input):
        a, b = input[:, 0::2], input[:, 1::2]
        raw, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(raw + 2)
        return torch.stack([a, (b + t) * s], 2).flatten(1, 2), s.log().flatten(1).sum(1)


class ShiftedNorm(g.RoActNorm):
    def forward(self, input):
        z, logdet = super().forward(input)
        return z + 1e-3, logdet


class SpatialNorm(g.FiActNorm):
    """Forgets that every position counts."""

    def forward(self, input, context=None):
        z, logdet = super().forward(input, context)
        return z, logdet / 3


class DoublePermuted(g.RoInvConv2dLU):
    """``P^T`` where ``P`` is expected."""

    def matrix(self):
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p.T @ (self.w_l * self.l_mask + self.l_eye) @ upper


class Unmasked(g.RoInvConv2dLU):
    """Forgets the mask of the lower factor, which is zero only at the start."""

    def matrix(self):
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p @ (self.w_l + self.l_eye) @ upper


class WrongSign(g.ChInvConv):
    """Adds on the way back what it added on the way there."""

    def forward(self, x, sldj, reverse=False):
        z, total = super().forward(x, sldj, reverse)
        return (z, 2 * sldj - total + 1e-2) if reverse else (z, total)


class UnmaskedAffine(s.VitsElementwiseAffine):
    def forward(self, x, x_mask, reverse=False, **kwargs):
        if reverse:
            return (x - self.m) * torch.exp(-self.logs)
        return self.m + torch.exp(self.logs) * x, (self.logs * x_mask).sum([1, 2])


class OtherPrescale(s.VitsConvFlow):
    """Divides by another width than it says."""

    def __init__(self):
        super().__init__(2, 6)
        self.filter_channels = 7

    def forward(self, x, x_mask, g=None, reverse=False):
        self.filter_channels = 9
        try:
            return super().forward(x, x_mask, g, reverse)
        finally:
            self.filter_channels = 7


def _images(channels=4):
    return (torch.randn(3, channels, 5, 4),)


def _sequence(channels):
    x = torch.randn(3, channels, 7)
    return x, torch.ones(3, 1, 7)


LOOK_ALIKES = {
    "sigmoid with another eps": (lambda: OtherScale(4, lambda r: torch.sigmoid(r + 2) + 1e-5), _images),
    "sigmoid with another offset": (lambda: OtherScale(4, lambda r: torch.sigmoid(r + 1.99)), _images),
    "exp clamped at 12": (lambda: OtherScale(4, lambda r: r.clamp(-12, 12).exp()), _images),
    "tanh of another range": (lambda: OtherScale(4, lambda r: (1.9 * torch.tanh(r)).exp()), _images),
    "another way back": (lambda: WrongWayBack(4), _images),
    "half the log-determinant": (lambda: HalfTheLogdet(4), _images),
    "no gradient of the log-determinant": (lambda: NoGradientOfScale(4), _images),
    "other channels": (lambda: OddChannels(4), _images),
    "a shift besides": (lambda: ShiftedNorm(4), _images),
    "positions miscounted": (lambda: SpatialNorm(4), _images),
    "a permutation transposed": (lambda: DoublePermuted(7), lambda: _images(7)),
    "a factor's mask forgotten": (lambda: Unmasked(4), _images),
    "a sign of the log-determinant": (lambda: WrongSign(4), lambda: (*_images(), torch.randn(3))),
    "another prescale": (OtherPrescale, lambda: _sequence(2)),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_kept(name):
    make, inputs = LOOK_ALIKES[name]
    torch.manual_seed(0)
    module = make()
    report = _report(module, *inputs())
    (row,) = report
    assert row.status == "kept"
    assert row.reason
    assert not is_swapped(module)


def test_a_forgotten_mask_is_its_own_form():
    """A mask of ones would hide whether it is used: the proof makes holes in it. What forgets it is still fused, as
    what it is."""
    module = UnmaskedAffine(2)
    x, ones = _sequence(2)
    _report(module, x, ones)
    holes = ones.clone()
    holes[..., 3:] = 0
    twin = copy.deepcopy(module)
    twin.__class__ = UnmaskedAffine
    for expected, got in zip(twin(x, holes), module(x, holes)):
        torch.testing.assert_close(got, expected)


# --- what is recognised -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return x + self.scale * self.net(x)


class LayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        return torch.layer_norm(x, x.shape[-1:], self.scale, self.bias)


class Projection(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))
        self.touched = False

    def __getattr__(self, name):
        if name == "inverse":
            raise AssertionError("recognition ran code of the module's")
        return super().__getattr__(name)

    def forward(self, x):
        return x @ self.weight


def test_ordinary_networks_have_no_flow_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), Residual(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), LayerNorm(4), Projection(4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
    )  # fmt: skip
    before = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert len(report) == 0
    assert [type(m) for m in model.modules()] == before


def test_our_own_layers_are_not_foreign():
    model = nn.Sequential(nfkernels.nn.ActNorm(4), nfkernels.nn.InvertibleConv1x1(4, "full"))
    assert all(registry.find(m) == (None, None) for m in model)


def test_without_a_proof_they_are_kept():
    module = g.RoInvConv2d(4)
    (row,) = accelerate(module, verify=False)
    assert row.status == "kept"
    assert "verify=True" in row.reason


def test_a_whole_port_of_glow():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.actnorm, self.invconv, self.coupling = g.RoActNorm(4), g.RoInvConv2dLU(4), g.RoAffineCoupling(4)

        def forward(self, x):
            x, a = self.actnorm(x)
            x, b = self.invconv(x)
            x, c = self.coupling(x)
            return x, a + b + c

        def reverse(self, z):
            return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(z)))

    module, (x,) = Flow(), _images()
    report = _report(module, x)
    assert [r.status for r in report] == ["fused"] * 3
    z, _ = module(x)
    torch.testing.assert_close(module.reverse(z), x, rtol=1e-4, atol=1e-4)


# --- starting from data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: g.RoActNorm(4), lambda: g.SvActNorm(4), lambda: g.FiActNorm(4), lambda: g.Y0ActNorm2d(4)]
)
def test_the_first_batch_starts_them_by_their_own_code(make):
    torch.manual_seed(0)
    plain = make()
    fused = copy.deepcopy(plain)
    x = 3 * torch.randn(5, 4, 6, 6) + 1
    report = accelerate(fused)
    for _ in range(2):
        expected, got = plain(x), fused(x)
    assert [r.status for r in report] == ["fused"]
    for a, b in zip(_leaves(expected), _leaves(got)):
        torch.testing.assert_close(b, a)
    for (name, a), (_, b) in zip(plain.state_dict().items(), fused.state_dict().items()):
        assert torch.equal(a, b), name


def test_data_far_from_zero_keeps_its_digits():
    """The shift is then added first, as the original does; nearer to zero both are as good, and one pass is faster."""
    torch.manual_seed(0)
    near, far = g.RoActNorm(4), g.RoActNorm(4)
    for module, offset in ((near, 1.0), (far, 3e4)):
        x = torch.randn(3, 4, 5, 5) + offset
        module(x)
        plain = copy.deepcopy(module)
        (row,) = accelerate(module, x)
        assert row.status == "fused"
        torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=1e-5, atol=1e-5)
    assert (type(near)._core.exact, type(far)._core.exact) == (False, True)


def test_a_state_that_has_not_started_starts_again():
    module = g.RoActNorm(4)
    fresh = copy.deepcopy(module.state_dict())
    x = 3 * torch.randn(5, 4, 6, 6) + 1
    assert _report(module, x).fused
    module.load_state_dict(fresh)
    z, _ = module(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert module.initialized
    torch.testing.assert_close(module(x)[0], z)


def test_a_plain_flag_may_be_set_back():
    module = s.GtActNorm(4)
    x, ones = _sequence(4)
    assert _report(module, x, ones).fused
    module.set_ddi(True)
    z, _ = module(3 * x + 1, ones)
    torch.testing.assert_close(z.mean((0, 2)), torch.zeros(4), atol=1e-5, rtol=0)
    assert module.initialized


# --- WaveGlow's traps -------------------------------------------------------------------------------------------------


def test_an_inverse_is_never_stale():
    torch.manual_seed(0)
    module = s.WgInvertible1x1Conv(4)
    x = torch.randn(3, 4, 7)
    module(x, reverse=True)  # keeps its inverse, with a graph
    report = accelerate(module, x)
    (row,) = report
    assert row.status == "fused"
    assert "stale" in row.reason
    with torch.no_grad():
        module.conv.weight.add_(0.2 * torch.randn_like(module.conv.weight))
    z, _ = module(x)
    torch.testing.assert_close(module(z, reverse=True), x, rtol=1e-4, atol=1e-4)


def test_a_negative_determinant_has_a_logarithm():
    torch.manual_seed(0)
    module = s.WgInvertible1x1Conv(4)
    with torch.no_grad():
        module.conv.weight[0] *= -1
    x = torch.randn(3, 4, 7)
    assert module(x)[1].isnan()
    (row,) = accelerate(module, x)
    assert row.status == "fused"
    assert "det W < 0" in row.reason
    expected = x.shape[0] * x.shape[2] * torch.linalg.slogdet(module.conv.weight.squeeze())[1]
    torch.testing.assert_close(module(x)[1], expected)


def test_buffers_that_are_no_permutation_are_refused():
    module = g.RoInvConv2dLU(4)
    module.w_p[0] *= 0.5
    (row,) = _report(module, *_images())
    assert row.status == "kept"
    assert "no permutation" in row.reason


def test_a_model_without_values_yet_is_kept():
    (row,) = accelerate(g.RoInvConv2dLU(4).to("meta"))
    assert row.status == "kept"
    assert "meta" in row.reason


def test_the_way_back_of_a_matrix_that_is_inverted_in_float32():
    """Where the original cannot run in float64 its own type is what is compared."""
    torch.manual_seed(0)
    plain, x, total = g.ChInvConv(4), torch.randn(3, 4, 5, 4), torch.randn(3)
    fused = copy.deepcopy(plain)
    (row,) = _report(fused, x, total)
    assert (row.status, row.reason) == ("fused", "")
    plain.load_state_dict(fused.state_dict())
    for expected, got in zip(plain(x, total, reverse=True), fused(x, total, reverse=True)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- calls unlike the one that was proved -----------------------------------------------------------------------------


def test_other_calls_go_to_the_original():
    module, (x,) = g.FiCoupling(4), _images()
    assert _report(module, x).fused
    with pytest.raises(RuntimeError):  # its network takes no context: the original says so
        module(x, context=torch.randn(3, 2, 5, 4))
    with pytest.raises(TypeError, match="unexpected"):
        module(x, nonsense=1)
    torch.testing.assert_close(module(input=x)[0], module(x)[0])


def test_a_hook_on_a_part_that_is_not_called_keeps_the_layer():
    module = s.WgInvertible1x1Conv(4)
    module.conv.register_forward_hook(lambda *_: None)
    (row,) = accelerate(module, torch.randn(3, 4, 7))
    assert row.status == "kept"
    assert "hook on conv" in row.reason
