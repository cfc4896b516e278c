"""Scale, shift and order of the channels in one pass: against its definition, its gradients, its layouts."""

import pytest
import torch

from nfkernels import channel_affine, use_backend
from nfkernels.ops.channel_affine import permute_channels

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
SHAPES = [(3, 5, 7, 11), (2, 8, 16, 20), (4, 1, 3), (2, 3, 700), (70, 5), (0, 4, 3), (2, 4, 0), (1, 6, 2, 3, 2)]


def made(shape, dtype=torch.float32, ordered=True):
    torch.manual_seed(0)
    channels, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    scale, shift = torch.randn(2, channels, dtype=wide).unbind()
    return x, scale, shift, torch.randperm(channels) if ordered else None


def run(x, scale, shift, order, dy, wide=False):
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, scale, shift)]
    y = channel_affine(*leaves, order)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
def test_it_is_its_definition(shape, dtype, ordered, layout):
    x, scale, shift, order = made(shape, dtype, ordered)
    if layout == "channels_last":
        if len(shape) != 4:
            pytest.skip("for images")
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat([x, x], 1)[:, : shape[1]]
    dy = torch.randn(shape)
    got = run(x, scale, shift, order, dy.to(dtype))
    assert got[0].dtype == got[1].dtype == dtype
    assert got[2].dtype == scale.dtype
    with use_backend("reference"):
        exact = run(x, scale, shift, order, dy.to(dtype), wide=True)
    index = torch.arange(shape[1]) if order is None else order
    ones = [1] * (len(shape) - 2)
    y = x.double()[:, index] * scale.double().view(-1, *ones) + shift.double().view(-1, *ones)
    torch.testing.assert_close(exact[0], y, rtol=1e-12, atol=1e-12)
    for g, e in zip(got, exact, strict=True):
        assert g.shape == e.shape
        terms = max(1, dy.numel() // max(1, dy.shape[1])) ** 0.5 if g.dim() == 1 else 1
        slack = 8 * EPS[g.dtype] * terms * (1 + (e.abs().max() if e.numel() else 0))
        assert not g.numel() or (g.double() - e).abs().max() <= slack


@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (5, 3)], ids=str)
def test_gradients_of_any_order(shape):
    x, scale, shift, order = made(shape, torch.float64)
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    torch.autograd.gradcheck(lambda *a: channel_affine(*a, order), leaves)
    torch.autograd.gradgradcheck(lambda *a: channel_affine(*a, order), leaves)
    inverse = order.argsort()
    torch.autograd.gradgradcheck(lambda a: permute_channels(a, order, inverse).square(), leaves[:1])


def test_expanded_gradients_and_partial_ones():
    x, scale, shift, order = made((3, 4, 5, 6))
    for wanted in range(3):
        leaves = [x.clone(), scale.clone(), shift.clone()]
        leaves[wanted].requires_grad_()
        channel_affine(*leaves, order).sum().backward()
        expected = [
            scale[order.argsort()].view(1, -1, 1, 1).expand_as(x),
            x[:, order].sum((0, 2, 3)),
            torch.full((4,), 90.0),
        ]
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted])


def test_transforms_and_compile():
    x, scale, shift, order = made((3, 4, 2, 3), torch.float64)

    def f(a, b, c):
        return channel_affine(a, b, c, order)

    expected = f(x, scale, shift)
    torch.testing.assert_close(torch.func.vmap(lambda a: f(a[None], scale, shift)[0])(x), expected)
    _, tangent = torch.func.jvp(f, (x, scale, shift), (x, scale, shift))
    torch.testing.assert_close(tangent, 2 * expected - shift.view(-1, 1, 1) + 0 * x)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scale.requires_grad_(), shift), expected)


def test_opcheck():
    x, scale, shift, order = made((3, 4, 5))
    for op, args in (
        (torch.ops.nfkernels._channel_affine_forward, (x, scale, shift, order)),
        (torch.ops.nfkernels._channel_affine_backward, (x, x, scale, order)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(3)}, r"scale must be \[4\]"),
        ({"shift": torch.ones(4, dtype=torch.int64)}, "shift must be floating point"),
        ({"order": torch.zeros(4)}, "order must be int64"),
        ({"x": torch.zeros(4)}, r"x must be \[B, C, \*spatial\]"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int64)}, "x must be floating point"),
    ],
)
def test_errors(change, message):
    given = {"x": torch.zeros(2, 4, 3), "scale": torch.ones(4), "shift": torch.ones(4), "order": torch.arange(4)}
    with pytest.raises(ValueError, match=message):
        channel_affine(**(given | change))


def test_what_is_no_permutation_is_refused():
    with use_backend("native"), pytest.raises(RuntimeError, match="permutation"):
        channel_affine(torch.zeros(2, 3, 4), torch.ones(3), torch.ones(3), torch.tensor([0, 0, 2]))
