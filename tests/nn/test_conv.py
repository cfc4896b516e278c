"""A conditioner's convolution against PyTorch's calls that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nfkernels.nn import conv as module
from nfkernels.nn.conv import conv, weight_gradient


def given(dtype, *, kernel=3, inputs=5, outputs=8, channels_last=True, requires_grad=True):
    torch.manual_seed(0)
    x, w = torch.randn(2, inputs, 6, 7), 0.3 * torch.randn(outputs, inputs, kernel, kernel)
    b = torch.randn(outputs)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, w = (t.to(dtype).contiguous(memory_format=layout) for t in (x, w))
    return [t.requires_grad_(requires_grad) for t in (x, w, b.to(dtype))]


@pytest.fixture
def counted(monkeypatch):
    calls = []
    fused = module._onednn
    monkeypatch.setitem(module._FORWARD, "cpu", lambda *args: (calls.append(1), fused(*args))[1])
    return calls


def plain(x, w, b, *, relu):
    y = (F.conv2d if w.dim() == 4 else F.conv1d)(x, w, b, padding=w.shape[-1] // 2)
    return F.relu(y) if relu else y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 8), (8, 5)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_values_and_gradients(kernel, inputs, outputs, relu, dtype, tolerance, counted):
    x, w, b = given(dtype, kernel=kernel, inputs=inputs, outputs=outputs)
    y = conv(x, w, b, kernel // 2, relu=relu)
    assert counted == [1]
    expected = plain(x, w, b, relu=relu)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w, b), dy)
    exact = torch.autograd.grad(plain(*(t.double() for t in (x, w, b)), relu=relu), (x, w, b), dy.double())
    for a, e in zip(found, exact):
        torch.testing.assert_close(a, e.to(dtype), rtol=tolerance, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (2, 5)])
def test_the_weights_gradient_by_one_product(side, inputs, outputs, size):
    x, dy = (torch.randn(3, c, *size, dtype=torch.float64) for c in (inputs, outputs))
    w = torch.zeros(outputs, inputs, side, side, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=side // 2), w, dy)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = weight_gradient(x.to(memory_format=layout), dy.to(memory_format=layout), side)
        torch.testing.assert_close(found, expected)


def test_it_is_fused_without_gradients_too(counted):
    x, w, b = given(torch.bfloat16, requires_grad=False)
    assert torch.equal(conv(x, w, b, 1, relu=True), plain(x, w, b, relu=True))
    assert counted == [1]


@pytest.mark.parametrize("wanted", [(0, 2), (1,), (0,), (1, 2)])
def test_only_what_is_wanted_gets_a_gradient(wanted):
    given_all = given(torch.bfloat16, requires_grad=False)
    inputs = [given_all[i].requires_grad_() for i in wanted]
    grads = torch.autograd.grad(conv(*given_all, 1, relu=True).sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
def test_second_derivatives(relu):
    x, w, b = given(torch.bfloat16)
    found = []
    for y in (conv(x, w, b, 1, relu=relu), plain(x, w, b, relu=relu)):
        dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w), create_graph=True)
        found.append(torch.autograd.grad(dx.float().square().sum() + dw.float().square().sum(), (x, w, b)))
    for a, e in zip(*found):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))


@pytest.mark.parametrize("how", ["float64", "contiguous", "empty", "one dimension"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
def test_everything_else_is_pytorchs_own(how, relu, counted):
    x, w, b = given(torch.float64 if how == "float64" else torch.bfloat16, channels_last=how != "contiguous")
    if how == "empty":
        x = x.detach()[:0]
    if how == "one dimension":
        x, w = x[..., 0], w[..., 0]
    assert torch.equal(conv(x, w, b, 1, relu=relu), plain(x, w, b, relu=relu))
    assert not counted


def test_a_compiler_sees_plain_calls(counted):
    x, w, b = given(torch.bfloat16)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b, 1, relu=True), plain(x, w, b, relu=True))
    assert not counted
