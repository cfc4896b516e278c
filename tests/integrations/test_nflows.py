"""What is particular to nflows: options that are kept, lazy and cached layers, errors, whole flows, calls counted."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nfkernels
from nfkernels.integrations.swap import Swapped, is_swapped, original_of

nflows = pytest.importorskip("nflows")
from nflows import distributions, flows, transforms  # noqa: E402
from nflows.nn.nets import ResidualNet  # noqa: E402
from nflows.transforms.base import InputOutsideDomain  # noqa: E402

RQ = transforms.PiecewiseRationalQuadraticCouplingTransform
MASK = [0, 1, 0, 1]


def _net(inside, outside, context=None):
    return ResidualNet(inside, outside, hidden_features=8, num_blocks=1, context_features=context)


def _both(make, *inputs, seed=0, **options):
    """The original and its accelerated copy, off their starting values."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fused = copy.deepcopy(module)
    return module, fused, nfkernels.accelerate(fused, inputs or None, **options)


def _agree(got, expected, tolerance=1e-9):
    for g, e in zip(got, expected, strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


# --- what is kept -----------------------------------------------------------------------------------------------------


class OwnScale(transforms.AffineCouplingTransform):
    def _scale_and_shift(self, transform_params):
        scale, shift = super()._scale_and_shift(transform_params)
        return 2 * scale, shift


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnScale(MASK, _net), "overrides _scale_and_shift"),
        (
            lambda: transforms.AffineCouplingTransform(MASK, _net, lambda features: transforms.ActNorm(features)),
            "unconditional transform of its own (ActNorm)",
        ),
        (lambda: RQ(MASK, _net, num_bins=65, tails="linear"), "from 2 to 64"),
        (lambda: RQ(MASK, _net, num_bins=10, tails="linear", min_bin_width=0.2), "min_width"),
        (lambda: RQ(MASK, _net, tails="circular"), "tails='circular'"),
        (lambda: distributions.DiagonalNormal([2, 3]), "not (D,)"),
        (lambda: transforms.Permutation(torch.tensor([0, 0, 1, 1])), "not a permutation"),
    ],
)
def test_options_that_are_kept(make, reason):
    module = make()
    report = nfkernels.accelerate(module)
    row = next(r for r in report if r.path == "")
    assert row.status == "kept"
    assert reason in row.reason
    assert not is_swapped(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RQ(MASK, _net, num_bins=5),
        lambda: RQ(MASK, _net, num_bins=5, apply_unconditional_transform=True),
        lambda: transforms.PiecewiseRationalQuadraticCDF([4]),
        lambda: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, num_bins=5),
    ],
)
def test_values_outside_of_the_domain_are_an_error_still(make):
    x = torch.rand(6, 4)
    _, fused, report = _both(make, x)
    assert is_swapped(fused), str(report)
    fused(x)
    x[2, 1] = 1.5
    for method in (fused.forward, fused.inverse):
        with pytest.raises(InputOutsideDomain):
            method(x)


def test_what_passes_through_may_lie_outside_of_the_domain():
    x = torch.rand(6, 4)
    module, fused, _ = _both(lambda: RQ(MASK, _net, num_bins=5), x)
    x[:, 0] = 7.0
    _agree(fused(x), module(x), 1e-5)


def test_inputs_that_do_not_fit_raise_what_they_did():
    x = torch.randn(6, 4)
    for make in (
        lambda: transforms.AffineCouplingTransform(MASK, _net),
        lambda: RQ(MASK, _net, tails="linear"),
        lambda: transforms.RandomPermutation(4),
        lambda: transforms.ActNorm(4),
        lambda: distributions.StandardNormal([4]),
    ):
        module, fused, _ = _both(make, x, call="log_prob" if hasattr(make(), "log_prob") else None)
        call = "log_prob" if hasattr(module, "log_prob") else "forward"
        for wrong in (x[:, :3], x[..., None]):
            expected, got = (_outcome(m, call, wrong) for m in (module, fused))
            assert got[0] == expected[0]
            if expected[0] is ValueError:
                assert got[1] == expected[1]


def _outcome(module, call, x):
    try:
        getattr(module, call)(x)
    except Exception as error:
        return type(error), str(error)
    return None, ""


