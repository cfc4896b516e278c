"""The rational-quadratic spline: kernels against the reference in float64, round trips, gradients, layouts, errors."""

import itertools

import pytest
import torch
from cases import DTYPES, all_traced, opcheck, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from nfkernels import Spline, rational_quadratic_spline, use_backend
from nfkernels.ops._layout import canonical
from nfkernels.reference.rational_quadratic_spline import Form

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
SPLINES = {
    "linear": Spline(),
    "nflows": Spline.nflows(10, 1.0, prescale=0.125),
    "zuko": Spline.zuko(),
    "zuko circular": Spline.zuko_circular(5),
    "circular": Spline.circular(7),
    "unit": Spline.unit(3),
    "to another interval": Spline(6, "none", low=-1.0, high=3.0, bottom=10.0, top=10.5),
    "ends fixed, straight on": Spline(4, "none", derivatives="inner", sizes="softclip", slope=0.05),
    "free ends, identity": Spline(9, "linear", derivatives="all", min_width=0.05, min_height=0.02, min_derivative=0.1),
    "periodic, half a turn": Spline(2, "circular", low=0.0, high=1.0, half_turn=True),
    "two bins": Spline(2, low=-2.0, high=1.0),
    "most bins": Spline(64, "none"),
}
SHAPES = [(70, 5), (3, 5, 7, 11), (2, 3, 16, 16), (3, 4, 13), (600, 1), (2, 1, 4500), (2, 90, 3), (1, 1, 1, 1)]


def drawn(spline, shape, dtype=torch.float64, raw=None, fmt="contiguous", channels=None):
    """x mostly inside of the interval and params of any size that a network gives."""
    batch, width, *spatial = shape
    x = tensor(batch, width, tuple(spatial), torch.float64, fmt)
    x = (x * (spline.high - spline.low) / 3 + (spline.high + spline.low) / 2).to(dtype)
    count = (width if channels is None else channels) * spline.params_per_element
    return x, tensor(batch, count, tuple(spatial), raw or dtype, fmt)


