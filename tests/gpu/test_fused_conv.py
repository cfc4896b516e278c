"""The convolution with its ReLU in one pass, as cuDNN does it, against PyTorch's two calls."""

import pytest
import torch
import torch.nn.functional as F

from nfkernels.nn.conv import conv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(512, 512, 1), (8, 64, 3), (64, 8, 3), (6, 512, 3)])
def test_fused_values_and_gradients(dtype, inputs, outputs, kernel):
    torch.manual_seed(0)
    x, w = torch.randn(4, inputs, 16, 16), torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    x, w = (t.to("cuda", dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, w))
    b = torch.randn(outputs).to("cuda", dtype).requires_grad_()
    y = conv(x, w, b, kernel // 2, relu=True)
    exact = F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=kernel // 2))
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, w, b), dy)]
    expected = [exact, *torch.autograd.grad(exact, (x, w, b), dy.double())]
    for a, e in zip(found, expected):
        torch.testing.assert_close(a.double(), e.double(), rtol=0.02, atol=0.02 * float(e.abs().max()))