def test_no_name_of_ours_hides_one_of_the_original():
    from foreign.nflows_cases import CASES

    for case in CASES:
        module = case.make()
        nfkernels.accelerate(module, verify=False)
        for layer in module.modules():
            if not is_swapped(layer):
                continue
            kind, original = type(layer), original_of(type(layer))
            ours = {n for c in kind.__mro__ if c not in original.__mro__ and c is not Swapped for n in vars(c)}
            hidden = {n for n in ours if hasattr(original, n) or n in vars(layer) or n in layer._modules}
            hidden = {n for n in hidden if not n.startswith("__")} - {
                "forward",
                "inverse",
                "log_prob",
                "inverse_no_cache",
            }
            assert not hidden, (case.name, hidden)


# --- lazy and cached layers -------------------------------------------------------------------------------------------


def test_actnorm_is_initialised_by_its_first_batch_and_never_asked_again():
    torch.manual_seed(0)
    module, x = transforms.ActNorm(3), 2 * torch.randn(50, 3) + 1
    fused = copy.deepcopy(module)
    nfkernels.accelerate(fused)
    assert "Waiting" in {c.__name__ for c in type(fused).__mro__} or not fused.initialized
    expected, got = module(x), fused(x)
    _agree(got, expected, 1e-6)
    _agree((fused.log_scale, fused.shift), (module.log_scale, module.shift), 0)
    assert bool(fused.initialized)

    class Asked(torch.Tensor):
        def __bool__(self):
            raise AssertionError("the flag was looked at")

    assert is_swapped(fused)
    fused._buffers["initialized"] = fused.initialized.as_subclass(Asked)
    _agree(fused(x), module(x), 1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_actnorm_still_waits_after_it_was_proved(whole):
    """The example inputs initialise nothing, alone or in a chain."""
    x = torch.randn(50, 3)
    layer = transforms.ActNorm(3)
    model = transforms.CompositeTransform([layer]) if whole else layer
    report = nfkernels.accelerate(model, x)
    assert len(report.fused) == 1 + whole, str(report)
    assert not bool(layer.initialized)
    _agree((model(5 * x + 2)[0].mean(0),), (torch.zeros(3),), 1e-5)
    assert bool(layer.initialized)


def test_actnorm_waits_again_for_a_state_without_its_first_batch():
    x = torch.randn(50, 3)
    fresh = transforms.ActNorm(3)
    _, fused, _ = _both(lambda: transforms.ActNorm(3), x)
    fused(x)
    before = fused.log_scale.clone()
    fused.load_state_dict(fresh.state_dict())
    assert not bool(fused.initialized)
    fused(5 * x)
    assert bool(fused.initialized)
    assert (fused.log_scale - before).abs().max() > 0.5
    fused.load_state_dict({**fresh.state_dict(), "initialized": torch.tensor(True)})
    _agree(fused(x)[:1], (x,), 1e-6)


@pytest.mark.parametrize("kind", ["LULinear", "NaiveLinear", "QRLinear", "OneByOneConvolution"])
def test_cached_matrices_are_used_in_evaluation_and_dropped_by_training(kind):
    make = {
        "LULinear": lambda: transforms.LULinear(3, using_cache=True, identity_init=False),
        "NaiveLinear": lambda: transforms.NaiveLinear(3, using_cache=True),
        "QRLinear": lambda: transforms.QRLinear(3, 2, using_cache=True),
        "OneByOneConvolution": lambda: transforms.OneByOneConvolution(3, using_cache=True, identity_init=False),
    }[kind]
    x = torch.randn(5, 3, 2, 2) if kind == "OneByOneConvolution" else torch.randn(5, 3)
    module, fused, report = _both(make, x)
    assert is_swapped(fused), str(report)
    for m in (module, fused):
        m.eval()
    with torch.no_grad():
        expected = module(x)
        for _ in range(2):
            _agree(fused(x), expected, 1e-5)
            y, logdet = fused.inverse(fused(x)[0])
            _agree((y, logdet), (x, -expected[1]), 1e-4)
        assert fused.cache.weight is not None
        assert fused.cache.inverse is not None
        for m in (module, fused):
            (m._weight if kind == "NaiveLinear" else m.upper_entries).add_(1.0)
        _agree(fused(x), module(x), 1e-5)
        if kind != "NaiveLinear":  # whose cached matrix is the parameter itself
            _agree(fused(x), expected, 1e-5)
        for m in (module, fused):
            m.train()
            m.eval()
        assert fused.cache.weight is None
        assert fused.cache.inverse is None
        assert (fused(x)[0] - expected[0]).abs().max() > 0.1
        _agree(fused(x), module(x), 1e-5)


def test_a_filled_cache_is_no_obstacle():
    x = torch.randn(5, 3)
    module = transforms.LULinear(3, using_cache=True).eval()
    module(x)  # with a graph, which cannot be copied
    nfkernels.accelerate(module, x)
    assert is_swapped(module)


def test_the_inverse_of_a_free_matrix_works_and_the_report_says_so():
    x = torch.randn(6, 4)
    module, fused, report = _both(lambda: transforms.NaiveLinear(4), x)
    with pytest.raises(Exception, match=r"."):
        module.inverse(x)
    z, logdet = fused(x)
    back, other = fused.inverse(z)
    _agree((back, other), (x, -logdet), 1e-4)
    assert "round trip" in report.rows[0].reason
    late = copy.deepcopy(module)
    nfkernels.accelerate(late)  # whose first call is the one that fails
    _agree(late.inverse(z), (back, other), 1e-6)
    _agree(late.inverse_no_cache(z), (back, other), 1e-6)


# --- autoregressive inverses ------------------------------------------------------------------------------------------


def _gradients(module, z, context):
    z = z.clone().requires_grad_()
    x, logdet = module.inverse(z, context)
    loss = (x * torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)).square().sum() + (logdet * logdet).sum()
    return torch.autograd.grad(loss, [z, *module.parameters()], materialize_grads=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_residual_blocks": False, "random_mask": True},
        {"activation": torch.nn.functional.softplus},
        {"dropout_probability": 0.3},
        {"use_batch_norm": True},
    ],
    ids=str,
)
def test_the_gradient_of_the_inverse_is_that_of_all_passes(options):
    z, context = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    module, fused, report = _both(
        lambda: transforms.MaskedAffineAutoregressiveTransform(4, 9, context_features=2, **options).double(), z, context
    )
    assert is_swapped(fused), str(report)
    for m in (module, fused):
        m.eval()
    _agree(_gradients(fused, z, context), _gradients(module, z, context))


