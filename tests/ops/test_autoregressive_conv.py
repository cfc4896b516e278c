"""Autoregressive convolution: both directions against dense matrices and a loop over pixels, kernels against the
reference in float64, gradients, transforms, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import all_traced, opcheck, tensor

from nfkernels import autoregressive_conv, use_backend
from nfkernels.nn import EmergingConv2d
from nfkernels.ops import _library

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
KINDS = list(itertools.product(["forward", "reverse"], ["square", "raster"]))
every_kind = pytest.mark.parametrize(("order", "mask"), KINDS)


def kernel(channels, size, dtype=torch.float64, scale=0.5):
    """Taps whose inverse stays small, and a diagonal around 1."""
    weight = scale * torch.randn(channels, channels, size, size, dtype=torch.float64) / (size * channels**0.5)
    centre = weight[:, :, size // 2, size // 2]
    centre.diagonal().copy_(0.8 + 0.4 * torch.rand(channels, dtype=torch.float64))
    return weight.to(dtype)


def masked(weight, order, mask):
    """What conv2d takes: the taps and channels that the mask leaves, entry by entry."""
    channels, _, size, _ = weight.shape
    keep, half = torch.zeros_like(weight), size // 2
    for i, j, o, c in itertools.product(range(size), range(size), range(channels), range(channels)):
        h, w = (half - i, half - j) if order == "forward" else (i - half, j - half)
        later = h > 0 or (h == 0 and w > 0) if mask == "raster" else h >= 0 and w >= 0 and (h, w) != (0, 0)
        centre = (h, w) == (0, 0) and (c <= o if order == "forward" else c >= o)
        keep[o, c, i, j] = later or centre
    return weight * keep


def by_pixels(y, weight, bias, order, mask):
    """The inverse as one writes it first: pixel after pixel, a triangular solve each."""
    weight, half, (height, width) = masked(weight, order, mask), weight.shape[2] // 2, y.shape[2:]
    centre = weight[:, :, half, half]
    x = torch.zeros_like(y)
    pixels = list(itertools.product(range(height), range(width)))
    for h, w in pixels if order == "forward" else reversed(pixels):
        rest = y[:, :, h, w] - (0 if bias is None else bias)
        for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
            a, b = h + i - half, w + j - half
            if (i, j) != (half, half) and 0 <= a < height and 0 <= b < width:
                rest = rest - x[:, :, a, b] @ weight[:, :, i, j].t()
        x[:, :, h, w] = torch.linalg.solve_triangular(centre, rest.t(), upper=order == "reverse").t()
    return x


def dense(weight, order, mask, shape):
    """The matrix of the convolution on one sample."""
    eye = torch.eye(shape.numel(), dtype=weight.dtype).reshape(-1, *shape)
    return F.conv2d(eye, masked(weight, order, mask), padding=weight.shape[2] // 2).flatten(1).t()


@pytest.mark.covering
@every_kind
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_both_directions_are_those_of_the_dense_matrix(order, mask, size):
    for channels, height, width in ((1, 4, 5), (2, 1, 7), (3, 5, 1), (3, 4, 3), (2, 1, 1)):
        weight, bias = kernel(channels, size), torch.randn(channels, dtype=torch.float64)
        x = torch.randn(2, channels, height, width, dtype=torch.float64)
        matrix = dense(weight, order, mask, x.shape[1:])
        pixel = torch.arange(height * width).repeat(channels)
        ahead = pixel[:, None] < pixel if order == "forward" else pixel[:, None] > pixel
        assert not matrix[ahead].any()
        for backend in ("reference", "native"):
            with use_backend(backend):
                y = autoregressive_conv(x, weight, bias, order=order, mask=mask)
                back = autoregressive_conv(x, weight, bias, order=order, mask=mask, inverse=True)
            shift = bias[:, None].expand(channels, height * width).flatten()
            torch.testing.assert_close(y.flatten(1), x.flatten(1) @ matrix.t() + shift)
            want = torch.linalg.solve(matrix, (x.flatten(1) - shift).t()).t()
            torch.testing.assert_close(back.flatten(1), want)
        diagonal = weight[:, :, size // 2, size // 2].diagonal()
        logdet = height * width * diagonal.abs().log().sum()
        torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, logdet)


@every_kind
def test_inverse_is_the_loop_over_pixels(order, mask):
    for channels, size, shape in ((5, 3, (3, 5, 6, 7)), (12, 5, (2, 12, 5, 4))):
        y, weight, bias = torch.randn(shape).double(), kernel(channels, size), torch.randn(channels).double()
        got = autoregressive_conv(y, weight, bias, order=order, mask=mask, inverse=True)
        torch.testing.assert_close(got, by_pixels(y, weight, bias, order, mask))


# --- kernels against the reference ------------------------------------------------------------------------------------


def run(x, weight, bias, dy, upcast=False, **options):
    leaves = [None if t is None else (t.double() if upcast else t).detach().requires_grad_() for t in (x, weight, bias)]
    y = autoregressive_conv(*leaves, **options)
    inputs = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check(got, plain, exact, terms):
    """Errors at most twice those of plain PyTorch; ``terms`` are those of the longest sum."""
    compute = torch.float64 if plain[0].dtype == torch.float64 else torch.float32
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == c.shape
        if a.numel():
            slack = 4 * EPS[a.dtype] * c.abs().max().clamp(min=1) * (terms**0.5 if a.dtype == compute else 1)
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + slack


def against_reference(x, weight, bias, dy, **options):
    with use_backend("native"):
        got = run(x, weight, bias, dy, **options)
    with use_backend("reference"):
        plain = run(x, weight, bias, dy, **options)
        exact = run(x, weight, bias, dy, upcast=True, **options)
    assert got[0].stride() == torch.empty_like(x).stride()
    check(got, plain, exact, max(x.shape[1] * weight.shape[2] ** 2, x.numel() // max(x.shape[1], 1)))


BATCHES = [0, 1, 2, 5, 16, 17, 40]
IMAGES = [(4, 5), (1, 9), (6, 1), (3, 3), (7, 4), (1, 1), (2, 0)]


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12, 16, 17, 33])
def test_native_matches_reference(channels, dtype):
    formats = ["contiguous", "channels_last", "sliced"]
    for i, ((order, mask), size, inverse) in enumerate(itertools.product(KINDS, [3, 5, 1, 7], [False, True])):
        if channels > 12 and size > 3 and dtype != torch.float32:
            continue
        i += 3 * channels
        batch, image, fmt = BATCHES[i % len(BATCHES)], IMAGES[(i // 3) % len(IMAGES)], formats[i % 3]
        if size > 3:
            batch = min(batch, 5)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = tensor(batch, channels, image, dtype, fmt), tensor(batch, channels, image, dtype, fmt)
        bias = torch.randn(channels, dtype=compute) if i % 2 else None
        options = {"order": order, "mask": mask, "inverse": inverse}
        against_reference(x, kernel(channels, size, compute), bias, dy, **options)


SIZES = [(3, 5, 70, 40), (33, 12, 9, 8), (2, 96, 12, 12), (1, 33, 160, 2), (2, 130, 3, 3), (1, 400, 2, 3)]


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes_past_one_tile(shape, inverse):
    """Rows longer than a block, weights and wavefronts past shared memory, a group of samples and some more."""
    for order, mask in KINDS[:2]:
        x, dy, weight = torch.randn(shape), torch.randn(shape), kernel(shape[1], 3, torch.float32)
        against_reference(x, weight, torch.randn(shape[1]), dy, order=order, mask=mask, inverse=inverse)


@every_kind
def test_float32_round_trip_is_as_exact_as_the_map_allows(order, mask):
    for scale in (0.3, 1.5):
        weight = kernel(4, 3, torch.float32, scale)
        matrix = dense(weight.double(), order, mask, torch.Size((4, 8, 8)))
        condition = torch.linalg.cond(matrix).item()
        x = torch.randn(17, 4, 8, 8)
        options = {"order": order, "mask": mask}
        for backend in ("reference", "native"):
            with use_backend(backend):
                back = autoregressive_conv(autoregressive_conv(x, weight, **options), weight, inverse=True, **options)
            assert ((back - x).norm() / x.norm()).item() < 4e-7 * condition


@pytest.mark.parametrize("mask", ["square", "raster"])
def test_float32_round_trip_of_the_layer(mask):
    layer = EmergingConv2d(4, mask=mask)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
        x = torch.randn(9, 4, 7, 6)
        z, logdet = layer(x)
        back, _ = layer.inverse(z)
        eye = torch.eye(4 * 42, dtype=torch.float64).reshape(-1, 4, 7, 6)
        layer.double()
        matrix = layer(eye)[0].flatten(1).t() - layer(torch.zeros_like(eye[:1]))[0].flatten()[:, None]
    assert ((back - x).norm() / x.norm()).item() < 4e-7 * torch.linalg.cond(matrix).item()
    torch.testing.assert_close(logdet[0].double(), torch.linalg.slogdet(matrix).logabsdet, rtol=1e-5, atol=1e-5)
    # The square masks compose to the full square and no more.
    centre = matrix.reshape(4, 7, 6, 4, 7, 6)[:, 3, 3].abs().amax((0, 1))
    if mask == "square":
        reach = torch.zeros(7, 6, dtype=torch.bool)
        reach[2:5, 2:5] = True
        assert torch.equal(centre > 0, reach)


def test_sequences_are_images_of_one_row():
    x, weight, bias = torch.randn(3, 4, 9), kernel(4, 5, torch.float32)[:, :, 2], torch.randn(4)
    image = torch.zeros(4, 4, 5, 5)
    image[:, :, 2] = weight
    for (order, mask), inverse in itertools.product(KINDS, [False, True]):
        options = {"order": order, "mask": mask, "inverse": inverse}
        want = autoregressive_conv(x[:, :, None], image, bias, **options)[:, :, 0]
        torch.testing.assert_close(autoregressive_conv(x, weight, bias, **options), want)


@pytest.mark.parametrize("inverse", [False, True])
def test_zero_on_the_diagonal_is_not_finite(inverse):
    weight = kernel(3, 3, torch.float32)
    weight[1, 1, 1, 1] = 0
    assert autoregressive_conv(torch.randn(2, 3, 4, 4), weight, inverse=inverse).isfinite().all() == (not inverse)


# --- gradients, transforms --------------------------------------------------------------------------------------------


@pytest.mark.covering
@every_kind
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(order, mask, inverse):
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = kernel(2, 3).requires_grad_(), torch.randn(2).double().requires_grad_()

    def f(x, weight, bias=None):
        return autoregressive_conv(x, weight, bias, order=order, mask=mask, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x.detach(), weight), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["native", "reference", "create_graph"])
def test_sums_of_an_inverse_are_not_of_rounded_numbers(way, dtype):
    x, weight, dy = (
        torch.randn(4, 3, 16, 16).to(dtype),
        kernel(3, 3, torch.float32),
        torch.randn(4, 3, 16, 16).to(dtype),
    )
    # What x is rounded to is saved, and dweight is made of it: dbias is of the solution alone.
    leaves = [x.requires_grad_(), weight.requires_grad_(), torch.zeros(3, requires_grad=True)]
    with use_backend("reference" if way == "reference" else "native"):
        y = autoregressive_conv(*leaves, inverse=True)
        dx, _, dbias = torch.autograd.grad(y, leaves, dy, create_graph=way == "create_graph")
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(autoregressive_conv(*wide, inverse=True), wide, dy.double())
    assert dx.dtype == dtype
    assert (dx.double() - exact[0]).norm() < EPS[dtype] * exact[0].norm()
    assert (dbias.double() - exact[2]).norm() < 1e-5 * exact[2].norm()


@every_kind
@pytest.mark.parametrize("inverse", [False, True])
def test_what_the_mask_hides_changes_nothing(order, mask, inverse):
    x, weight = torch.randn(2, 3, 4, 4), kernel(3, 5, torch.float32)
    hidden = masked(torch.ones_like(weight), order, mask) == 0
    options = {"order": order, "mask": mask, "inverse": inverse}
    _, _, dweight = run(x, weight, None, torch.ones_like(x), **options)[:3]
    assert not dweight[hidden].any()
    assert dweight[~hidden].all()
    noise = torch.where(hidden, 100.0, weight)
    assert torch.equal(autoregressive_conv(x, noise, **options), autoregressive_conv(x, weight, **options))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_no_channels(backend, inverse):
    x, weight, bias = (torch.zeros(s, requires_grad=True) for s in ((2, 0, 3, 4), (0, 0, 3, 3), (0,)))
    with use_backend(backend):
        y = autoregressive_conv(x, weight, bias, inverse=inverse)
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (weight.grad.shape, bias.grad.shape) == (weight.shape, bias.shape)


@pytest.mark.covering
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_only_the_needed_gradients_are_made(needed, inverse):
    x, weight, bias = torch.randn(2, 5, 3, 4), kernel(5, 3, torch.float32), torch.randn(5)
    leaves = [t.requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)]
    autoregressive_conv(*leaves, inverse=inverse).square().sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needed
    wide = [t.detach().double().requires_grad_() for t in leaves]
    autoregressive_conv(*wide, inverse=inverse).square().sum().backward()
    for t, w in zip(leaves, wide, strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 12, 8, 8), (3, 8, 5, 7), (21, 3, 4, 4)])
def test_same_bits_for_any_number_of_threads(shape):
    x, weight = torch.randn(shape), kernel(shape[1], 3, torch.float32)
    for inverse in (False, True):
        outcomes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                with use_backend("native"), torch.no_grad():
                    outcomes.append(autoregressive_conv(x, weight, torch.ones(shape[1]), inverse=inverse))
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_not_finite_goes_where_it_should(value, inverse):
    x, weight = torch.randn(20, 3, 5, 6), kernel(3, 3, torch.float32)
    for row in (3, 18):
        bad = x.clone()
        bad[row, 1, 2, 3] = value
        results = []
        for backend in ("reference", "native"):
            with use_backend(backend):
                clean, dirty = (autoregressive_conv(v, weight, inverse=inverse) for v in (x, bad))
            others = torch.arange(20) != row
            assert torch.equal(clean[others], dirty[others])
            results.append(dirty.isfinite())
        assert torch.equal(*results)


def test_autocast_keeps_float32():
    x, weight = torch.randn(2, 6, 8, 8), kernel(6, 3, torch.float32)
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = autoregressive_conv(x, weight)
            back = autoregressive_conv(y, weight, inverse=True)
        assert y.dtype == torch.float32
        assert (back - x).abs().max() < 1e-5


@all_traced
@every_kind
@pytest.mark.parametrize("solve", [False, True])
def test_opcheck(order, mask, solve, everything):
    taps = 4 if mask == "square" else 5
    for x in (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)):
        args = (x, 0.2 * torch.randn(taps, 4, 4), torch.randn(4), 3, 3, mask == "raster", order == "reverse", solve)
        traced = everything or (x.is_contiguous() and order == "forward")
        opcheck(torch.ops.nfkernels._autoregressive_conv_forward, args, traced=traced)


def test_raw_op_refuses_other_shapes():
    raw = _library._state.ops["_autoregressive_conv_forward"]
    x, bias = torch.randn(2, 4, 3, 3), torch.randn(4)
    for weight, b, size in ((torch.zeros(3, 4, 4), bias, 3), (torch.zeros(4, 4, 4), bias[:3], 3),
                            (torch.zeros(4, 4, 4).double(), bias, 3), (torch.zeros(4, 4, 4), bias, 2)):  # fmt: skip
        with pytest.raises(RuntimeError, match="nfkernels"):
            raw.on("native", x, weight, b, size, size, False, False, True)


@pytest.mark.covering
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("mask", ["square", "raster"])
@pytest.mark.parametrize("inverse", [False, True])
def test_compile_fullgraph_equals_eager(order, mask, inverse):
    def step(x, weight, bias):
        return autoregressive_conv(x, weight, bias, order=order, mask=mask, inverse=inverse).sin().sum()

    torch._dynamo.reset()
    inputs = [torch.randn(2, 4, 5, 3), kernel(4, 3, torch.float32), torch.randn(4)]
    inputs = [t.requires_grad_() for t in inputs]
    eager = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_func_transforms_and_forward_mode(inverse):
    x, weight = torch.randn(3, 4, 2, 3).double(), kernel(4, 3)

    def f(x, weight=weight):
        return autoregressive_conv(x, weight, order="reverse", mask="raster", inverse=inverse)

    torch.testing.assert_close(torch.func.vmap(lambda a: f(a[None])[0])(x), f(x))
    _, tangent = torch.func.jvp(f, (x,), (x,))
    torch.testing.assert_close(tangent, f(x))
    assert torch.func.jacrev(lambda w: f(x, w))(weight).shape == (*x.shape, 4, 4, 3, 3)


def test_shapes_on_a_device_that_holds_none():
    with torch.device("meta"):
        layer, x = EmergingConv2d(4), torch.empty(2, 4, 5, 3)
    for direction in (layer, layer.inverse):
        y, logdet = direction(x)
        assert (y.shape, logdet.shape) == (x.shape, (2,))


X, W = torch.zeros(2, 4, 3, 3), torch.zeros(4, 4, 3, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be", lambda: autoregressive_conv(torch.zeros(3, 4), W)),
        ("floating point", lambda: autoregressive_conv(X.long(), W)),
        (r"weight must be \[4, 4, k, k\], k odd", lambda: autoregressive_conv(X, W[..., :2])),
        (r"weight must be \[4, 4, k, k\], k odd", lambda: autoregressive_conv(X, W[..., :2, :2])),
        (r"weight must be \[4, 4, k\], k odd", lambda: autoregressive_conv(X[..., 0], W)),
        (r"bias must be \[4\]", lambda: autoregressive_conv(X, W, torch.zeros(3))),
        ("weight is on meta", lambda: autoregressive_conv(X, W.to("meta"))),
        ("weight must be floating point, got torch.int64", lambda: autoregressive_conv(X, W.long())),
        ("weight must be floating point, got torch.complex64", lambda: autoregressive_conv(X, W.cfloat())),
        ("bias must be floating point, got torch.bool", lambda: autoregressive_conv(X, W, torch.zeros(4).bool())),
        ("a kernel of at most 1023 taps a side", lambda: autoregressive_conv(X[..., 0], torch.zeros(4, 4, 1025))),
        ("unknown order 'back'", lambda: autoregressive_conv(X, W, order="back")),
        ("unknown mask 'round'", lambda: autoregressive_conv(X, W, mask="round")),
        ("^kernel_size must be an odd number, got 2$", lambda: EmergingConv2d(4, 2)),
        (r"^kernel_size must be an odd number, got \(3, 3\)$", lambda: EmergingConv2d(4, (3, 3))),
        ("^EmergingConv2d needs at least 1 channel, got 0$", lambda: EmergingConv2d(0)),
        ("unknown mask 'round'", lambda: EmergingConv2d(4, mask="round")),
        ("takes images", lambda: EmergingConv2d(4)(X[..., 0])),
        ("no sequence axis", lambda: EmergingConv2d(4)(X, lengths=torch.tensor([1, 2]))),
    ],
)
def test_errors_name_what_was_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_singular_layer_says_so():
    layer = EmergingConv2d(3)
    with torch.no_grad():
        layer.log_s[1, 2] = -200
    for direction in (layer, layer.inverse, layer.log_abs_det):
        with pytest.raises(ValueError, match="EmergingConv2d is singular: log_s reached 200"):
            direction(torch.zeros(1, 3, 2, 2))


def test_the_log_determinant_of_a_layer_is_rounded_once():
    layer, x = EmergingConv2d(64), torch.zeros(2, 64, 5, 7)
    with torch.no_grad():
        layer.log_s.fill_(1e-5)
        layer.log_s[0, 7], layer.log_s[1, 9] = 60, -60
    want = (35 * layer.log_s.double().sum()).float().expand(2)
    assert torch.equal(layer.log_abs_det(x), want)
    assert torch.equal(layer(x)[1], want)
    assert torch.equal(layer.inverse(x)[1], -want)
