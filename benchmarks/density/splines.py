"""The spline op beside the functions of nflows, normflows and zuko: 65,536 elements, their own form each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nfkernels import Spline, rational_quadratic_spline, use_backend

from ..bars import OURS, Bar, Contender, over
from ..complexity.measure import close

BOUND, BINS = 3.0, 8
NFLOWS_FORM, ZUKO_FORM = Spline.nflows(BINS, BOUND), Spline.zuko(BINS, BOUND)
OURS_FOR_ZUKO = "nfkernels in zuko's form"

Function = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def _ours(spline: Spline) -> Function:
    return lambda x, params, inverse: rational_quadratic_spline(x, params, spline=spline, inverse=inverse)


def _reference(spline: Spline) -> Function:
    def run(x, params, inverse):
        with use_backend("reference"):
            return rational_quadratic_spline(x, params, spline=spline, inverse=inverse)

    return run


def _parts(params: Tensor, channels: int) -> list[Tensor]:
    return list(params.unflatten(1, (channels, -1)).split([BINS, BINS, BINS - 1], 2))


def _of_nflows() -> Function:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline

    def run(x, params, inverse):
        y, each = spline(x, *_parts(params, x.shape[1]), inverse=inverse, tails="linear", tail_bound=BOUND)
        return y, each.sum(1)

    return run


def _of_normflows() -> Function:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline as spline

    def run(x, params, inverse):
        y, each = spline(x, *_parts(params, x.shape[1]), inverse=inverse, tails="linear", tail_bound=BOUND)
        return y, each.sum(1)

    return run


def _of_zuko() -> Function:
    from zuko.transforms import MonotonicRQSTransform

    def run(x, params, inverse):
        transform = MonotonicRQSTransform(*_parts(params, x.shape[1]), bound=BOUND)
        y, each = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, each.sum(1)

    return run


MAKERS: dict[str, tuple[Callable[[], Function], Spline]] = {
    OURS: (lambda: _ours(NFLOWS_FORM), NFLOWS_FORM),
    OURS_FOR_ZUKO: (lambda: _ours(ZUKO_FORM), ZUKO_FORM),
    "plain PyTorch": (lambda: _reference(NFLOWS_FORM), NFLOWS_FORM),
    "nflows": (_of_nflows, NFLOWS_FORM),
    "normflows": (_of_normflows, NFLOWS_FORM),
    "zuko": (_of_zuko, ZUKO_FORM),
}


def _bar(inverse: bool, gradients: bool) -> Callable[[bool], dict[str, Callable[[], Contender]]]:
    def build(quick: bool) -> dict[str, Callable[[], Contender]]:
        rows, channels = (8, 4) if quick else (8192, 8)
        x = 2 * torch.randn(rows, channels)
        params = torch.randn(rows, channels * NFLOWS_FORM.params_per_element)
        seeds = torch.randn(rows, channels), torch.randn(rows)

        def prepared(function: Function, dtype: torch.dtype) -> Callable[[], list[Any]]:
            given = [v.to(dtype, copy=True).requires_grad_(gradients) for v in (x, params)]
            cotangents = [s.to(dtype) for s in seeds]

            def call():
                with torch.set_grad_enabled(gradients):
                    outputs = function(*given, inverse)
                    found = torch.autograd.grad(outputs, given, cotangents) if gradients else ()
                return [*(o.detach() for o in outputs), *found]

            return call

        def contender(make: Callable[[], Function], form: Spline) -> Contender:
            call = prepared(make(), torch.float32)
            exact = prepared(_reference(form), torch.float64)
            return Contender(call, lambda: all(close(a.double(), b, 1e-3) for a, b in zip(call(), exact())))

        return {name: (lambda m=maker: contender(*m)) for name, maker in MAKERS.items()}

    return build


_RATIOS = (
    *over("plain PyTorch", "nflows", "normflows"),
    ("zuko takes (its form)", "zuko", OURS_FOR_ZUKO),
)
BARS = (
    Bar("spline, 65,536 elements, K = 8, forward", "nflows 30x, zuko 25x at least", _bar(False, False), _RATIOS),
    Bar("spline, 65,536 elements, K = 8, inverse", "nflows 30x, zuko 25x at least", _bar(True, False), _RATIOS),
    Bar("spline, 65,536 elements, K = 8, forward + backward", "nflows 20x at least", _bar(False, True), _RATIOS),
    Bar("spline, 65,536 elements, K = 8, inverse + backward", "none", _bar(True, True), _RATIOS),
)
