"""Containers run as steps: Glow of normflows and of ports; without stored activations; channels-last networks."""

import copy
import importlib.util
import io
import warnings

import pytest
import torch
from torch import nn

from nfkernels.integrations import accelerate, restore
from nfkernels.integrations.steps import parts as steps_parts
from nfkernels.integrations.swap import is_pending, is_swapped, original_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu")
needs_normflows = pytest.mark.skipif(importlib.util.find_spec("normflows") is None, reason="normflows is not installed")
STEPS, REVERSIBLE = {"fuse": "steps"}, {"memory": "reversible"}
MODES = pytest.mark.parametrize("mode", [STEPS, REVERSIBLE], ids=["steps", "reversible"])


# --- the fixtures -----------------------------------------------------------------------------------------------------


class PortActNorm(nn.Module):
    """``scale (x + loc)``, the scale raw; the first batch sets both."""

    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, input):
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-input.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (input.std((0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        pixels = input.shape[2] * input.shape[3]
        return self.scale * (input + self.loc), pixels * torch.log(self.scale.abs()).sum()

    def reverse(self, output):
        return output / self.scale - self.loc


class PortInvConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(channels, channels))
        self.weight = nn.Parameter(q[:, :, None, None])

    def forward(self, input):
        logdet = input.shape[2] * input.shape[3] * torch.slogdet(self.weight[..., 0, 0].double())[1]
        return nn.functional.conv2d(input, self.weight), logdet.to(input.dtype)

    def reverse(self, output):
        return nn.functional.conv2d(output, torch.linalg.inv(self.weight[..., 0, 0])[..., None, None])


class PortInvConvLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        p, low, up = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        s = up.diag()
        self.register_buffer("w_p", p)
        self.register_buffer("u_mask", torch.triu(torch.ones_like(up), 1))
        self.register_buffer("l_mask", torch.tril(torch.ones_like(up), -1))
        self.register_buffer("s_sign", s.sign())
        self.register_buffer("l_eye", torch.eye(channels))
        self.w_l, self.w_u = nn.Parameter(low), nn.Parameter(torch.triu(up, 1))
        self.w_s = nn.Parameter(s.abs().log())

    def matrix(self):
        low = self.w_l * self.l_mask + self.l_eye
        return self.w_p @ low @ (self.w_u * self.u_mask + torch.diag(self.s_sign * torch.exp(self.w_s)))

    def forward(self, input):
        return nn.functional.conv2d(input, self.matrix()[..., None, None]), input[0, 0].numel() * self.w_s.sum()

    def reverse(self, output):
        return nn.functional.conv2d(output, torch.linalg.inv(self.matrix())[..., None, None])


class PortCoupling(nn.Module):
    def __init__(self, channels, affine):
        super().__init__()
        self.affine = affine
        last = nn.Conv2d(6, channels if affine else channels // 2, 3, padding=1)
        self.net = nn.Sequential(nn.Conv2d(channels // 2, 6, 3, padding=1), nn.ReLU(), last)

    def forward(self, input):
        a, b = input.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b + self.net(a)], 1), None
        log_s, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([a, (b + t) * s], 1), torch.log(s).flatten(1).sum(1)

    def reverse(self, output):
        a, b = output.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b - self.net(a)], 1)
        log_s, t = self.net(a).chunk(2, 1)
        return torch.cat([a, b / torch.sigmoid(log_s + 2) - t], 1)


class PortFlow(nn.Module):
    def __init__(self, channels, affine=True, lu=True):
        super().__init__()
        self.actnorm = PortActNorm(channels)
        self.invconv = PortInvConvLU(channels) if lu else PortInvConv(channels)
        self.coupling = PortCoupling(channels, affine)

    def forward(self, input):
        out, logdet = self.actnorm(input)
        out, more = self.invconv(out)
        out, last = self.coupling(out)
        logdet = logdet + more
        return out, logdet if last is None else logdet + last

    def reverse(self, output):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(output)))


