"""Affine coupling in Triton: the raw ops (``nfkernels/reference/affine_coupling.py`` is the specification)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..reference.affine_coupling import Form, Identity, Layout, Order, compute_dtype
from . import _tiles as tiles
from ._affine_coupling_kernels import backward_kernel, forward_kernel


@functools.lru_cache(maxsize=1024)
def _options(form: int, prescale: float, offset: float, gain: float, clamp: float, eps: float) -> tuple[Form, dict]:
    """The form, and the constexprs it makes. A clamp of 0 stands for none."""
    f = Form.unpack(form, prescale, offset, gain, clamp, eps)
    clamped = math.isfinite(clamp) and f.map.has_scale
    return f, {
        "KIND": form & 15,
        "NEGATE": f.map.reciprocal != f.inverse,
        "PRESCALE": prescale,
        "OFFSET": offset,
        "GAIN": gain,
        "CLAMP": clamp if clamped else 0.0,
        "EPS": eps,
        "LOG_GAIN": math.log(gain) if gain > 0 else 0.0,
        "LOG_CLAMP": math.log(clamp) if clamped else 0.0,
        "SHIFT_FIRST": (f.order == Order.shift_first) != f.inverse,
        "SHIFT_FACTOR": f.shift_factor,
    }


def _params_strides(params: Tensor, f: Form) -> tuple[int, int, int, int, int]:
    """Strides over [B, transformed channel, P] and where in a sample the shifts and the raw scales start."""
    s_b, s_c, s_p = tiles.strides(params)
    count = f.transformed_channels(params.shape[1])
    if not f.map.has_scale:
        return s_b, s_c, s_p, 0, 0
    interleaved = f.layout in (Layout.shift_scale_interleaved, Layout.scale_shift_interleaved)
    second = s_c if interleaved else count * s_c
    o_shift, o_scale = (0, second) if f.layout in (Layout.shift_scale, Layout.shift_scale_interleaved) else (second, 0)
    return s_b, s_c * 2 if interleaved else s_c, s_p, o_shift, o_scale


def _where(x: Tensor, params: Tensor, channel_map: Tensor | None, f: Form) -> tuple[int, int, bool]:
    """First transformed channel of x, how many there are, and whether any channel passes through."""
    count = f.transformed_channels(params.shape[1])
    start = x.shape[1] - count if f.identity == Identity.first else 0
    return start, count, channel_map is not None or count != x.shape[1]


def _packed(vector: Tensor | None) -> Tensor | None:
    """A vector per channel or sample, which the kernels read at stride one."""
    return None if vector is None else vector.contiguous()


def _mask_bytes(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[int, int, int]]:
    if mask is None:
        return None, (0, 0, 0)
    s_b, s_c, s_p = tiles.strides(mask)
    return mask.view(torch.uint8), (s_b, s_c, s_p)


def forward(
    x, params, channel_map, mask, gain, logdet, form, prescale, offset, gain_factor, clamp, eps
) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``; the raw op ``_affine_coupling_forward``, every argument already checked."""
    f, constants = _options(form, prescale, offset, gain_factor, clamp, eps)
    batch, channels = x.shape[:2]
    size = tiles.positions(x)
    dtype = compute_dtype(x)
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y, x.new_zeros(batch, dtype=dtype) if logdet is None else logdet.clone()
    out = x.new_empty(batch, dtype=dtype)
    t = tiles.tile(x, params)
    n_blocks = 1
    if t.rows:
        grid = (tiles.divide_up(batch, t.block_0),)
    else:
        n_tiles = tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
        if n_tiles > tiles.ONE_PROGRAM_TILES:
            n_blocks = min(n_tiles, tiles.divide_up(tiles.PROGRAMS, batch))
        grid = (batch * n_blocks,)
    partials = out if n_blocks == 1 else x.new_empty((batch, n_blocks), dtype=dtype)
    running = _packed(logdet)
    start, count, partial = _where(x, params, channel_map, f)
    mask, s_mask = _mask_bytes(mask, x)
    s_x = tiles.strides(x)
    with tiles.on_device_of(x):
        forward_kernel[grid](
            x, params, y, partials, running if n_blocks == 1 else None,
            _packed(channel_map), mask, _packed(gain),
            batch, channels, size, start, count, n_blocks,
            *s_x, *_params_strides(params, f), *tiles.strides(y), *s_mask,
            **constants, PARTIAL=partial, DTYPE=tiles.TRITON_DTYPE[dtype],
            ROWS=t.rows, CHANNELS_INNER=s_x[1] == 1 and channels > 1, ONE_POSITION=size == 1,
            WIDE=tiles.is_wide(x, params, y, mask), BLOCK_0=t.block_0, BLOCK_1=t.block_1,
            num_warps=t.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if n_blocks > 1:
            tiles.sum_partials(partials, running, out)
    return y, out


def backward(
    y, params, dy, dlogdet, channel_map, mask, gain, form, prescale, offset, gain_factor, clamp, eps, rebuild
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dparams, dgain, x)``, the last two empty unless asked for; the raw op ``_affine_coupling_backward``."""
    f, constants = _options(form, prescale, offset, gain_factor, clamp, eps)
    batch, channels = y.shape[:2]
    size = tiles.positions(y)
    dtype = compute_dtype(y)
    dx, dparams = torch.empty_like(y), torch.empty_like(params)
    x = torch.empty_like(y) if rebuild else y.new_empty(0)
    start, count, partial = _where(y, params, channel_map, f)
    if y.numel() == 0:
        return dx, dparams, y.new_zeros(0 if gain is None else count, dtype=dtype), x
    t = tiles.tile(y, params)
    if t.rows:
        n_blocks, n_units = 1, tiles.divide_up(batch, t.block_0)
    else:
        n_blocks, n_units = tiles.divide_up(channels, t.block_0), batch * tiles.divide_up(size, t.block_1)
    if gain is None:
        n_workers, partials = n_units, None
    else:
        n_workers = min(n_units, max(1, tiles.divide_up(tiles.WORKERS, n_blocks)))
        partials = y.new_empty((n_workers, count, size if t.rows else 1), dtype=dtype)
    mask, s_mask = _mask_bytes(mask, y)
    s_y = tiles.strides(y)
    s_dparams = _params_strides(dparams, f)
    with tiles.on_device_of(y):
        backward_kernel[(n_workers * n_blocks,)](
            y, params, dy, dlogdet, dx, dparams, x if rebuild else None, partials,
            _packed(channel_map), mask, _packed(gain),
            batch, channels, size, start, count, n_units, n_workers,
            *s_y, *_params_strides(params, f), *(tiles.strides(dy) if dy is not None else (0, 0, 0)),
            0 if dlogdet is None else dlogdet.stride(0), *tiles.strides(dx), *s_dparams,
            *(tiles.strides(x) if rebuild else (0, 0, 0)), *s_mask,
            **constants, PARTIAL=partial, DTYPE=tiles.TRITON_DTYPE[dtype],
            ROWS=t.rows, CHANNELS_INNER=s_y[1] == 1 and channels > 1, ONE_POSITION=size == 1,
            WIDE=n_units >= 2**31 or tiles.is_wide(y, params, dy, dx, dparams, mask),
            BLOCK_0=t.block_0, BLOCK_1=t.block_1, num_warps=t.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dparams, y.new_empty(0, dtype=dtype) if partials is None else partials.sum((0, 2)), x
