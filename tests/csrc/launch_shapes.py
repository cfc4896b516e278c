"""Prints, as JSON, the threads and the shared memory of every kernel that a few typical calls launch, by running them
in the emulator. `machine_code.py` puts them in its table."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch

BUILD = Path(__file__).parents[1] / "emulator/build.py"


def calls():
    import nfkernels
    from nfkernels import ops

    contiguous, last = torch.contiguous_format, torch.channels_last
    for data, raw, raw_layout in [
        (torch.float32, torch.float32, contiguous),
        (torch.float32, torch.bfloat16, last),
        (torch.float64, torch.float64, contiguous),
        (torch.bfloat16, torch.bfloat16, contiguous),
    ]:
        for channels in (4, 12, 24, 48, 64, 96):
            shape = (2, channels, 8, 8)
            x = torch.randn(shape, dtype=data, requires_grad=True)
            params = torch.randn(shape).to(raw).contiguous(memory_format=raw_layout).requires_grad_()
            arithmetic = torch.promote_types(data, torch.float32)
            weight = torch.linalg.qr(torch.randn(channels, channels, dtype=arithmetic))[0].requires_grad_()
            yield ops.affine_coupling(x, params, identity="first")
            yield ops.channel_mix(x, weight)
            factors = (weight, weight, weight[0], weight[0])
            yield ops.lu_linear(x, *factors), ops.lu_linear(x, *factors, inverse=True)
            taps = torch.zeros(channels, channels, 3, 3, dtype=arithmetic)
            taps[:, :, 1, 1] = torch.eye(channels)
            yield ops.autoregressive_conv(x, taps), ops.autoregressive_conv(x, taps, inverse=True)
            if channels <= 64:
                yield ops.coupling_mix(x, params, weight, inverse_weight=weight.detach().t().contiguous())
            both = torch.cat([params, params], 1)
            yield ops.gaussian_log_density(x, both), ops.gaussian_log_density(x)
            for bins in (5, 8, 10, 16) if channels == 12 else ():
                own = torch.randn(2, channels * (3 * bins - 1), 8, 8).to(raw).contiguous(memory_format=raw_layout)
                yield ops.rational_quadratic_spline(x, own.requires_grad_(), spline=nfkernels.Spline(bins))
                table = torch.randn(40, channels * (3 * bins - 1)).to(raw).requires_grad_()
                yield ops.rational_quadratic_spline(x[0].flatten(1).t()[:40], table, spline=nfkernels.Spline(bins))
        rows, raw_rows = (
            torch.randn(64, 6, dtype=data, requires_grad=True),
            torch.randn(64, 12).to(raw).requires_grad_(),
        )
        yield ops.affine_coupling(rows, raw_rows)
        if data in (torch.float32, torch.float64):
            for batch, transform in itertools.product((64, 8192), (ops.ScaleMap.exp(), ops.Spline())):
                yield masked_inverse(torch.randn(batch, 6, dtype=data), transform)
        for channels in (12, 48, 64, 512):
            triangle = torch.zeros(1, channels, channels, dtype=arithmetic, requires_grad=True)
            yield ops.lu_compose(triangle, triangle, torch.zeros(1, channels, dtype=arithmetic))
        yield ops.dequantize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ops.random_key(0), dtype=data)
        yield ops.dequantize(torch.zeros(2, 3, 8, 8, dtype=data, requires_grad=True), ops.random_key(0), alpha=0.05)


def masked_inverse(z, transform):
    """Of two layers of 64 units, at zero weights."""
    from nfkernels import ops

    degrees = ops.Degrees(range(6), [sorted(i % 5 + 1 for i in range(64))] * 2)
    params = getattr(transform, "params_per_element", 2)
    weights = [torch.zeros(mask.shape, dtype=z.dtype) for mask in degrees.masks(params)]
    return ops.autoregressive_inverse(z, weights, [None] * 3, degrees, transform=transform)


def main() -> None:
    spec = importlib.util.spec_from_file_location("emulator_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    module = sys.modules["nfkernels._C"] = build.load("nfkernels_emulated")
    for outputs in calls():
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(t.float().sum() for t in outputs)
        if loss.requires_grad:
            loss.backward()
    json.dump(module.shapes(), sys.stdout)


if __name__ == "__main__":
    main()
