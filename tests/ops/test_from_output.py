"""Inputs and gradients from outputs: what autograd gives of the forward that made them."""

from __future__ import annotations

import pytest
import torch

from nfkernels import ScaleMap, affine_coupling, channel_mix
from nfkernels.ops import affine_coupling_from_output, channel_mix_from_output

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"identity": "first"},
        {"identity": "second", "order": "shift_first", "scale_map": "exp"},
        {"identity": "none", "scale_map": "additive"},
        {"identity": "first", "layout": "scale_shift_interleaved", "scale_map": ScaleMap.realnvp(1.5)},
    ],
    ids=["first", "second", "additive", "gain"],
)
def test_coupling(options, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 5, dtype=dtype, requires_grad=True)
    count = 6 if options["identity"] == "none" else 3
    width = count if options.get("scale_map") == "additive" else 2 * count
    params = (0.5 * torch.randn(3, width, 4, 5, dtype=dtype)).requires_grad_()
    gain = torch.rand(3, dtype=dtype).requires_grad_() if isinstance(options.get("scale_map"), ScaleMap) else None
    mask = torch.rand(3, 1, 4, 5) > 0.3
    y, logdet = affine_coupling(x, params, gain=gain, mask=mask, **options)
    dy, dlogdet = torch.randn_like(y), torch.randn_like(logdet)
    into = [x, params] + ([] if gain is None else [gain])
    expected = [x.detach(), *torch.autograd.grad((y, logdet), into, (dy, dlogdet))]
    found = affine_coupling_from_output(
        y.detach(), params.detach(), dy, dlogdet, mask=mask, gain=None if gain is None else gain.detach(), **options
    )
    assert (found[3] is None) == (gain is None)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert not a.requires_grad


def test_coupling_without_a_gradient_of_either():
    y, params = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    x, dx, dparams, dgain = affine_coupling_from_output(y, params, None, None, identity="first")
    again, _ = affine_coupling(x, params, identity="first")
    torch.testing.assert_close(again, y)
    assert not dx.any()
    assert not dparams.any()
    assert dgain is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("channels", "layout"), [(5, "rows"), (6, "images"), (6, "channels-last"), (70, "images")])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
def test_mix(channels, layout, with_bias, dtype):
    torch.manual_seed(0)
    x = torch.randn((7, channels) if layout == "rows" else (2, channels, 4, 5), dtype=dtype)
    if layout == "channels-last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.linalg.qr(torch.randn(channels, channels, dtype=dtype))[0].contiguous()
    bias = torch.randn(channels, dtype=dtype) if with_bias else None
    into = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    y = channel_mix(x, weight, bias)
    dy = torch.randn_like(y)
    expected = [x.detach(), *torch.autograd.grad(y, into, dy)]
    inverse = torch.linalg.inv(weight.detach())
    found = channel_mix_from_output(y.detach(), weight.detach(), inverse, None if bias is None else bias.detach(), dy)
    assert (found[3] is None) == (bias is None)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="all but axis 1 must agree"):
        affine_coupling_from_output(torch.randn(2, 4), torch.randn(3, 4), None, None, identity="first")
    with pytest.raises(ValueError, match=r"weight must be \[4, 4\]"):
        channel_mix_from_output(torch.randn(2, 4), torch.eye(3), torch.eye(3), None, torch.randn(2, 4))
