"""What is particular to zuko: lazy layers that return transforms, whatever the batch, and inverses by passes."""

import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nfkernels.integrations import accelerate, restore
from nfkernels.integrations.swap import is_swapped

zuko = pytest.importorskip("zuko", reason="zuko is not installed")
from zuko import flows, transforms  # noqa: E402
from zuko.flows.autoregressive import MaskedAutoregressiveTransform  # noqa: E402
from zuko.flows.coupling import GeneralCouplingTransform  # noqa: E402
from zuko.flows.gaussianization import ElementWiseTransform  # noqa: E402
from zuko.lazy import Flow, LazyInverse, UnconditionalTransform  # noqa: E402

SMALL = {"hidden_features": (12, 12)}
SPLINE = {"univariate": transforms.MonotonicRQSTransform, "shapes": [(5,), (5,), (4,)]}


def _pair(make, *example, dtype=torch.float64):
    """The original, its weights moved off the start, and an accelerated copy."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fused = copy.deepcopy(plain)
    report = accelerate(fused, tuple(e.to(dtype) for e in example))
    assert is_swapped(fused), report
    return plain, fused


def _close(a, b, tolerance=1e-9):
    for one, other in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def _layer(kind, context):
    return {
        "autoregressive": lambda: MaskedAutoregressiveTransform(3, context, **SMALL),
        "coupling": lambda: GeneralCouplingTransform(3, context, **SPLINE, **SMALL),
        "elementwise": lambda: ElementWiseTransform(3, context, **SPLINE, **(SMALL if context else {})),
    }[kind]


@pytest.mark.parametrize("kind", ["autoregressive", "coupling", "elementwise"])
@pytest.mark.parametrize(
    "batches",
    [
        [((), None), ((7,), None), ((2, 4), None)],
        [((), ()), ((7,), ()), ((7,), (7,)), ((2, 7), (7,)), ((1, 2, 7), (2, 1))],
    ],
    ids=["alone", "context"],
)
def test_any_batch(kind, batches):
    width = 0 if batches[0][1] is None else 2
    plain, fused = _pair(_layer(kind, width), torch.randn(7, 3), *((torch.randn(7, 2),) if width else ()))
    for rows, context in batches:
        x = 2 * torch.randn(*rows, 3, dtype=torch.float64)
        c = None if context is None else torch.randn(*context, 2, dtype=torch.float64)
        t, u = plain(c), fused(c)
        y = t(x)
        _close(u(x), y)
        _close(u.call_and_ladj(x), t.call_and_ladj(x))
        _close(u.log_abs_det_jacobian(x, y), t.log_abs_det_jacobian(x, y))
        _close(u.inv(y), t.inv(y))
        _close(u.inv.call_and_ladj(y), t.inv.call_and_ladj(y))


@pytest.mark.parametrize("kind", ["autoregressive", "coupling", "elementwise"])
def test_an_empty_batch_which_the_original_refuses(kind):
    fused = _pair(_layer(kind, 2), torch.randn(7, 3), torch.randn(7, 2))[1]
    t, x = fused(torch.zeros(0, 2, dtype=torch.float64)), torch.zeros(0, 3, dtype=torch.float64)
    for made in (t, t.inv):
        y, ladj = made.call_and_ladj(x)
        assert (y.shape, ladj.shape) == ((0, 3), (0,))


NETWORKS = {
    "plain": lambda: MaskedAutoregressiveTransform(5, **SMALL),
    "order": lambda: MaskedAutoregressiveTransform(5, 2, order=torch.tensor([3, 0, 4, 1, 2]), **SMALL),
    "passes": lambda: MaskedAutoregressiveTransform(5, 2, passes=2, activation=torch.nn.SiLU, **SPLINE, **SMALL),
    "one layer": lambda: MaskedAutoregressiveTransform(5, activation=torch.nn.Tanh, hidden_features=(3,)),
    "deep": lambda: MaskedAutoregressiveTransform(
        5, 2, activation=partial(torch.nn.LeakyReLU, 0.01), hidden_features=(9, 20, 13, 8)
    ),
    "adjacency": lambda: MaskedAutoregressiveTransform(
        5, 1, adjacency=torch.tensor(
            [[1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0]]
        ).bool(), activation=torch.nn.ELU, **SMALL
    ),
}  # fmt: skip


@pytest.fixture
def solved(monkeypatch):
    """How many inverses the op found."""
    from nfkernels.integrations.zuko import autoregressive

    seen = []
    op = autoregressive.autoregressive_inverse
    monkeypatch.setattr(autoregressive, "autoregressive_inverse", lambda *a, **k: seen.append(1) or op(*a, **k))
    return seen


@pytest.mark.parametrize("network", NETWORKS)
def test_inverse_by_one_op_with_the_gradients_of_the_passes(network, solved):
    make = NETWORKS[network]
    count = make().hyper.in_features - 5
    c = (torch.randn(7, count, dtype=torch.float64),) if count else ()
    plain, fused = _pair(make, torch.randn(7, 5), *c)
    found = []
    solved.clear()
    for module in (plain, fused):
        y = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given = tuple(t.clone().requires_grad_() for t in c)
        x, ladj = module(*given).inv.call_and_ladj(y)
        grads = torch.autograd.grad((x**3).sum() + ladj.square().sum(), [y, *given, *module.parameters()])
        found.append((x, ladj, *grads))
    assert solved == [1]
    _close(found[1], found[0])


def test_inverse_by_passes_where_the_network_is_not_what_it_was(solved):
    plain, fused = _pair(NETWORKS["plain"], torch.randn(7, 5))
    y = torch.randn(7, 5, dtype=torch.float64)
    solved.clear()
    handles = [m.hyper[0].register_forward_hook(lambda m, a, out: 1.5 * out) for m in (plain, fused)]
    _close(fused().inv(y), plain().inv(y))
    for handle in handles:
        handle.remove()
    for m in (plain, fused):
        m.hyper[2].forward = lambda x, m=m: torch.nn.functional.linear(x, 0.5 * m.hyper[2].mask * m.hyper[2].weight)
    _close(fused().inv(y), plain().inv(y))
    del fused.hyper[2].forward
    fused.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused().inv(y.float()).dtype == torch.float32
    assert not solved
    fused().inv(y.float())
    assert solved


def test_bayesian_models():
    """They replace the forward of linear layers for a while."""
    from zuko.bayesian import BayesianModel

    torch.manual_seed(0)
    flow = flows.MAF(3, 2, transforms=2, **SMALL)
    accelerate(flow, (torch.randn(5, 3), torch.randn(5, 2)))
    model = BayesianModel(flow)
    x, c = torch.randn(16, 3), torch.randn(16, 2)
    for trick in (True, False):
        with model.reparameterize(local_trick=trick) as sampled:
            t = sampled(c).transform
            torch.testing.assert_close(t.inv(t(x)), x, rtol=0, atol=1e-4)
            assert sampled(c).log_prob(x).requires_grad


FLOWS = {
    "NSF": lambda c: flows.NSF(4, c, transforms=2, bins=5, **SMALL),
    "MAF": lambda c: flows.MAF(4, c, transforms=2, randperm=True, **SMALL),
    "RealNVP": lambda c: flows.RealNVP(4, c, transforms=2, randmask=True, **SMALL),
    "LU": lambda c: Flow(
        [
            MaskedAutoregressiveTransform(4, c, **SMALL),
            UnconditionalTransform(transforms.LULinearTransform, torch.eye(4) + 0.3 * torch.randn(4, 4)),
            UnconditionalTransform(transforms.PermutationTransform, order=torch.randperm(4), buffer=True),
            LazyInverse(MaskedAutoregressiveTransform(4, c, **SMALL)),
        ],
        flows.MAF(4).base,
    ),
}


@pytest.mark.parametrize("contexts", [[None], [(), (6,)]], ids=["alone", "context"])
@pytest.mark.parametrize("kind", FLOWS)
def test_densities_and_samples(kind, contexts):
    width = 0 if contexts[0] is None else 2
    plain, fused = _pair(lambda: FLOWS[kind](width), torch.randn(6, 4), *((torch.randn(6, 2),) if width else ()))
    for context in contexts:
        c = None if context is None else torch.randn(*context, 2, dtype=torch.float64)
        p, f = plain(c), fused(c)
        assert (f.batch_shape, f.event_shape) == (p.batch_shape, p.event_shape)
        for rows in ((6,), (3, 6)):
            x = torch.randn(*rows, 4, dtype=torch.float64)
            _close(f.log_prob(x), p.log_prob(x))
        found = []
        for d in (p, f):
            torch.manual_seed(2)
            found.append((d.rsample(), d.rsample((3,)), d.sample((2, 3)), *d.rsample_and_log_prob((5,))))
        _close(found[1], found[0])
        if not context:
            x = torch.randn(2, 6, 4, dtype=torch.float64)
            wide = [d.expand((2, 6)) for d in (p, f)]
            _close(wide[1].log_prob(x), wide[0].log_prob(x))
            assert wide[1].batch_shape == wide[0].batch_shape


@torch.no_grad()
def test_what_is_returned_is_what_zuko_returns():
    flow = flows.NSF(3, 2, transforms=2, bins=5, **SMALL)
    coupling, element = GeneralCouplingTransform(3, **SMALL), ElementWiseTransform(3, **SPLINE)
    originals = copy.deepcopy((flow, coupling, element))
    c = torch.randn(5, 2)
    accelerate(flow, (torch.randn(5, 3), c))
    accelerate(coupling, torch.randn(5, 3))
    accelerate(element, torch.randn(5, 3))
    made = [flow(c), flow(c).transform, flow(c).transform.transforms[0], coupling(), element(), flow(c).transform.inv]
    a, b, e = originals
    expected = [a(c), a(c).transform, a(c).transform.transforms[0], b(), e(), a(c).transform.inv]
    for got, want in zip(made, expected):
        assert isinstance(got, type(want))
        assert type(got) is not type(want)
        assert repr(got) == repr(want)
        copied = pickle.loads(pickle.dumps(got))
        assert type(copied) is type(want)
        assert type(copy.deepcopy(got)) is type(want)
    for got, want in zip(made[1:], expected[1:]):
        assert (got.domain.event_dim, got.codomain.event_dim, got.bijective) == (1, 1, True)
        assert repr(got.domain) == repr(want.domain)
        assert got.forward_shape((5, 3)) == want.forward_shape((5, 3))
    t = made[2]
    assert t.inv.inv is t
    x = torch.randn(5, 3)
    _close(pickle.loads(pickle.dumps(made[0])).log_prob(x), made[0].log_prob(x), 1e-5)
    assert torch.equal(made[3].idx_a, expected[3].idx_a)
    assert torch.equal(made[3].idx_b, expected[3].idx_b)


def test_a_mask_or_an_order_that_is_loaded_is_the_one_that_counts():
    for make in (
        lambda: flows.MAF(5, transforms=2, randperm=True),
        lambda: flows.RealNVP(5, transforms=3, randmask=True),
    ):
        plain, fused = _pair(make, torch.randn(7, 5))
        torch.manual_seed(8)
        other = make().double()
        plain.load_state_dict(other.state_dict())
        try:
            fused.load_state_dict(other.state_dict())
        except RuntimeError:  # another number of features in the other half
            continue
        x = torch.randn(7, 5, dtype=torch.float64)
        t, u = plain().transform, fused().transform
        _close(u.call_and_ladj(x), t.call_and_ladj(x))
        _close(u.inv(x), t.inv(x))


def _squashed(*phi):
    return transforms.MonotonicAffineTransform(*(torch.tanh(p) for p in phi))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MaskedAutoregressiveTransform(3, univariate=_squashed), "univariate _squashed"),
        (lambda: MaskedAutoregressiveTransform(3, univariate=partial(_squashed)), "univariate _squashed"),
        (lambda: GeneralCouplingTransform(3, univariate=lambda *p: _squashed(*p)), "lambda"),
        (
            lambda: MaskedAutoregressiveTransform(
                3, univariate=partial(transforms.MonotonicAffineTransform, slope=torch.tensor(0.1))
            ),
            "univariate option slope",
        ),
        (
            lambda: MaskedAutoregressiveTransform(
                3, univariate=partial(transforms.MonotonicRQSTransform, cache_size=1), shapes=[(5,), (5,), (4,)]
            ),
            "univariate option cache_size",
        ),
        (lambda: ElementWiseTransform(3, **{**SPLINE, "shapes": [(1,), (1,), (0,)]}), "with shapes"),
        (lambda: UnconditionalTransform(transforms.SoftclipTransform, 2.0), "SoftclipTransform"),
        (
            lambda: UnconditionalTransform(transforms.LULinearTransform, torch.eye(3).expand(2, 3, 3)),
            "LULinearTransform of something else",
        ),
    ],
)  # fmt: skip
def test_refused_with_the_reason(make, reason):
    module = make()
    rows = {row.path: row for row in accelerate(module)}
    assert rows[""].status == "kept"
    assert reason in rows[""].reason
    assert not is_swapped(module)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("BPF", "BoundedBernstein"), ("SOSPF", "ShiftedSOSP"), ("NAF", "MNN"), ("GF", "Gaussianization")],
)
def test_flows_of_other_univariates_are_kept(kind, reason):
    flow = getattr(flows, kind)(3, transforms=2)
    x = torch.randn(5, 3)
    expected = flow().log_prob(x)
    report = accelerate(flow, x)
    first = next(row for row in report if row.path == "transform.transforms.0")
    assert first.status == "kept"
    assert reason in first.reason
    for path in ("", "transform"):
        row = next(row for row in report if row.path == path)
        assert (row.status, row.reason) == ("kept", "not all of its layers are fused")
    _close(flow().log_prob(x), expected, 1e-5)


def test_continuous_flows_and_mixtures_are_left_alone():
    for model in (flows.CNF(3), flows.GMM(3, components=2)):
        report = accelerate(model)
        assert not report.fused
        assert not report.pending or not any("transforms" in row.path for row in report.pending)
    model = flows.GMM(3, components=2)
    accelerate(model)
    assert not any(is_swapped(m) for m in model.modules())


def test_only_densities_of_a_plain_normal_are_taken_over():
    flow = flows.NCSF(3, transforms=1, **SMALL)
    rows = {row.path: row for row in accelerate(flow)}
    assert "DiagNormal" in rows[""].reason
    flow = flows.NSF(3, transforms=1, **SMALL)
    flow.base.register_forward_hook(lambda *_: None)
    assert "hook on base" in {row.path: row for row in accelerate(flow)}[""].reason


def test_a_base_that_moves_is_followed():
    plain, fused = _pair(lambda: flows.MAF(3, transforms=1, **SMALL), torch.randn(5, 3))
    x = torch.randn(5, 3, dtype=torch.float64)
    for m in (plain, fused):
        m.base.loc.fill_(0.5)
        m.base.scale.data.mul_(2.0)
    _close(fused().log_prob(x), plain().log_prob(x))


def test_data_of_another_type_is_the_originals_business():
    plain, fused = _pair(NETWORKS["plain"], torch.randn(7, 5), dtype=torch.float32)
    for m in (plain, fused):
        m.to(torch.bfloat16)
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        _close(fused().call_and_ladj(x), plain().call_and_ladj(x), 0)
        for t in (plain(), fused()):
            with pytest.raises(RuntimeError):
                t(torch.randn(7, 4, dtype=torch.bfloat16))


def test_a_wider_context_widens():
    plain, fused = _pair(lambda: ElementWiseTransform(3, 2, **SPLINE, **SMALL), torch.randn(5, 3), torch.randn(5, 2))
    c, x = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3)
    _close(fused(c).call_and_ladj(x), plain(c).call_and_ladj(x), 1e-6)


def test_one_sample_at_a_time_by_vmap():
    plain, fused = _pair(lambda: flows.NSF(3, 2, transforms=2, bins=5, **SMALL), torch.randn(5, 3), torch.randn(5, 2))
    x, c = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    got = torch.func.vmap(lambda x, c: fused(c).log_prob(x))(x, c)
    _close(got, plain(c).log_prob(x))
    got = torch.func.vmap(torch.func.jacrev(lambda x, c: fused(c).transform(x)))(x, c)
    assert got.shape == (5, 3, 3)
    _close(torch.linalg.slogdet(got)[1], fused(c).transform.log_abs_det_jacobian(x, x))


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def test_few_calls():
    """Beside the networks: one op per layer, and five for the base."""
    _, fused = _pair(lambda: flows.NSF(6, transforms=3, bins=5, **SMALL), torch.randn(5, 6), dtype=torch.float32)
    x, counts = torch.randn(9, 6), []
    with torch.no_grad():
        for run in (
            lambda m: m().log_prob(x),
            lambda m: m.transform.transforms[0].hyper(x),
            lambda m: m().sample((9,)),
        ):
            with _Calls() as calls:
                run(fused)
            counts.append(calls.names.total())
    log_prob, network, sample = counts
    assert log_prob <= 3 * (network + 1) + 5
    assert sample <= 3 * (network + 4) + 5
    assert restore(fused) == 5
