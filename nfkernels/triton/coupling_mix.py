"""Coupling and channel mix in one Triton kernel (``nfkernels/reference/coupling_mix.py`` is the specification).

Products as in ``channel_mix.py``: register sums, or dots (3xTF32 where that has fp32 accuracy, else IEEE).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from ..reference.coupling_mix import empty_conditioner_input
from . import _tiles as tiles
from . import affine_coupling, channel_mix
from ._coupling_mix_kernels import backward_kernel, forward_kernel
from .affine_coupling import _options, _packed, _params_strides, _where
from .channel_mix import MOST_TILES, REGISTER_CHANNELS, TENSOR_CORE_CHANNELS, generation_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """How C channels are tiled: positions of all samples in a tile, and warps."""

    in_registers: bool
    precision: str
    block_m: int
    warps: int


# By padded channels: positions per tile and warps.
_FORWARD = {1: (512, 4), 2: (512, 4), 4: (256, 4), 8: (128, 4), 16: (64, 8)}
_BACKWARD = {1: (512, 4), 2: (256, 4), 4: (128, 4), 8: (64, 4), 16: (32, 8)}


@functools.lru_cache(maxsize=256)
def plan(channels: int, dtype: torch.dtype, generation: int, backward: bool) -> Plan:
    """Tile sizes; ``generation`` as ``channel_mix.generation_of`` gives it."""
    block = tiles.power_of_2(channels)
    if channels <= REGISTER_CHANNELS:
        block_m, warps = (_BACKWARD if backward else _FORWARD)[block]
        return Plan(True, "ieee", block_m // 2 if dtype == torch.float64 else block_m, warps)
    tensor_cores = generation >= 8 and dtype == torch.float32 and channels >= TENSOR_CORE_CHANNELS
    precision = "tf32x3" if tensor_cores else "ieee"
    if dtype == torch.float64:
        return Plan(False, precision, 16, 4)
    # Small enough that no layout and no option spills; not chosen by time yet.
    if tensor_cores and block == 32:
        return Plan(False, precision, 32 if backward else 64, 4)
    return Plan(False, precision, 16 if backward or block == 64 else 32, 4)


def _is_too_wide(x: Tensor) -> bool:
    """Double precision beyond 32 channels does not fit one program's registers: two ops then, one after the other."""
    return x.dtype == torch.float64 and x.shape[1] > 32


def _blocks(channels: int, count: int, p: Plan) -> dict:
    least = 1 if p.in_registers else 16  # a dot's smallest axis
    return {
        "BLOCK_C": max(least, tiles.power_of_2(channels)),
        "BLOCK_T": max(least, tiles.power_of_2(count)),
        "BLOCK_R": max(least, tiles.power_of_2(channels - count)),
    }


def _grid(batch: int, size: int, p: Plan) -> tuple[int, int, int, int]:
    """Samples and positions of a tile, tiles of a sample, and tiles in all."""
    positions = min(tiles.power_of_2(size), p.block_m)
    samples = p.block_m // positions
    n_p = tiles.divide_up(size, positions)
    return samples, positions, n_p, tiles.divide_up(batch, samples) * n_p


