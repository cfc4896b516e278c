"""The fused convolution and ReLU against the two calls that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nfkernels.nn import conv_relu as module
from nfkernels.nn.conv_relu import conv_relu


def given(dtype, *, kernel=3, channels_last=True, requires_grad=True):
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, 6, 7), 0.3 * torch.randn(8, 5, kernel, kernel)
    b = torch.randn(8)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, w = (t.to(dtype).contiguous(memory_format=layout) for t in (x, w))
    return [t.requires_grad_(requires_grad) for t in (x, w, b.to(dtype))]


@pytest.fixture
def counted(monkeypatch):
    calls = []
    fused = module._onednn
    monkeypatch.setitem(module._FUSED, "cpu", lambda *args: (calls.append(1), fused(*args))[1])
    return calls


@pytest.mark.parametrize("kernel", [1, 3])
def test_fused_values_and_gradients(kernel, counted):
    x, w, b = given(torch.bfloat16, kernel=kernel)
    y = conv_relu(x, w, b, kernel // 2)
    assert counted == [1]
    expected = F.relu(F.conv2d(x, w, b, padding=kernel // 2))
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(expected, (x, w, b), dy)):
        assert torch.equal(a, e)


def test_it_is_fused_without_gradients_too(counted):
    x, w, b = given(torch.bfloat16, requires_grad=False)
    assert torch.equal(conv_relu(x, w, b, 1), F.relu(F.conv2d(x, w, b, padding=1)))
    assert counted == [1]


def test_only_what_is_wanted_gets_a_gradient():
    x, w, b = given(torch.bfloat16)
    w = w.detach()
    dx, db = torch.autograd.grad(conv_relu(x, w, b, 1).sum(), (x, b))
    assert dx.shape == x.shape
    assert db.shape == b.shape


def test_second_derivatives():
    x, w, b = given(torch.bfloat16)
    found = []
    for y in (conv_relu(x, w, b, 1), F.relu(F.conv2d(x, w, b, padding=1))):
        dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w), create_graph=True)
        found.append(torch.autograd.grad(dx.float().square().sum() + dw.float().square().sum(), (x, w, b)))
    for a, e in zip(*found):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))


@pytest.mark.parametrize("how", ["float32", "contiguous", "empty", "one dimension"])
def test_everything_else_is_two_calls(how, counted):
    x, w, b = given(torch.float32 if how == "float32" else torch.bfloat16, channels_last=how != "contiguous")
    if how == "empty":
        x = x.detach()[:0]
    if how == "one dimension":
        x, w = x[..., 0], w[..., 0]
    conv = F.conv1d if how == "one dimension" else F.conv2d
    assert torch.equal(conv_relu(x, w, b, 1), F.relu(conv(x, w, b, padding=1)))
    assert not counted


def test_a_compiler_sees_two_calls(counted):
    x, w, b = given(torch.bfloat16)
    compiled = torch.compile(conv_relu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b, 1), F.relu(F.conv2d(x, w, b, padding=1)))
    assert not counted
