"""What holds for every layer of the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from registry import CASES, FIRST_CASES, Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nfkernels import nn as N

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
first_of_every_layer = pytest.mark.parametrize("case", FIRST_CASES, ids=lambda c: c.name)
NETWORKS = (N.ConvConditioner, N.ConvResidualNet, N.MaskedMLP, N.MLP, N.ResidualNet, N.GlowSteps, N.SplitPrior)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def inverse_lengths(layer: N.Bijection, given: dict) -> dict:
    return {**given, "lengths": layer.lengths_after(given["lengths"])} if "lengths" in given else given


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_round_trip_both_ways(case: Case, dtype):
    layer = case.make().to(dtype)
    x, given = case.data(dtype)
    z, forward = layer(x, **given)
    back, inverse = layer.inverse(z, **inverse_lengths(layer, given))
    assert z.dtype == back.dtype == forward.dtype == inverse.dtype == dtype
    assert forward.shape == inverse.shape == x.shape[:1]
    torch.testing.assert_close(back, x, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(inverse, -forward, atol=10 * TOLERANCE[dtype], rtol=0)
    # And the other way round, from a latent that no data made.
    z = case.moved(z)
    x, inverse = layer.inverse(z, **inverse_lengths(layer, given))
    again, forward = layer(x, **given)
    torch.testing.assert_close(again, z, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(inverse, -forward, atol=10 * TOLERANCE[dtype], rtol=0)


@every_layer
def test_logdet_is_that_of_the_dense_jacobian(case: Case):
    layer = case.make().double()
    x, given = case.data(torch.float64)
    z, logdet = layer(x, **given)
    for i in range(x.shape[0]):
        one = {k: v[i : i + 1] for k, v in given.items()}
        jacobian = torch.autograd.functional.jacobian(
            lambda v, i=i, one=one: layer(v.reshape(x[i : i + 1].shape), **one)[0].flatten(), x[i].flatten()
        )
        if case.lengths is not None:  # padding is zero on both sides: only valid positions count
            rows = _valid(z[i], inverse_lengths(layer, one)["lengths"])
            jacobian = jacobian[rows][:, _valid(x[i], one["lengths"])]
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9, rtol=1e-9)


def _valid(sample: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(sample.shape[-1]) < lengths).expand(sample.shape).flatten()


@first_of_every_layer
def test_gradients_to_second_order(case: Case):
    layer = case.make().double()
    x, given = case.data(torch.float64)
    x, given = x[:2], {k: v[:2] for k, v in given.items()}
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().requires_grad_() for p in layer.parameters()]

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,), given)

    def inverse(z, *values):
        module = copy.copy(layer)
        swapped = N.Inverse(module)
        state = {f"bijection.{n}": v for n, v in zip(names, values)}
        return torch.func.functional_call(swapped, state, (z,), inverse_lengths(layer, given))

    x = x.requires_grad_()
    z = layer(x, **given)[0].detach().requires_grad_()
    for function, start in ((forward, x), (inverse, z)):
        assert torch.autograd.gradcheck(function, (start, *values), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (start, *values), fast_mode=True)


@first_of_every_layer
def test_compiled_in_one_graph_equals_eager(case: Case):
    torch._dynamo.reset()
    layer = case.make()
    x, given = case.data()
    x.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        z, logdet = function(x, **given)
        results.append((z, logdet, *torch.autograd.grad(z.square().sum() + logdet.sum(), x)))
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-5)


@every_layer
def test_saved_and_loaded_it_is_the_same(case: Case, tmp_path):
    layer = case.make()
    x, given = case.data()
    expected = layer(x, **given)
    N.save(layer, tmp_path / "layer.safetensors")
    state = torch.random.get_rng_state()
    loaded = N.load(tmp_path / "layer.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state), "loading moved the caller's random stream"
    assert type(loaded) is type(layer)
    assert not loaded.training
    for a, b in zip(loaded(x, **given), expected):
        assert torch.equal(a, b)


@every_layer
def test_empty_batch(case: Case):
    layer = case.make().train()
    x, given = case.data()
    x, given = x[:0].requires_grad_(), {k: v[:0] for k, v in given.items()}
    z, logdet = layer(x, **given)
    assert z.shape[0] == 0
    assert logdet.shape == (0,)
    (z.sum() + logdet.sum()).backward()
    assert layer.inverse(z.detach(), **inverse_lengths(layer, given))[0].shape == x.shape


@pytest.mark.covering
@every_layer
@pytest.mark.parametrize("real", [False, True], ids=["fake-layer", "real-layer"])
def test_shapes_without_values(case: Case, real):
    """Fake tensors say they are on the CPU and have nothing to look at."""
    layer = case.make()
    mode = FakeTensorMode(allow_non_fake_inputs=real)
    if not real:
        for module in layer.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: t if t is None else mode.from_tensor(t) for name, t in held.items()})
    x, given = case.data()
    x, given = mode.from_tensor(x), {name: mode.from_tensor(t) for name, t in given.items()}
    with mode:
        z, forward = layer(x, **given)
        back, inverse = layer.inverse(z, **inverse_lengths(layer, given))
    assert back.shape == x.shape
    assert forward.shape == inverse.shape == x.shape[:1]


@every_layer
def test_memory_layout_does_not_matter(case: Case):
    layer = case.make()
    x, given = case.data()
    expected = layer(x, **given)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    channels = torch.zeros(x.shape[0], x.shape[1] + 2, *x.shape[2:])
    channels[:, 1:-1] = x
    layouts = {"every other": wide[..., ::2], "inner channels": channels[:, 1:-1]}
    layouts["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.dim() == 4:
        layouts["channels last"] = x.contiguous(memory_format=torch.channels_last)
    for name, view in layouts.items():
        for a, b in zip(layer(view, **given), expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@every_layer
def test_low_precision_parameters_keep_fp32_data(case: Case):
    if "sequential" in case.name:
        pytest.skip("a network that is not ours takes data in its own dtype only")
    layer = case.make().bfloat16()
    x, given = case.data()
    z, logdet = layer(x, **given)
    assert z.dtype == logdet.dtype == torch.float32
    back, inverse = layer.inverse(z, **inverse_lengths(layer, given))
    # Each network reads reconstructed data: a rounding that flips in bfloat16 shows, a wrong type would show more.
    torch.testing.assert_close(back, x, atol=2e-2, rtol=0)
    assert inverse.dtype == torch.float32


@every_layer
def test_low_precision_data_comes_back_in_its_type(case: Case):
    layer = case.make().bfloat16()
    x, given = case.data(torch.bfloat16)
    z, logdet = layer(x, **given)
    assert z.dtype == torch.bfloat16
    assert logdet.dtype == torch.float32
    # The same (rounded) parameters in float32: what differs is the rounding of the data and inside the networks, where
    # the worst layer here is off by 0.6 % of the largest value and by 0.012 in the log-determinant.
    given = {k: v.float() if k == "context" else v for k, v in given.items()}
    expected, total = layer.float()(x.float(), **given)
    largest = max([1.0, *expected.detach().abs().flatten().tolist()])
    torch.testing.assert_close(z.float(), expected, atol=1e-2 * largest, rtol=0)
    torch.testing.assert_close(logdet, total, atol=2e-2, rtol=2e-2)


@every_layer
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=["uint8", "int64"])
def test_whole_numbers_are_refused(case: Case, dtype):
    if case.name == "empty-chain":
        pytest.skip("a chain without layers takes anything")
    layer = case.make()
    x, given = case.data()
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=r"floating point data, got torch\.|this flow has latents"):
            function(torch.ones(x.shape, dtype=dtype), **given)


@pytest.mark.parametrize("case", [c for c in CASES if c.lengths], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.double(), r"lengths must be integers \[B\], got torch\.float64"),
        (lambda v: v > 0, r"lengths must be integers \[B\], got torch\.bool"),
        (lambda v: v[:-1], r"lengths \[B\] go with data \[B, C, T\]"),
        (lambda v: 6 * v + 6, r"lengths must be from 0 to \d for data .*, got \d+"),
        (lambda v: v - 6, r"lengths must be from 0 to \d for data .*, got -\d"),
    ],
    ids=["float", "bool", "shape", "long", "negative"],
)
def test_lengths_that_are_none_are_refused(case: Case, change, message):
    layer = case.make()
    x, given = case.data()
    z, _ = layer(x, **given)
    for function, data in ((layer, x), (layer.inverse, z)):
        with pytest.raises(ValueError, match=message):
            function(data, lengths=change(given["lengths"]), context=given.get("context"))


@every_layer
def test_a_layer_that_says_it_uses_no_context_uses_none(case: Case):
    layer = case.make()
    x, given = case.data()
    assert layer.uses_context == (case.context is not None)
    if not layer.uses_context:
        for a, b in zip(layer(x, torch.randn(x.shape[0], 3), **given), layer(x, **given)):
            assert torch.equal(a, b)


@every_layer
def test_autocast_reaches_conditioners_only(case: Case):
    layer = case.make()
    x, given = case.data()
    exact, _ = layer(x, **given)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = layer(x, **given)
        back, _ = layer.inverse(z, **inverse_lengths(layer, given))
    assert z.dtype == logdet.dtype == back.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=2e-2, rtol=0)
    networks = any(isinstance(m, NETWORKS) for m in layer.modules())
    if not networks and "sequential" not in case.name:
        assert torch.equal(z, exact), "data maths must not notice autocast"


@every_layer
def test_every_parameter_gets_a_gradient(case: Case):
    layer = case.make()
    x, given = case.data()
    z, logdet = layer(x, **given)
    loss = 0.5 * z.square().sum() - logdet.sum()
    parameters = dict(layer.named_parameters())
    if not parameters:
        return
    for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
        assert torch.isfinite(grad).all(), name
        # A single channel is mixed by its diagonal alone; triangles and padding rows get zeros.
        if grad.numel() > 1 and case.shape[1] > 1:
            assert grad.abs().sum() > 0, name


@every_layer
def test_swapped_directions(case: Case):
    layer = case.make()
    x, given = case.data()
    z, logdet = layer(x, **given)
    back, inverse = layer.inv(z, **inverse_lengths(layer, given))
    assert layer.inv.inv is layer or isinstance(layer, N.Inverse)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(inverse, -logdet, atol=1e-3, rtol=0)


TRANSFORMED = [
    "affine-mlp", "coupling-checkerboard", "glow-steps", "multi-scale", "conv1x1-full",
    "periodic-2d-odd", "periodic-1d-depthwise", "symmetric-2d", "softplus", "logit-alpha", "permutation",
    "affine-mask", "residual-net", "spline-coupling", "spline-coupling-mixed", "elementwise-spline", "circular-spline",
    "columns",
]  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMED)
def test_function_transforms(name):
    case = next(c for c in CASES if c.name == name)
    layer = case.make().double()
    x, given = case.data(torch.float64)
    z, logdet = layer(x, **given)
    mapped = torch.func.vmap(lambda v: tuple(r[0] for r in layer(v[None])))(x)
    torch.testing.assert_close(mapped[0], z)
    torch.testing.assert_close(mapped[1], logdet)
    jacobian = torch.func.jacfwd(lambda v: layer(v.reshape(1, *x.shape[1:]))[0].flatten())(x[0].flatten())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])