class Levels(nn.Module):
    """A block of a port: a loop over its steps."""

    def __init__(self, *flows):
        super().__init__()
        self.flows = nn.ModuleList(flows)

    def forward(self, x):
        total = 0
        for flow in self.flows:
            x, logdet = flow(x)
            total = total + logdet
        return x, total


def glow(steps=2, levels=2, hidden=4, channels=1, class_cond=False, **options):
    import normflows as nf

    bases, flows, merges = [], [], []
    for i in range(levels):
        of_level = [nf.flows.GlowBlock(channels * 2 ** (levels + 1 - i), hidden, **options) for _ in range(steps)]
        flows.append([*of_level, nf.flows.Squeeze()])
        side = 8 // 2 ** (levels - i) if i else 8 // 2**levels
        shape = (channels * 2 ** (levels - i) if i else channels * 2 ** (levels + 1), side, side)
        bases.append(
            nf.distributions.ClassCondDiagGaussian(shape, 3) if class_cond else nf.distributions.DiagGaussian(shape)
        )
        merges += [nf.flows.Merge()] if i else []
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=class_cond)


def images(batch=3, channels=1, dtype=torch.float32, seed=1):
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(module, seed=2):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))
    return module


def started(make, *inputs, dtype=torch.float32):
    torch.manual_seed(0)
    model = make().to(dtype)
    (model.log_prob if hasattr(model, "log_prob") else model)(*inputs)
    return moved(model)


_made = {}


def both(make, mode, *inputs, dtype=torch.float64):
    """The model as it was, and accelerated with a proof on its inputs; those of plain models are made once."""
    key = (make, tuple(mode), dtype, len(inputs[0])) if make is glow else None
    if key is None or key not in _made:
        made = _both(make, mode, *inputs, dtype=dtype)
        if key is None:
            return made
        _made[key] = made
    return copy.deepcopy(_made[key])


def _both(make, mode, *inputs, dtype):
    model = started(make, *inputs, dtype=dtype)
    twin = copy.deepcopy(model)
    report = accelerate(twin, inputs, **mode)
    assert any(row.told == "fused (steps)" for row in report), report
    return model, twin


def gradients_of(model, value):
    model.zero_grad()
    value.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same(got, expected, tolerance):
    for name, e in expected.items():
        assert (got[name] is None) == (e is None), name
        if e is not None:
            torch.testing.assert_close(got[name], e, rtol=0, atol=tolerance * (1 + float(e.abs().max())), msg=name)


VARIANTS = {
    "lu": {},
    "whole matrices": {"use_lu": False},
    "additive": {"scale": False},
    "exp": {"scale_map": "exp"},
    "sigmoid_inv": {"scale_map": "sigmoid_inv"},
    "second half": {"split_mode": "channel_inv"},
    "actnorm in the networks": {"net_actnorm": True},
    "leaky, not zero": {"leaky": 0.1, "init_zeros": False},
}


# --- values -----------------------------------------------------------------------------------------------------------


