"""``python -m benchmarks linear``: calls of the linear flows beside what others write (see ``benchmarks/bars.py``)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfkernels
from nfkernels import nn as flows

from ..bars import OURS, Bar, Contender, over
from .measure import close, made_from

# --- LULinear ---------------------------------------------------------------------------------------------------------


def _lu_step(quick: bool):
    x, g = torch.randn(2, 64 if quick else 4096, 64)

    def step(module: nn.Module, like: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        given = like.detach().requires_grad_()
        outputs = module(given)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        seeds = (cotangent, torch.ones_like(outputs[-1]))[: len(outputs)]
        with_gradients = torch.autograd.grad(outputs, (given, *module.parameters()), seeds)
        return (*(o.detach() for o in outputs), *with_gradients)

    def contender(module: nn.Module) -> Contender:
        def call():
            with torch.enable_grad():
                return step(module, x, g)

        def check() -> bool:
            with torch.enable_grad():
                exact = step(copy.deepcopy(module).double(), x.double(), g.double())
            return all(close(a.double(), b, 1e-4) for a, b in zip(call(), exact))

        return Contender(call, check)

    return {OURS: lambda: contender(made_from(flows.LULinear(64))), "nflows LULinear": lambda: contender(_nflows_lu()),
            "F.linear": lambda: contender(nn.Linear(64, 64))}  # fmt: skip


def _lu_inverse(quick: bool):
    x = torch.randn(64 if quick else 4096, 64)

    def contender(layer: nn.Module) -> Contender:
        with torch.no_grad():
            z = layer(x)[0]
        return Contender(
            lambda: layer.inverse(z), lambda: close(layer.inverse(z)[0], x, 1e-3), list(layer.parameters())
        )

    return {OURS: lambda: contender(made_from(flows.LULinear(64))), "nflows LULinear": lambda: contender(_nflows_lu())}


def _nflows_lu() -> nn.Module:
    from nflows.transforms import LULinear

    return LULinear(64, identity_init=False)


# --- lu_compose -------------------------------------------------------------------------------------------------------


def _compose(gradients: bool):
    def build(quick: bool):
        k, c = (2, 4) if quick else (32, 48)
        lower, upper = 0.2 * torch.randn(2, k, c, c) / c**0.5
        factors = [lower, upper, 0.1 * torch.randn(k, c)]
        sign = torch.randint(0, 2, (k, c)) * 2.0 - 1
        permutation = torch.stack([torch.randperm(c) for _ in range(k)])
        seeds = [torch.randn(k, c, c), torch.randn(k, c, c), torch.tensor(1.0)]

        def fused(lower, upper, log_s, sign):
            return nfkernels.lu_compose(lower, upper, log_s, sign=sign, permutation=permutation)

        def loop(lower, upper, log_s, sign):
            weights, inverses, logdet = [], [], 0.0
            eye = torch.eye(c, dtype=lower.dtype)
            for i in range(k):
                small = lower[i].tril(-1) + eye
                large = upper[i].triu(1) + torch.diag(sign[i] * log_s[i].exp())
                weights.append((small @ large)[permutation[i]])
                half = torch.linalg.solve_triangular(small, eye, upper=False, unitriangular=True)
                inverse = torch.linalg.solve_triangular(large, half, upper=True)
                inverses.append(inverse[:, permutation[i]])
                logdet = logdet + log_s[i].sum()
            return torch.stack(weights), torch.stack(inverses), logdet

        def prepared(function, dtype=torch.float32):
            given = [v.to(dtype, copy=True).requires_grad_(gradients) for v in factors]
            signs, cotangents = sign.to(dtype), [s.to(dtype) for s in seeds]

            def run():
                with torch.set_grad_enabled(gradients):
                    outputs = function(*given, signs)
                    found = torch.autograd.grad(outputs, given, cotangents) if gradients else ()
                return [*(o.detach() for o in outputs), *found]

            return run

        def contender(function) -> Contender:
            run, exact = prepared(function), prepared(loop, torch.float64)
            return Contender(run, lambda: all(close(a.double(), b, 1e-4) for a, b in zip(run(), exact())))

        return {OURS: lambda: contender(fused), "eager loop": lambda: contender(loop)}

    return build


# --- convolutions -----------------------------------------------------------------------------------------------------


def _emerging(quick: bool):
    shape = (2, 3, 4, 4) if quick else (64, 12, 32, 32)
    torch.manual_seed(0)
    layer = made_from(flows.EmergingConv2d(shape[1]))
    return _both_ways(layer, torch.randn(shape)) | {"per-pixel loop": lambda: _per_pixel(layer, torch.randn(shape))}


def _per_pixel(layer: nn.Module, x: Tensor) -> Contender:
    """The inverse pixel by pixel in Python: one product of the patch that is known already, one solve."""
    with torch.no_grad():
        z = layer(x)[0]
    half = layer.kernel_size // 2

    def undone(y: Tensor, index: int, *, upper: bool) -> Tensor:
        kernel, scale = layer.weight[index], torch.diag(layer.log_s[index].exp())
        if upper:  # the second convolution looks ahead: the mirror image
            y, kernel = y.flip(2, 3), kernel.flip(2, 3)
        centre = kernel[:, :, half, half]
        centre = (centre.triu(1) if upper else centre.tril(-1)) + scale
        taps = kernel[:, :, : half + 1, : half + 1].clone()
        taps[:, :, half, half] = 0
        taps = taps.flatten(1)
        known = F.pad(torch.zeros_like(y), (half, 0, half, 0))
        for h in range(y.shape[2]):
            for w in range(y.shape[3]):
                patch = known[:, :, h : h + half + 1, w : w + half + 1].flatten(1)
                right = (y[:, :, h, w] - patch @ taps.T).T
                known[:, :, h + half, w + half] = torch.linalg.solve_triangular(centre, right, upper=upper).T
        known = known[:, :, half:, half:]
        return known.flip(2, 3) if upper else known

    def call() -> Tensor:
        y = z if layer.bias is None else z - layer.bias[:, None, None]
        return undone(undone(y, 1, upper=True), 0, upper=False)

    return Contender(call, lambda: close(call(), x, 1e-3))


def _periodic(quick: bool):
    shape = (2, 3, 4, 4) if quick else (64, 12, 32, 32)
    torch.manual_seed(0)
    return _both_ways(made_from(flows.PeriodicConv2d(shape[1])), torch.randn(shape))


def _both_ways(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], Contender]]:
    with torch.no_grad():
        z = layer(x)[0]
    weights = list(layer.parameters())
    return {
        OURS: lambda: Contender(lambda: layer.inverse(z), lambda: close(layer.inverse(z)[0], x, 1e-3), weights),
        "its forward": lambda: Contender(
            lambda: layer(x), lambda: close(z.double(), copy.deepcopy(layer).double()(x.double())[0], 1e-4), weights
        ),
    }


BARS = (
    Bar(
        "`LULinear(64)`, 4096 rows, forward + backward",
        "2.5x nflows at least; 1.25x `F.linear`'s time at most",
        _lu_step,
        (*over("nflows LULinear"), ("of F.linear's time", OURS, "F.linear")),
    ),
    Bar("`LULinear(64)`, 4096 rows, inverse", "2x nflows at least", _lu_inverse, over("nflows LULinear")),
    Bar("`lu_compose`, K = 32, C = 48", "8x the eager loop at least", _compose(False), over("eager loop")),
    Bar(
        "`lu_compose`, K = 32, C = 48, forward + backward",
        "8x the eager loop at least",
        _compose(True),
        over("eager loop"),
    ),
    Bar(
        "`EmergingConv2d(12)`, 3 x 3, 32 x 32, batch 64, inverse",
        "50x the per-pixel loop at least; 20x its forward at most",
        _emerging,
        (*over("per-pixel loop"), ("of its forward's time", OURS, "its forward")),
    ),
    Bar(
        "`PeriodicConv2d(12)`, 3 x 3, 32 x 32, batch 64, inverse",
        "4x its forward at most",
        _periodic,
        (("of its forward's time", OURS, "its forward"),),
    ),
)