def selected(shape, which):
    """``(mask, channel_map, transformed channels)``, drawn."""
    batch, channels, *spatial = shape
    mask = channel_map = None
    count = channels
    if "map" in which:
        count = max(channels // 2, 1)
        channel_map = torch.full((channels,), -1)
        channel_map[torch.randperm(channels)[:count]] = torch.arange(count)
    if "mask" in which:
        mask = torch.rand(batch if "wide" in which else 1, channels, *spatial) > 0.4
    return mask, channel_map, count


def gradients(spline, x, params, dy, dlogdet, **options):
    """y, logdet and the gradients of x and params."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    y, logdet = rational_quadratic_spline(x, params, spline=spline, **options)
    outputs = [(t, g) for t, g in ((y, dy), (logdet, dlogdet)) if g is not None]
    outputs, given = zip(*outputs, strict=True)
    given = [g.to(o.dtype) for o, g in zip(outputs, given, strict=True)]
    return y.detach(), logdet.detach(), *torch.autograd.grad(outputs, (x, params), given)


def three(spline, x, params, *args, **options):
    """Kernel, reference and reference in float64."""
    wide = [t if t is None else t.double() for t in (x, params, *args)]
    running = options.pop("logdet", None)
    with use_backend("native"):
        got = gradients(spline, x, params, *args, **options, logdet=running)
    with use_backend("reference"):
        plain = gradients(spline, x, params, *args, **options, logdet=running)
        exact = gradients(spline, *wide, **options, logdet=None if running is None else running.double())
    return got, plain, exact


def cotangents(x, elementwise):
    return torch.randn(x.shape, dtype=torch.float64).to(x.dtype), torch.randn(x.shape if elementwise else x.shape[:1])


def check(got, plain, exact):
    """In float64 all digits; else errors about those of plain PyTorch, at their median and 95th percentile: what lies
    beside a knot may fall into either bin, and an ill-conditioned element's rounding is anybody's."""
    for a, b, c in zip(got, plain, exact, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, c.shape, b.stride())
        assert a.isfinite().all()
        if not a.numel():
            continue
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9 * (1 + c.abs().max().item()))
        else:
            error, theirs = ((t.double() - c).abs().flatten().sort().values for t in (a, b))
            for place in (len(error) // 2, len(error) * 95 // 100):
                # A few sums are as good as their worst elements: whose those are is chance.
                times = 2 if len(error) >= 20 else 16
                assert error[place] <= times * theirs[place] + 4 * EPS[a.dtype] * c.abs().max()


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", SPLINES)
def test_every_form_at_every_shape(name, inverse):
    torch.manual_seed(1)
    spline, fmts = SPLINES[name], ("contiguous", "channels_last", "sliced")
    choices = [(s, f, w) for s, f, w in itertools.product(SHAPES, fmts, ("", "mask", "wide mask", "map", "map mask"))]
    for i, (shape, fmt, which) in enumerate(choices):
        if i % 6 == len(name) % 6:
            mask, channel_map, count = selected(shape, which)
            x, params = drawn(spline, shape, fmt=fmt, channels=count)
            options = {"mask": mask, "channel_map": channel_map, "inverse": inverse, "elementwise": i % 2 == 0}
            check(*three(spline, x, params, *cotangents(x, i % 2 == 0), **options))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 3, 4, 5, 7, 8, 10, 16, 17, 32, 47, 64])
def test_float32_is_as_accurate_as_plain_pytorch(bins, inverse):
    torch.manual_seed(bins)
    for tails, sizes in itertools.product(("linear", "circular", "none"), ("softmax", "softclip")):
        spline = Spline(bins, tails, sizes=sizes, slope=0.05)
        x, params = drawn(spline, (500, 4), torch.float32)
        check(*three(spline, x, params, *cotangents(x, True), inverse=inverse, elementwise=True))


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("data", "raw"), DTYPES)
def test_dtypes_and_mixed_layouts(data, raw, inverse):
    torch.manual_seed(2)
    for name, shape in itertools.product(("linear", "zuko", "unit"), [(130, 3), (2, 4, 6, 9), (2, 3, 40)]):
        spline = SPLINES[name]
        x, params = drawn(spline, shape, data, raw)
        for p in (params, params.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else params):
            got, plain, exact = three(spline, x, p, *cotangents(x, False), inverse=inverse)
            if data in (torch.bfloat16, torch.float16) and inverse:
                got, plain, exact = got[:2], plain[:2], exact[:2]  # a saved y of 8 bits makes other gradients
            check(got, plain, exact)
            assert got[1].dtype == (torch.float64 if data == torch.float64 else torch.float32)


def test_only_what_is_needed_is_made():
    torch.manual_seed(3)
    spline = SPLINES["linear"]
    x, params = drawn(spline, (9, 4))
    dy, dl = cotangents(x, False)
    dl = dl.double()
    form = Form.pack(spline, False, False)
    backward = torch.ops.nfkernels._rational_quadratic_spline_backward
    want = backward(x, params, dy, dl, None, None, *form, True, True)
    for need in itertools.product((False, True), repeat=2):
        got = backward(x, params, dy, dl, None, None, *form, *need)
        for a, b, needed in zip(got, want, need, strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0
    # One of the two gradients alone.
    for pair in ((dy, None), (None, dl)):
        check(*three(spline, x, params, *pair))


def test_a_running_logdet():
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.float64):
        x, params = drawn(Spline(), (6, 3, 5), dtype)
        running = torch.randn(12, dtype=dtype)[::2]
        check(*three(Spline(), x, params, *cotangents(x, False), logdet=running))
        with torch.no_grad():
            y, alone = rational_quadratic_spline(x, params)
            assert torch.equal(rational_quadratic_spline(x, params, logdet=running)[0], y)
            torch.testing.assert_close(rational_quadratic_spline(x, params, logdet=running)[1], alone + running)
    start = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    rational_quadratic_spline(x, params, logdet=start)[1].sum().backward()
    assert torch.equal(start.grad, torch.ones(6))


@pytest.mark.parametrize("inverse", [False, True])
def test_params_that_are_expanded(inverse):
    """One set of params for a whole batch, as strides of 0; gradients of sums, as well."""
    torch.manual_seed(5)
    for shape in ((50, 3), (4, 2, 6, 5)):
        x, params = drawn(Spline(), (1, *shape[1:]))
        x = drawn(Spline(), shape)[0]
        spread = params.expand(shape[0], *params.shape[1:])
        form = Form.pack(Spline(), inverse, False)
        raw = torch.ops.nfkernels._rational_quadratic_spline_forward
        got = raw(x, spread, None, None, None, *form)
        for a, b in zip(got, raw(x, spread.contiguous(), None, None, None, *form), strict=True):
            assert torch.equal(a, b)
        one = torch.ones((), dtype=torch.float64)
        check(*three(Spline(), x, spread, one.expand(x.shape), one.expand(shape[0]), inverse=inverse))


def test_results_do_not_depend_on_threads():
    torch.manual_seed(6)
    for shape in ((2000, 3), (3, 2, 60, 50), (2, 300, 20)):
        x, params = drawn(Spline(), shape, torch.float32)
        mask, outcomes = torch.rand(1, *shape[1:]) > 0.3, []
        for threads, chosen in itertools.product((1, 2, 3), (None, mask)):
            torch.set_num_threads(threads)
            try:
                with use_backend("native"):
                    outcomes.append(gradients(Spline(), x, params, x, torch.ones(shape[0]), mask=chosen))
            finally:
                torch.set_num_threads(1)
        for i, other in enumerate(outcomes):
            assert all(torch.equal(a, b) for a, b in zip(outcomes[i % 2], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 4, 0), (0, 2, 3, 3)])
def test_nothing_at_all(shape):
    spline = SPLINES["linear"]
    x, params = drawn(spline, shape)
    for inverse in (False, True):
        got, _, exact = three(spline, x, params, x, torch.ones(shape[0]), inverse=inverse)
        assert all(torch.equal(a, c) for a, c in zip(got, exact, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_spline_shape_and_stride(data):
    numbers = st.floats(-5, 5, width=32)
    tails = data.draw(st.sampled_from(["linear", "circular", "none"]))
    low, length = data.draw(numbers), data.draw(st.floats(0.5, 8))
    ends = {} if tails != "none" else {"bottom": data.draw(numbers)}
    spline = Spline(
        data.draw(st.integers(2, 64)), tails, low, low + length,
        **ends, top=ends["bottom"] + data.draw(st.floats(0.5, 8)) if ends else None,
        derivatives=data.draw(st.sampled_from(["inner", "periodic", "all", None])),
        sizes=data.draw(st.sampled_from(["softmax", "softclip"])),
        prescale=data.draw(st.sampled_from([1.0, 0.3, -1.0])),
        half_turn=not ends and data.draw(st.booleans()), slope=0.01,
    )  # fmt: skip
    spatial = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9)), *spatial)
    mask, channel_map, count = selected(shape, data.draw(st.sampled_from(["", "mask", "map", "map wide mask"])))
    x, params = drawn(spline, shape, channels=count)

    def restrided(t):
        order = data.draw(st.permutations(range(t.dim())))
        steps = [data.draw(st.integers(1, 2)) for _ in order]
        wide = torch.full([t.shape[i] * steps[i] for i in order], float("nan"), dtype=t.dtype)
        view = wide.permute([order.index(i) for i in range(t.dim())])[tuple(slice(None, None, s) for s in steps)]
        return view.copy_(t)

    elementwise = data.draw(st.booleans())
    options = {
        "inverse": data.draw(st.booleans()),
        "mask": mask,
        "channel_map": channel_map,
        "elementwise": elementwise,
    }
    x = restrided(x)
    got, plain, exact = three(spline, x, restrided(params), *cotangents(x, elementwise), **options)
    assert got[0].stride() == torch.empty_like(canonical(x)).stride()
    check(got, plain, exact)


# --- against other libraries ------------------------------------------------------------------------------------------


def raw_parts(params, spline, shape):
    each = params.unflatten(1, (shape[1], -1)).movedim(2, -1)
    return each.split([spline.bins, spline.bins, spline.params_per_element - 2 * spline.bins], -1)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("library", "tails"), [("nflows", "linear"), ("normflows", "linear"), ("normflows", "circular")]
)
def test_it_is_the_spline_of_nflows_and_normflows(library, tails, inverse):
    if library == "nflows":
        theirs = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    else:
        theirs = pytest.importorskip("normflows.utils.splines")
    torch.manual_seed(7)
    spline = Spline.nflows(8, 2.5) if tails == "linear" else Spline.circular(8, -2.5, 2.5)
    x, params = drawn(spline, (40, 3))
    parts = raw_parts(params, spline, x.shape)
    want, logs = theirs.unconstrained_rational_quadratic_spline(x, *parts, inverse=inverse, tails=tails, tail_bound=2.5)
    y, each = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each, logs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("circular", [False, True])
def test_it_is_the_spline_of_zuko(circular, inverse):
    theirs = pytest.importorskip("zuko.flows.spline")
    torch.manual_seed(8)
    spline = Spline.zuko_circular(8) if circular else Spline.zuko(8, 5.0)
    x, params = drawn(spline, (40, 3))
    if circular:
        x = x.clamp(-3.1, 3.1)
    parts = raw_parts(params, spline, x.shape)
    transform = theirs.CircularRQSTransform(*parts) if circular else theirs.MonotonicRQSTransform(*parts)
    want, logs = (transform.inv if inverse else transform).call_and_ladj(x)
    y, each = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each, logs, rtol=1e-7, atol=1e-7)


# --- hard inputs ------------------------------------------------------------------------------------------------------


def hard(count, spline, generator, large=1e4):
    """Raw values up to ``large`` at every scale below, equal ones and zeros among them; x (or y) anywhere, on the ends
    of the interval, beside them and far away."""
    scale = 10 ** (torch.rand(count, 1, generator=generator) * 6 - 2).clamp(max=torch.tensor(large).log10().item())
    params = (torch.rand(count, spline.params_per_element, generator=generator) * 2 - 1) * scale
    kind = torch.randint(0, 8, (count,), generator=generator)
    params = torch.where((kind == 0)[:, None], params.sign() * large, params)
    params = torch.where((kind == 1)[:, None], torch.zeros(()), params)
    x = spline.low + (spline.high - spline.low) * torch.rand(count, generator=generator)
    ends = torch.tensor([spline.low, spline.high])
    up, down = (torch.nextafter(ends, torch.tensor(v)) for v in (float("inf"), -float("inf")))
    special = torch.cat([ends, up, down, ends * 1e3, torch.tensor([0.0, -0.0, 1e-30, 1e30])])
    some = torch.randint(0, len(special), (count,), generator=generator)
    chosen = torch.rand(count, generator=generator) < 0.2
    return torch.where(chosen, special[some], x)[:, None], params


def on_knots(x, params, spline):
    """A third of x on a knot as float32 has it, or on a neighbour of one."""
    from nfkernels.reference.rational_quadratic_spline import _shares, _sizes

    form = Form.pack(spline, False, False)
    shares = _shares(params[:, None, : spline.bins], form)
    starts, _ = _sizes(shares, form.low, form.high, form.min_width)
    knot = starts.squeeze(1).gather(1, torch.arange(len(x))[:, None] % spline.bins)
    beside = [knot, *(torch.nextafter(knot, torch.full_like(knot, v)) for v in (10.0, -10.0))]
    pick = torch.arange(len(x))[:, None] % 9
    for i, value in enumerate(beside):
        x = torch.where(pick == i, value, x)
    return x


def check_hard(spline, count, seed):
    """Everything is finite, nothing leaves the interval, and both directions are stable: each result is exact for an
    input and an interval that are off by some units in the last place."""
    generator = torch.Generator().manual_seed(seed)
    x, params = hard(count, spline, generator)
    x = on_knots(x, params, spline)
    dy, dl = torch.rand((count, 1), generator=generator) + 0.5, torch.ones(count)
    with use_backend("native"):
        forward = gradients(spline, x, params, dy, dl)
        y = forward[0]
        inverse = gradients(spline, y, params, dy, dl, inverse=True)
    for t in (*forward, *inverse):
        assert t.isfinite().all()
    inside = (x >= spline.low) & (x <= spline.high)
    ends = [abs(v) for v in (spline.low, spline.high, spline.bottom, spline.top)]
    slack = 24 * EPS[torch.float32] * max(spline.high - spline.low, spline.top - spline.bottom, *ends)
    assert (y[inside] >= spline.bottom - slack).all()
    assert (y[inside] <= spline.top + slack).all()
    if spline.half_turn:
        return  # which is not continuous
    wide = params.double()
    with torch.no_grad(), use_backend("native"):
        for given, result, back in ((x, y, False), (y, inverse[0], True)):
            off = slack + 24 * EPS[torch.float32] * given.abs().double()
            least, most = (
                rational_quadratic_spline(given.double() + by, wide, spline=spline, inverse=back)[0]
                for by in (-off, off)
            )
            off = slack + 24 * EPS[torch.float32] * result.abs().double()
            assert (result >= least - off).all()
            assert (result <= most + off).all()


HARD = ["linear", "zuko", "zuko circular", "circular", "unit", "ends fixed, straight on", "two bins", "most bins"]


@pytest.mark.parametrize("name", HARD)
def test_hard_inputs(name):
    for seed in range(3):
        check_hard(SPLINES[name], 4096, seed)


@pytest.mark.parametrize("millions", [1, pytest.param(9, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", HARD)
def test_millions_of_hard_inputs(name, millions):
    # 64 bins: a quarter of the elements, twice the work.
    chunk, share = (4096, 4) if name == "most bins" else (65536, 1)
    for seed in range(millions * 1_000_000 // len(HARD) // share // chunk + 1):
        check_hard(SPLINES[name], chunk, 100 + seed)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_not_a_number_stays_where_it_is(backend):
    torch.manual_seed(9)
    nan = float("nan")
    for name, inverse in itertools.product(SPLINES, (False, True)):
        spline = SPLINES[name]
        x, params = drawn(spline, (40, 3), torch.float32)
        with use_backend(backend):
            clean = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)
            bad = x.clone()
            bad[7, 1] = nan
            got = rational_quadratic_spline(bad, params, spline=spline, inverse=inverse, elementwise=True)
            for a, b in zip(got, clean, strict=True):
                assert a[7, 1].isnan()
                assert torch.equal(torch.cat([a[:7], a[8:]]), torch.cat([b[:7], b[8:]]))
            worse = params.clone()
            worse[7, : spline.params_per_element] = nan
            middle = torch.full_like(x, (spline.bottom + spline.top) / 2 if inverse else (spline.low + spline.high) / 2)
            got = rational_quadratic_spline(middle, worse, spline=spline, inverse=inverse, elementwise=True)
            assert all(t[7, 0].isnan() for t in got)
            assert all(t[7, 1:].isfinite().all() for t in got)


def test_infinite_inputs_go_where_the_tails_go():
    inf = float("inf")
    x = torch.tensor([[inf, -inf]])
    for name in ("linear", "unit", "circular"):
        _, params = drawn(SPLINES[name], (1, 2), torch.float32)
        for inverse in (False, True):
            y, each = rational_quadratic_spline(x, params, spline=SPLINES[name], inverse=inverse, elementwise=True)
            assert torch.equal(y, x)
            assert each.isfinite().all()


# --- autograd and what goes with it -----------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["linear", "zuko", "zuko circular", "circular", "unit", "to another interval"])
def test_first_and_second_derivatives(name, inverse):
    torch.manual_seed(10)
    spline = SPLINES[name]
    x, params = drawn(spline, (2, 2, 2), channels=1)
    options = {"spline": spline, "inverse": inverse, "channel_map": torch.tensor([-1, 0])}

    def call(x, params):
        return rational_quadratic_spline(x, params, **options)

    inputs = x.requires_grad_(), params.requires_grad_()
    assert torch.autograd.gradcheck(call, inputs, atol=1e-4)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4, fast_mode=True)


@all_traced
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(inverse, everything):
    torch.manual_seed(11)
    for fmt, elementwise in itertools.product(("contiguous", "channels_last"), (False, True)):
        x, params = drawn(Spline(), (2, 3, 3, 2), torch.float32, fmt=fmt, channels=2)
        mask, channel_map = torch.rand(1, 3, 3, 2) > 0.5, torch.tensor([1, -1, 0])
        form = Form.pack(Spline(), inverse, elementwise)
        running = None if elementwise else torch.zeros(2)
        ops = torch.ops.nfkernels
        traced = everything or (fmt == "contiguous" and elementwise == inverse)
        args = (x, params, channel_map, mask, running, *form)
        opcheck(ops._rational_quadratic_spline_forward, args, traced=traced)
        dl = torch.randn(x.shape if elementwise else 2)
        for need in ((True, True), (True, False), (False, True)):
            args = (x, params, torch.randn_like(x), dl, channel_map, mask, *form, *need)
            opcheck(ops._rational_quadratic_spline_backward, args, traced=traced)


def test_elementwise_logs_of_narrow_data_keep_its_layout():
    x, params = drawn(Spline(), (2, 3, 4, 5), torch.bfloat16, fmt="channels_last")
    with use_backend("native"):
        y, each = rational_quadratic_spline(x, params, elementwise=True)
    assert (y.dtype, each.dtype) == (torch.bfloat16, torch.float32)
    assert y.stride() == each.stride() == x.stride()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("elementwise", [False, True])
def test_compile_fullgraph_equals_eager(inverse, elementwise):
    torch.manual_seed(12)
    spline = Spline(5, "circular")

    def step(x, params):
        y, logdet = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=elementwise)
        return y.sin().sum() + logdet.sum()

    inputs = [t.requires_grad_() for t in drawn(spline, (3, 2, 4), torch.float32)]
    eager = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_func_transforms_and_forward_mode(inverse):
    torch.manual_seed(13)
    spline = Spline.unit(4)
    x, params = drawn(spline, (3, 2))

    def call(x, params):
        return rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)

    y, each = call(x, params)
    mapped = torch.func.vmap(lambda a, p: call(a[None], p[None])[0][0])(x, params)
    torch.testing.assert_close(mapped, y)
    _, tangent = torch.func.jvp(lambda a: call(a, params)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, each.exp())
    jacobian = torch.func.jacrev(lambda p: call(x, p)[0])(params)
    assert jacobian.shape == (*x.shape, *params.shape)


@pytest.mark.parametrize("name", SPLINES)
def test_the_logdet_is_that_of_the_jacobian(name):
    torch.manual_seed(14)
    spline = SPLINES[name]
    x, params = drawn(spline, (5, 3))
    if spline.half_turn:  # a bijection of the interval alone
        margin = 1e-3 * (spline.high - spline.low)
        x = x.clamp(spline.low + margin, spline.high - margin)
    for inverse in (False, True):
        x.requires_grad_()
        y, each = rational_quadratic_spline(x, params, spline=spline, inverse=inverse, elementwise=True)
        slope = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(slope.log(), each.detach(), rtol=1e-7, atol=1e-7)
        with torch.no_grad():
            back, other = rational_quadratic_spline(y, params, spline=spline, inverse=not inverse, elementwise=True)
            torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(other, -each, rtol=1e-6, atol=1e-6)
        x = x.detach()


def test_autocast_keeps_float32():
    x, params = drawn(Spline(), (20, 3), torch.float32)
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y, logdet = rational_quadratic_spline(x, params)
            back, _ = rational_quadratic_spline(y, params, inverse=True)
        assert y.dtype == logdet.dtype == torch.float32
        assert (back - x).abs().max() < 1e-4


def test_a_name_is_a_preset():
    x, params = drawn(Spline.zuko(), (4, 2))
    for a, b in zip(
        rational_quadratic_spline(x, params, spline="zuko"),
        rational_quadratic_spline(x, params, spline=Spline.zuko()),
        strict=True,
    ):
        assert torch.equal(a, b)


# --- errors -----------------------------------------------------------------------------------------------------------

X, P = torch.zeros(2, 3, 4), torch.zeros(2, 3 * 23, 4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"x must be \[B, C", lambda: rational_quadratic_spline(torch.zeros(3), P)),
        ("must be floating point", lambda: rational_quadratic_spline(X.long(), P)),
        ("narrower than the data, not wider", lambda: rational_quadratic_spline(X, P.double())),
        ("do not fit x of shape", lambda: rational_quadratic_spline(X, P[:, :, :2])),
        ("3 times 23: 8 widths, 8 heights and 7 slopes", lambda: rational_quadratic_spline(X, P[:, :46])),
        (
            "a multiple of 23",
            lambda: rational_quadratic_spline(X, P[:, :22], channel_map=torch.arange(3)),
        ),
        ("channel_map must be int64", lambda: rational_quadratic_spline(X, P, channel_map=torch.arange(2))),
        ("at least one transformed", lambda: rational_quadratic_spline(X, P[:, :0], channel_map=torch.arange(3))),
        ("mask must be bool", lambda: rational_quadratic_spline(X, P, mask=torch.ones(2, 3, 4))),
        ("does not go with elementwise", lambda: rational_quadratic_spline(X, P, logdet=X[:, 0, 0], elementwise=True)),
        (r"logdet must be torch.float32 \[2\]", lambda: rational_quadratic_spline(X, P, logdet=torch.zeros(3))),
        ("params is on meta", lambda: rational_quadratic_spline(X, P.to("meta"))),
        ("unknown spline 'cubic'", lambda: rational_quadratic_spline(X, P, spline="cubic")),
        ("whole number from 2 to 64", lambda: Spline(65)),
        ("unknown Spline.tails", lambda: Spline(tails="straight")),
        ("unknown Spline.sizes", lambda: Spline(sizes="exp")),
        ("unknown Spline.derivatives", lambda: Spline(derivatives="some")),
        ("finite low < high", lambda: Spline(low=1.0, high=1.0)),
        ("must be one where", lambda: Spline(bottom=0.0)),
        ("Spline.min_width must lie", lambda: Spline(min_width=0.2)),
        ("Spline.min_derivative must lie", lambda: Spline(min_derivative=0.0)),
        ("Spline.slope must lie", lambda: Spline(slope=1.0)),
        ("Spline.prescale must be finite", lambda: Spline(prescale=0.0)),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