@needs_normflows
@MODES
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_multiscale_glow_computes_the_same_both_ways(mode, options):
    x = images(dtype=torch.float64)
    if mode is STEPS:
        model, twin = both(lambda: glow(**options), mode, x, None)
    else:
        model = started(lambda: glow(**options), x, None, dtype=torch.float64)
        twin = copy.deepcopy(model)
        assert accelerate(twin, verify=False, **mode).rows[0].told == "fused (steps)"
    expected, got = model.log_prob(x, None), twin.log_prob(x, None)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)
    same(gradients_of(twin, -got.mean()), gradients_of(model, -expected.mean()), 1e-9)
    (zs, up), (zs_, up_) = twin.inverse_and_log_det(x), model.inverse_and_log_det(x)
    for z, z_ in zip([*zs, up], [*zs_, up_], strict=True):
        torch.testing.assert_close(z, z_, rtol=1e-10, atol=1e-9)
    back, down = twin.forward_and_log_det(zs)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(down, -up, rtol=1e-9, atol=1e-8)
    torch.manual_seed(3)
    drawn = model.sample(2)
    torch.manual_seed(3)
    for a, b in zip(twin.sample(2), drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@needs_normflows
@MODES
def test_gradients_of_the_way_to_the_data(mode):
    x = images(dtype=torch.float64)
    model, twin = both(glow, mode, x, None)
    zs = [z.detach() for z in model.inverse_and_log_det(x)[0]]
    found = []
    for m in (twin, model):
        inputs = [z.clone().requires_grad_() for z in zs]
        out, logdet = m.forward_and_log_det(inputs)
        found.append(
            gradients_of(m, (out * x).sum() + logdet.square().sum()) | {str(i): z.grad for i, z in enumerate(inputs)}
        )
    same(*found, 1e-9)


@needs_normflows
@MODES
def test_class_conditions_and_float32(mode):
    x, y = images(), torch.tensor([0, 2, 1])
    model, twin = both(lambda: glow(class_cond=True), mode, x, y, dtype=torch.float32)
    expected, got = model(x, y), twin(x, y)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
    same(gradients_of(twin, got.mean()), gradients_of(model, expected.mean()), 1e-4)
    torch.testing.assert_close(twin.forward_kld(x, y), model.forward_kld(x, y), rtol=1e-5, atol=1e-3)


@needs_normflows
@MODES
def test_a_flow_with_one_list_of_layers(mode):
    import normflows as nf

    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)

    def make():
        layers = [nf.flows.GlowBlock(5, 6, init_zeros=False) for _ in range(2)]
        # Layers by themselves are steps as well as those of a block; what comes last for data is no whole step.
        net = nf.nets.ConvNet2d((3, 6, 6, 4), (3, 1, 3), init_zeros=False)
        own = [nf.flows.AffineCouplingBlock(net), nf.flows.Invertible1x1Conv(5, True), nf.flows.ActNorm((5, 1, 1))]
        return nf.NormalizingFlow(
            nf.distributions.DiagGaussian((5, 4, 4)), [nf.flows.ActNorm((5, 1, 1)), *layers, *own]
        )

    model, twin = both(make, mode, x)
    expected, got = model.log_prob(x), twin.log_prob(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)
    same(gradients_of(twin, got.sum()), gradients_of(model, expected.sum()), 1e-9)
    torch.testing.assert_close(twin(twin.inverse(x)), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(twin.forward_kld(x), model.forward_kld(x), rtol=1e-5, atol=1e-5)


@needs_normflows
@MODES
def test_a_block_by_itself(mode):
    import normflows as nf

    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    make = lambda: nf.flows.GlowBlock(5, 6)  # noqa: E731
    model, twin = both(make, mode, x)
    for method in ("forward", "inverse"):
        for a, b in zip(getattr(twin, method)(x), getattr(model, method)(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@MODES
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])
@pytest.mark.parametrize("lu", [True, False], ids=["lu", "whole"])
def test_steps_of_a_port_are_known_by_their_structure(mode, affine, lu):
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    model, twin = both(lambda: Levels(PortFlow(4, affine, lu), PortFlow(4, affine, lu)), mode, x)
    assert all(is_swapped(flow) for flow in twin.flows)
    expected, got = model(x), twin(x)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    losses = [(z * z).sum() + logdet.sum() for z, logdet in (got, expected)]
    same(gradients_of(twin, losses[0]), gradients_of(model, losses[1]), 1e-10)
    torch.testing.assert_close(twin.flows[1].reverse(x), model.flows[1].reverse(x), rtol=1e-10, atol=1e-10)


def test_a_port_that_computes_something_else_is_kept():
    class Other(PortCoupling):
        def forward(self, input):
            out, logdet = super().forward(input)
            return out + 0.01, logdet

    model = PortFlow(4)
    model.coupling = Other(4, True)
    x = torch.randn(3, 4, 4, 4)
    model(x)
    report = accelerate(model, x, **STEPS)
    assert not is_swapped(model)
    assert "no steps in the model" in report.notes[-1]
    assert is_swapped(model.actnorm)  # its other layers are what they look like


# --- everything else stays --------------------------------------------------------------------------------------------


@needs_normflows
def test_state_copies_and_restore():
    x = images()
    model, twin = both(glow, STEPS, x, None, dtype=torch.float32)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.flows[0][1].flows[2].t.add_(1.0)
    assert not torch.allclose(other.log_prob(x, None), twin.log_prob(x, None))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(loaded) is original_of(type(twin)) is type(model)
    assert restore(twin) >= 1
    assert not any(is_swapped(m) for m in twin.modules())
    assert type(twin) is type(model)


@needs_normflows
@MODES
@pytest.mark.parametrize("given", [True, False], ids=["example inputs", "first call"])
def test_the_first_batch_initialises_by_the_original_code(mode, given):
    torch.manual_seed(0)
    model = glow(net_actnorm=True)
    twin = copy.deepcopy(model)
    x, other = 2 * images(seed=4) + 1, images(seed=5)
    report = accelerate(twin, (x, None) if given else None, **mode)
    assert (report.fused == []) != given
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    torch.testing.assert_close(twin.log_prob(x, None), model.log_prob(x, None), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(twin.log_prob(other, None), model.log_prob(other, None), rtol=1e-5, atol=1e-3)
    assert not is_pending(twin)
    assert report.rows[0].told == "fused (steps)"
    assert count(lambda: twin.log_prob(other, None)) == {2: 2}
    # A state from before the first batch asks for one again.
    torch.manual_seed(0)
    fresh = glow(net_actnorm=True).state_dict()
    for m in (twin, model):
        m.load_state_dict(fresh)
    torch.testing.assert_close(twin.log_prob(x, None), model.log_prob(x, None), rtol=0, atol=0)
    torch.testing.assert_close(twin.log_prob(other, None), model.log_prob(other, None), rtol=1e-5, atol=1e-3)


def count(call):
    """How often the matrices of a number of steps were composed."""
    found, original = {}, steps_parts.lu_compose

    def counted(lower, *args, **options):
        found[lower.shape[0]] = found.get(lower.shape[0], 0) + 1
        return original(lower, *args, **options)

    steps_parts.lu_compose = counted
    try:
        call()
    finally:
        steps_parts.lu_compose = original
    return found


@needs_normflows
def test_all_matrices_of_a_level_are_composed_at_once():
    x = images()
    _, twin = both(glow, STEPS, x, None, dtype=torch.float32)
    assert count(lambda: twin.log_prob(x, None)) == {2: 2}
    assert count(lambda: twin.sample(2)) == {2: 2}


@needs_normflows
def test_hooks_on_what_is_left_out_keep_the_container():
    x = images()
    model = started(glow, x, None)
    seen = []
    handle = model.flows[1][0].flows[1].register_forward_hook(lambda *_: seen.append(1))
    report = accelerate(model, (x, None), **STEPS)
    assert report.rows[0].status == "kept"
    assert "a hook on" in report.rows[0].reason
    handle.remove()
    restore(model)
    accelerate(model, (x, None), **STEPS)
    assert is_swapped(model)
    expected = model.log_prob(x, None)
    # One that comes later is heard as well, and so are the networks' always.
    model.flows[1][0].register_forward_hook(lambda *_: seen.append(2))
    model.flows[0][0].flows[0].flows[1].param_map.register_forward_hook(lambda *_: seen.append(3))
    torch.testing.assert_close(model.log_prob(x, None), expected, rtol=1e-5, atol=1e-3)
    model.sample(2)
    assert seen == [3, 3, 2]


@needs_normflows
def test_networks_are_called_so_that_their_hooks_fire():
    x = images()
    _, twin = both(glow, STEPS, x, None, dtype=torch.float32)
    seen = []
    twin.flows[0][0].flows[0].flows[1].param_map.register_forward_hook(lambda *_: seen.append(1))
    twin.log_prob(x, None)
    twin.sample(2)
    assert seen == [1, 1]


@needs_normflows
def test_subclasses_and_containers_without_steps():
    import normflows as nf

    class Mine(nf.MultiscaleFlow):
        def log_prob(self, x, y):
            return super().log_prob(x, y) + 1

    x = images()
    model = started(glow, x, None)
    model.__class__ = Mine
    report = accelerate(model, (x, None), **STEPS)
    assert (report.rows[0].status, "overrides log_prob" in report.rows[0].reason) == ("kept", True)
    plain = nn.Sequential(nn.Linear(2, 2))
    assert "no container" in accelerate(plain, torch.randn(3, 2), **STEPS).notes[0]
    assert accelerate(plain, torch.randn(3, 2)).notes == []


@pytest.mark.parametrize("options", [{"fuse": "x"}, {"memory": "x"}, {"channels_last": "x"}], ids=str)
def test_unknown_values(options):
    with pytest.raises(ValueError, match=r"must be .*'x'"):
        accelerate(nn.Linear(2, 2), **options)


# --- gradients of gradients, autocast, transforms ---------------------------------------------------------------------


@needs_normflows
@MODES
def test_double_backward(mode):
    x = images(batch=2, dtype=torch.float64)
    model, twin = both(lambda: glow(init_zeros=False, leaky=0.1), mode, x, None)
    found = []
    for m in (twin, model):
        v = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m.log_prob(v, None).sum(), v, create_graph=True)
        found.append(gradients_of(m, slope.square().sum()) | {"x": v.grad})
        v.grad = None
    same(*found, 1e-8)


@needs_normflows
@MODES
def test_autocast_keeps_data_and_logdets(mode):
    x = images()
    model, twin = both(lambda: glow(init_zeros=False), mode, x, None, dtype=torch.float32)
    exact = model.log_prob(x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zs, logdet = twin.inverse_and_log_det(x)
        back, _ = twin.forward_and_log_det(zs)
        got = twin.log_prob(x, None)
    assert {t.dtype for t in (*zs, logdet, back, got)} == {torch.float32}
    assert (back - x).abs().max() < 1e-3
    torch.testing.assert_close(got, exact, rtol=2e-2, atol=2.0)
    got.sum().backward()  # outside autocast: networks run again as they did
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())


@needs_normflows
def test_transforms_see_through():
    x = images(batch=2, dtype=torch.float64)
    model, twin = both(lambda: glow(init_zeros=False), REVERSIBLE, x, None)

    def loss(parameters, m):
        return torch.func.functional_call(m, parameters, (x, None)).sum()

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    same(torch.func.grad(loss)(parameters, twin), torch.func.grad(loss)(parameters, model), 1e-9)


@needs_normflows
def test_other_parameters_for_the_time_of_a_call():
    x = images(batch=2, dtype=torch.float64)
    model, twin = both(lambda: glow(init_zeros=False), REVERSIBLE, x, None)
    found = []
    for m in (twin, model):
        own = {n: (p + 0.1).detach().requires_grad_() for n, p in m.named_parameters()}
        torch.func.functional_call(m, own, (x, None)).sum().backward()
        found.append({n: p.grad for n, p in own.items()})
    same(*found, 1e-8)


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(model, x):
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.log_prob(x, None).sum()
    total = sum(kept.values())
    loss.backward()
    return total


@needs_normflows
def test_what_is_kept_does_not_grow_with_the_number_of_steps():
    def per_sample(mode, steps):
        x = images(batch=4)
        twin = started(lambda: glow(steps=steps, levels=1), x, None)
        accelerate(twin, verify=False, **mode)
        return (saved_bytes(twin, images(batch=20)) - saved_bytes(twin, x)) / 16

    assert per_sample(REVERSIBLE, 8) <= 1.01 * per_sample(REVERSIBLE, 2)
    assert per_sample(STEPS, 8) > 3 * per_sample(STEPS, 2)


@needs_normflows
def test_dropout_drops_the_same_again():
    x = images(dtype=torch.float64)

    def make():
        model = glow(init_zeros=False)
        for m in list(model.modules()):
            if type(m).__name__ == "ConvNet2d":
                m.net.insert(2, nn.Dropout(0.4))
        return model

    model, twin = both(make, REVERSIBLE, x, None)
    found = []
    for m in (twin, model):
        m.train()
        value = 0
        # The data direction meets the steps in the same order: the same numbers are drawn.
        torch.manual_seed(7)
        value = m.log_prob(x, None).sum()
        found.append(gradients_of(m, value))
    same(*found, 1e-9)


@needs_normflows
def test_batch_norm_is_refused_for_reversible_training_alone():
    def make():
        model = glow()
        model.flows[0][0].flows[0].flows[1].param_map.net.insert(1, nn.BatchNorm2d(4))
        return model

    x = images()
    model = started(make, x, None)
    report = accelerate(model, (x, None), **REVERSIBLE)
    assert "batch norm" in report.rows[0].reason
    restore(model)
    assert accelerate(model.eval(), (x, None), **STEPS).rows[0].told == "fused (steps)"


# --- layout -----------------------------------------------------------------------------------------------------------


@needs_normflows
@pytest.mark.parametrize("mode", [STEPS, REVERSIBLE, {}], ids=["steps", "reversible", "layers"])
def test_channels_last_changes_no_value_and_is_put_back(mode):
    x = images(channels=2)
    model = started(lambda: glow(channels=2, init_zeros=False), x, None)
    twin = copy.deepcopy(model)
    accelerate(twin, (x, None), channels_last=True, **mode)
    weights = [m.weight for m in twin.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    if mode:
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    expected, got = model.log_prob(x, None), twin.log_prob(x, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-3)
    same(gradients_of(twin, got.mean()), gradients_of(model, expected.mean()), 1e-3)
    restore(twin)
    assert not any(is_swapped(m) for m in twin.modules())
    assert all(w.is_contiguous() for w in weights)


class Viewing(PortCoupling):
    """Its own code does not stand channels-last parameters; what replaces it does."""

    def forward(self, input):
        a, b = input.chunk(2, 1)
        log_s, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        return torch.cat([a, (b + t) * s], 1), torch.log(s).view(input.shape[0], -1).sum(1)


@pytest.mark.parametrize("given", [True, False], ids=["example inputs", "first call"])
def test_channels_last_comes_after_the_proof(given):
    torch.manual_seed(0)
    model = PortFlow(4)
    model.coupling = Viewing(4, True)
    x = torch.randn(3, 4, 4, 4)
    expected = model(x)
    report = accelerate(model, x if given else None, channels_last=True, **STEPS)
    for a, b in zip(model(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert report.rows[0].told == "fused (steps)"
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    # Where it is kept, it stays as it was.
    other = PortFlow(4)
    other.coupling = Viewing(4, True)
    other(x)
    accelerate(other, x, channels_last=True, include="invconv")
    other(x)


@needs_normflows
def test_channels_last_networks_run_relus_in_the_convolution():
    x = images(channels=2)

    def make():
        model = glow(channels=2, init_zeros=False)
        model.flows[0][1].flows[0].flows[1].param_map.net[1].negative_slope = 0.1
        return model

    model = started(make, x, None)
    nets = [block.flows[0].flows[1].param_map for level in model.flows for block in list(level)[:2]]
    seen = []
    nets[0].net[0].register_forward_hook(lambda *_: seen.append("inner"))
    nets[2].register_forward_hook(lambda *_: seen.append("outer"))
    report = accelerate(model, (x, None), channels_last=True, **STEPS)
    # The first is listened to inside, the second is not a ReLU's: that convolution is called as it is.
    assert [is_swapped(net) for net in nets] == [False, True, True, True]
    assert sum(row.told == "fused (channels-last)" for row in report) == 3
    assert seen
    seen.clear()
    model.log_prob(x, None)
    assert sorted(seen) == ["inner", "outer"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nets[1](torch.randn(2, nets[1].net[0].in_channels, 4, 4)).dtype == torch.bfloat16


@needs_normflows
def test_fewer_graph_breaks():
    x = images(batch=2)
    model, twin = both(lambda: glow(levels=1, init_zeros=False), STEPS, x, None, dtype=torch.float32)
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(lambda v: twin.log_prob(v, None))(x).graph_break_count
    torch._dynamo.reset()
    if breaks:
        assert breaks < torch._dynamo.explain(lambda v: model.log_prob(v, None))(x).graph_break_count
        torch._dynamo.reset()
    compiled = torch.compile(lambda v: twin.log_prob(v, None), backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin.log_prob(x, None), rtol=1e-5, atol=1e-3)