def forward(
    x, params, weight, bias, gain, logdet, form, prescale, offset, gain_factor, clamp, eps,
    extra_start, extra_count, extra_dtype, extra_channels_last,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(z, logdet, extra)``; the raw op ``_coupling_mix_forward``, every argument already checked."""
    f, constants = _options(form, prescale, offset, gain_factor, clamp, eps)
    batch, channels = x.shape[:2]
    size = tiles.positions(x)
    dtype = compute_dtype(x)
    z = torch.empty_like(x)
    if extra_count:
        extra = empty_conditioner_input(x, extra_count, DTYPES[extra_dtype], extra_channels_last)
    else:
        extra = x.new_empty(0, dtype=DTYPES[extra_dtype])
    if z.numel() == 0:
        return z, x.new_zeros(batch, dtype=dtype) if logdet is None else logdet.clone(), extra
    if _is_too_wide(x):
        options = form, prescale, offset, gain_factor, clamp, eps
        y, out = affine_coupling.forward(x, params, None, None, gain, logdet, *options)
        z = channel_mix.forward(y, weight, bias)
        if extra_count:
            extra.copy_(z.narrow(1, extra_start, extra_count))
        return z, out, extra
    p = plan(channels, dtype, generation_of(x), False)
    samples, positions, n_p, n_tiles = _grid(batch, size, p)
    n_workers = max(min(n_tiles, tiles.PROGRAMS), tiles.divide_up(n_tiles, MOST_TILES))
    out = x.new_empty(batch, dtype=dtype)
    partials = out if n_p == 1 else x.new_empty((batch, n_p), dtype=dtype)
    running = _packed(logdet)
    start, count, _ = _where(x, params, None, f)
    with tiles.on_device_of(x):
        forward_kernel[(n_workers,)](
            x, params, weight, bias, _packed(gain), running if n_p == 1 else None, z,
            extra if extra_count else None, partials,
            batch, size, n_p, n_tiles, n_workers,
            *tiles.strides(x), *_params_strides(params, f), *tiles.strides(z),
            *(tiles.strides(extra) if extra_count else (0, 0, 0)),
            **constants, C=channels, START=start, COUNT=count, EXTRA_START=extra_start, EXTRA_COUNT=extra_count,
            DTYPE=tiles.TRITON_DTYPE[dtype],
            WIDE=tiles.is_wide(x, params, z, extra if extra_count else None),
            IN_REGISTERS=p.in_registers, PRECISION=p.precision, **_blocks(channels, count, p),
            SAMPLES=samples, POSITIONS=positions, num_warps=p.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if n_p > 1:
            tiles.sum_partials(partials, running, out)
    return z, out, extra


def backward(
    z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, form, prescale, offset, gain_factor, clamp, eps,
    extra_start, need_dweight, need_dbias, rebuild,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dparams, dweight, dbias, dgain, x)``, empty where not wanted; the raw op ``_coupling_mix_backward``."""
    f, constants = _options(form, prescale, offset, gain_factor, clamp, eps)
    batch, channels = z.shape[:2]
    size = tiles.positions(z)
    dtype = compute_dtype(z)
    start, count, _ = _where(z, params, None, f)
    if _is_too_wide(z):
        options = form, prescale, offset, gain_factor, clamp, eps
        dz = torch.zeros_like(z) if dz is None else dz.clone()
        if dextra is not None:
            dz.narrow(1, extra_start, dextra.shape[1]).add_(dextra)
        dy, dweight, dbias, y = channel_mix.backward(z, weight, dz, inverse, bias, True, need_dweight, need_dbias)
        dx, dparams, dgain, x = affine_coupling.backward(y, params, dy, dlogdet, None, None, gain, *options, rebuild)
        return dx, dparams, dweight, dbias, dgain, x
    dx, dparams = torch.empty_like(z), torch.empty_like(params)
    x = torch.empty_like(z) if rebuild else z.new_empty(0)
    shapes = {  # of a worker's partials
        "dweight": (channels, channels) if need_dweight else None,
        "dbias": (channels,) if need_dbias else None,
        "dgain": None if gain is None else (count,),
    }
    if z.numel() == 0:
        sums = [weight.new_zeros(0 if shape is None else shape) for shape in shapes.values()]
        return dx, dparams, *sums, x
    p = plan(channels, dtype, generation_of(z), True)
    samples, positions, n_p, n_tiles = _grid(batch, size, p)
    n_workers = min(n_tiles, tiles.WORKERS)
    partials = [None if shape is None else weight.new_empty((n_workers, *shape)) for shape in shapes.values()]
    none = (0, 0, 0)
    with tiles.on_device_of(z):
        backward_kernel[(n_workers,)](
            z, params, weight, inverse, bias, _packed(gain), dz, dlogdet, dextra,
            dx, dparams, x if rebuild else None, *partials,
            batch, size, n_p, n_tiles, n_workers,
            *tiles.strides(z), *_params_strides(params, f), *(none if dz is None else tiles.strides(dz)),
            0 if dlogdet is None else dlogdet.stride(0), *(none if dextra is None else tiles.strides(dextra)),
            *tiles.strides(dx), *_params_strides(dparams, f), *(tiles.strides(x) if rebuild else none),
            **constants, C=channels, START=start, COUNT=count,
            EXTRA_START=extra_start, EXTRA_COUNT=0 if dextra is None else dextra.shape[1],
            DTYPE=tiles.TRITON_DTYPE[dtype],
            WIDE=tiles.is_wide(z, params, dz, dextra, dx, dparams, x if rebuild else None),
            IN_REGISTERS=p.in_registers, PRECISION=p.precision, **_blocks(channels, count, p), BLOCK_K=16,
            SAMPLES=samples, POSITIONS=positions, num_warps=p.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    sums = [weight.new_empty(0) if t is None else t.sum(0) for t in partials]
    return dx, dparams, *sums, x