def test_dropout_in_training_draws_as_before():
    z = torch.randn(6, 4, dtype=torch.float64)
    module, fused, _ = _both(
        lambda: transforms.MaskedAffineAutoregressiveTransform(4, 9, dropout_probability=0.5).double(), z
    )
    torch.manual_seed(3)
    expected = module.inverse(z)
    torch.manual_seed(3)
    _agree(fused.inverse(z), expected)


def test_a_hook_inside_of_the_network_fires_in_the_inverse():
    z = torch.randn(6, 4)
    _, fused, _ = _both(lambda: transforms.MaskedAffineAutoregressiveTransform(4, 9), z)
    seen = []
    fused.autoregressive_net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    fused.inverse(z)
    assert len(seen) == 4


# --- chains and whole flows -------------------------------------------------------------------------------------------


def _nsf(context=None):
    layers = []
    for _ in range(2):
        layers += [
            transforms.RandomPermutation(4),
            transforms.LULinear(4),
            RQ(MASK, lambda i, o: _net(i, o, context), num_bins=5, tails="linear", tail_bound=3.0),
        ]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))


def _maf(context=None):
    layers = []
    for _ in range(2):
        layers += [
            transforms.ReversePermutation(4),
            transforms.MaskedAffineAutoregressiveTransform(4, 9, context_features=context),
            transforms.BatchNorm(4),
        ]
    base = distributions.ConditionalDiagonalNormal([4], torch.nn.Linear(context, 8)) if context else None
    flow = flows.Flow(transforms.CompositeTransform(layers), base or distributions.StandardNormal([4]))
    flow.log_prob(torch.randn(20, 4), torch.randn(20, context) if context else None)
    return flow.eval()


@pytest.mark.parametrize("make", [_nsf, _maf])
@pytest.mark.parametrize("context", [None, 3])
def test_whole_flows(make, context):
    x = torch.randn(8, 4)
    given = () if context is None else (torch.randn(8, context),)
    module, fused, report = _both(lambda: make(context), x, *given)
    assert not report.kept, str(report)
    _agree((fused.log_prob(x, *given),), (module.log_prob(x, *given),), 1e-4)
    conditions = given[0][:2] if given else None
    found = []
    for m in (module, fused):
        torch.manual_seed(5)
        sample = m.sample(6, conditions)
        both = m.sample_and_log_prob(6, conditions)
        found.append((sample, *both, m.transform_to_noise(x, *given)))
    _agree(found[1], found[0], 1e-3)
    with pytest.raises(ValueError, match="equal to number of context"):
        fused.log_prob(x, torch.randn(3, 3))


