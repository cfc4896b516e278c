"""Channel mix (1x1 convolution) against conv2d, the reference (eager and compiled) and a copy of the same bytes.

    python -m pytest benchmarks/ops --benchmark-columns=min,median,rounds --benchmark-sort=name

Bytes: forward and inverse (a mix by the inverse matrix) 2 N s; the backward reads x and dy and writes dx, 3 N s.
"""

import pytest
import torch
import torch.nn.functional as F
from common import COPY, assert_close, copy_of, saved_bytes

from nfkernels import channel_mix, use_backend

CHANNELS = [12, 48]
CONTENDERS = ("nfkernels", "reference eager", "reference compiled", "conv2d", COPY)


def eager(x, weight):
    return torch.matmul(weight, x.flatten(2)).view_as(x)


def conv(x, weight):
    return F.conv2d(x, weight[:, :, None, None])


def contender(name):
    return {
        "nfkernels": channel_mix,
        "reference eager": eager,
        "reference compiled": torch.compile(eager),
        "conv2d": conv,
    }[name]


def inputs(channels):
    torch.manual_seed(0)
    x = torch.randn(64, channels, 16, 16)
    return x, torch.linalg.qr(torch.randn(channels, channels))[0].contiguous()


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("channels", CHANNELS)
def bench_no_grad(benchmark, channels, direction, name):
    x, weight = inputs(channels)
    if direction == "inverse":
        weight = torch.linalg.inv(weight).contiguous()
    benchmark.group = f"channel_mix {direction} {tuple(x.shape)}"
    if name == COPY:
        benchmark(copy_of(2 * x.nbytes))
        return
    run = contender(name)
    with torch.no_grad():
        with use_backend("reference"):
            want = channel_mix(x.double(), weight.double())
        assert_close([run(x, weight).double()], [want])
        benchmark(run, x, weight)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("channels", CHANNELS)
def bench_forward_backward(benchmark, channels, name):
    x, weight = inputs(channels)
    dy = torch.randn_like(x)
    x.requires_grad_(), weight.requires_grad_()
    benchmark.group = f"channel_mix forward+backward {tuple(x.shape)}"
    if name == COPY:
        benchmark(copy_of(5 * x.nbytes))
        return
    run = contender(name)

    def step(run=run):
        return torch.autograd.grad(run(x, weight), [x, weight], dy)

    assert_close(step(), step(channel_mix) if name != "nfkernels" else step(conv), rtol=1e-3, atol=1e-2)
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: run(x, weight), set())
    benchmark(step)