def test_a_multiscale_image_flow():
    def level(channels):
        return transforms.CompositeTransform(
            [
                transforms.SqueezeTransform(),
                transforms.ActNorm(4 * channels),
                transforms.OneByOneConvolution(4 * channels),
                transforms.AffineCouplingTransform([1, 0] * (2 * channels), _conv),
            ]
        )

    def _conv(inside, outside):
        return nflows.nn.nets.ConvResidualNet(inside, outside, hidden_channels=6, num_blocks=1)

    def make():
        chain = transforms.MultiscaleCompositeTransform(2)
        hidden = chain.add_transform(level(1), (4, 4, 4))
        chain.add_transform(level(hidden[0]), (hidden[0] * 4, 2, 2))
        flow = flows.Flow(chain, distributions.StandardNormal([64]))
        flow.log_prob(torch.randn(4, 1, 8, 8))
        return flow

    x = torch.randn(4, 1, 8, 8)
    module, fused, report = _both(make, x)
    assert [r.layer for r in report.kept] == ["MultiscaleCompositeTransform"], str(report)
    _agree((fused.log_prob(x),), (module.log_prob(x),), 1e-4)
    z = module._transform(x)[0].detach()
    _agree(fused._transform.inverse(z), module._transform.inverse(z), 1e-3)


def test_hooks_on_every_layer_of_a_chain_fire_in_order_and_change_nothing():
    x = torch.randn(8, 4)
    module, fused, _ = _both(lambda: _nsf(), x)
    seen = []
    expected = fused.log_prob(x)
    for name, layer in fused.named_modules():
        layer.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    _agree((fused.log_prob(x),), (expected,), 1e-5)
    own = []
    for name, layer in module.named_modules():
        layer.register_forward_hook(lambda m, args, out, name=name: own.append(name))
    module.log_prob(x)
    assert seen == own
    assert len(seen) > 20


def test_a_layer_of_ones_own_among_fused_ones():
    class Doubled(transforms.Transform):
        def forward(self, inputs, context=None):
            return 2 * inputs, inputs.new_full((len(inputs),), 4 * 0.6931471805599453)

        def inverse(self, inputs, context=None):
            return inputs / 2, -inputs.new_full((len(inputs),), 4 * 0.6931471805599453)

    x = torch.randn(8, 4)
    module, fused, report = _both(
        lambda: transforms.CompositeTransform([transforms.LULinear(4), Doubled(), transforms.ActNorm(4).eval()]), x
    )
    assert [r.layer for r in report.kept] == ["Doubled"]
    _agree(fused(x), module(x), 1e-5)
    _agree(fused.inverse(x), module.inverse(x), 1e-5)


def test_log_determinants_may_be_added_to_in_place():
    x = torch.randn(8, 4)
    for make in (
        lambda: transforms.LULinear(4),
        lambda: transforms.ActNorm(4).eval(),
        lambda: transforms.RandomPermutation(4),
        lambda: transforms.NaiveLinear(4),
    ):
        module, fused, _ = _both(make, x)
        with torch.no_grad():
            logdet = fused(x)[1]
            logdet += torch.arange(8.0)
        _agree((logdet,), (module(x)[1].detach() + torch.arange(8.0),), 1e-5)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _calls(function):
    with Counted() as counted:
        function()
    return counted.calls


def test_calls_beside_those_of_the_networks():
    """Small flows cost what their calls cost: a step's own are counted."""
    x = torch.randn(8, 4)
    module, fused, _ = _both(_nsf, x)
    nets = [layer.transform_net for layer in fused.modules() if isinstance(layer, RQ)]
    half = x[:, ::2]

    def train(flow):
        flow.zero_grad()
        flow.log_prob(x).mean().backward()

    for function, times, most in (
        (lambda m: m.log_prob(x), lambda: [net(half) for net in nets], 9),
        (lambda m: m.sample(8), lambda: [net(half) for net in nets], 14),
        (train, lambda: [net(half).sum().backward() for net in nets], 45),
    ):
        own = _calls(lambda f=function: f(fused)) - _calls(times)
        before = _calls(lambda f=function: f(module)) - _calls(times)
        assert own <= most
        assert own < before / 8
