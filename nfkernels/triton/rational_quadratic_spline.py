"""Rational-quadratic spline in Triton: the raw ops (``nfkernels/reference/rational_quadratic_spline.py`` specifies)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..reference.affine_coupling import compute_dtype
from ..reference.rational_quadratic_spline import Form
from . import _tiles as tiles
from ._rational_quadratic_spline_kernels import backward_kernel, forward_kernel
from .affine_coupling import _mask_bytes, _packed

TILE = 512  # elements in flight of a program: 4 for each thread of 4 warps, a dozen numbers each; half in float64


@functools.lru_cache(maxsize=1024)
def constants(form: Form) -> dict:
    """The constexprs that a form makes, in the order in which ``spline`` takes them."""
    width, height = form.high - form.low, form.top - form.bottom
    return {
        "INVERSE": form.inverse,
        "K": form.bins,
        "DERIVATIVES": int(form.derivatives),
        "SOFTCLIP": form.softclip,
        "OUTSIDE": form.identity_outside,
        "HALF_TURN": form.half_turn,
        "LOW": form.low,
        "HIGH": form.high,
        "BOTTOM": form.bottom,
        "TOP": form.top,
        "W_LEAST": width * form.min_width,
        "W_SCALE": width * (1 - form.min_width * form.bins),
        "H_LEAST": height * form.min_height,
        "H_SCALE": height * (1 - form.min_height * form.bins),
        "MIN_D": form.min_derivative,
        "CLIP": form.clip,
        "PRESCALE": form.prescale,
    }


def _tile(x: Tensor) -> tiles.Tile:
    """Rows where several samples fit one program, else images: one sample split over channels and positions."""
    channels, size = x.shape[1], tiles.positions(x)
    most = TILE if compute_dtype(x) == torch.float32 else TILE // 2
    if channels * size <= most:
        block = tiles.power_of_2(channels * size)
        return tiles.Tile(True, max(1, min(most // block, tiles.power_of_2(x.shape[0]))), block, 4)
    if tiles.strides(x)[1] == 1 and channels > 1:
        block_c = min(tiles.power_of_2(channels), most)
        return tiles.Tile(False, block_c, min(most // block_c, tiles.power_of_2(size)), 4)
    block_p = min(tiles.power_of_2(size), most)
    return tiles.Tile(False, min(most // block_p, tiles.power_of_2(channels)), block_p, 4)


def _params_strides(params: Tensor, form: Form) -> tuple[int, int, int, int]:
    """Strides over [B, transformed channel, raw value, P]."""
    s_b, s_c, s_p = tiles.strides(params)
    return s_b, s_c * form.count, s_c, s_p


def _options(x: Tensor, form: Form, t: tiles.Tile, *others: Tensor | None) -> dict:
    """The constexprs and launch options that both kernels take."""
    return constants(form) | {
        "DTYPE": tiles.TRITON_DTYPE[compute_dtype(x)],
        "ROWS": t.rows,
        "CHANNELS_INNER": tiles.strides(x)[1] == 1 and x.shape[1] > 1,
        "ONE_POSITION": tiles.positions(x) == 1,
        "WIDE": tiles.is_wide(x, *others),
        "BLOCK_0": t.block_0,
        "BLOCK_1": t.block_1,
        "num_warps": t.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def forward(x, params, channel_map, mask, logdet, *numbers) -> tuple[Tensor, Tensor]:
    """``(y, logdet)``; the raw op ``_rational_quadratic_spline_forward``, every argument already checked."""
    form = Form(*numbers)
    batch, channels = x.shape[:2]
    size = tiles.positions(x)
    dtype = compute_dtype(x)
    y = torch.empty_like(x)
    each = torch.empty_like(x, dtype=dtype) if form.elementwise else None
    if y.numel() == 0:
        total = x.new_zeros(batch, dtype=dtype) if logdet is None else logdet.clone()
        return y, total if each is None else each
    t = _tile(x)
    n_blocks = 1
    if t.rows:
        grid = (tiles.divide_up(batch, t.block_0),)
    else:
        n_tiles = tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
        if n_tiles > tiles.ONE_PROGRAM_TILES:
            n_blocks = min(n_tiles, tiles.divide_up(tiles.PROGRAMS, batch))
        grid = (batch * n_blocks,)
    out = partials = None
    if each is None:
        out = x.new_empty(batch, dtype=dtype)
        partials = out if n_blocks == 1 else x.new_empty((batch, n_blocks), dtype=dtype)
    running = _packed(logdet)
    mask, s_mask = _mask_bytes(mask, x)
    with tiles.on_device_of(x):
        forward_kernel[grid](
            x, params, y, each, partials, running if n_blocks == 1 else None, _packed(channel_map), mask,
            batch, channels, size, params.shape[1] // form.count, n_blocks,
            *tiles.strides(x), *_params_strides(params, form), *tiles.strides(y),
            *((0, 0, 0) if each is None else tiles.strides(each)), *s_mask,
            **_options(x, form, t, params, y, mask),
        )  # fmt: skip
        if n_blocks > 1 and each is None:
            tiles.sum_partials(partials, running, out)
    return y, out if each is None else each


def backward(saved, params, dy, dlogdet, channel_map, mask, *rest) -> tuple[Tensor, Tensor]:
    """``(dx, dparams)``, empty where not needed; the raw op ``_rational_quadratic_spline_backward``."""
    *numbers, need_dx, need_dparams = rest
    form = Form(*numbers)
    dx = torch.empty_like(saved) if need_dx else None
    dparams = torch.empty_like(params) if need_dparams else None
    if saved.numel() and (need_dx or need_dparams):
        batch, channels = saved.shape[:2]
        size = tiles.positions(saved)
        t = _tile(saved)
        n_tiles = 1 if t.rows else tiles.divide_up(channels, t.block_0) * tiles.divide_up(size, t.block_1)
        programs = tiles.divide_up(batch, t.block_0) if t.rows else batch * n_tiles
        s_dlogdet = (0, 0, 0)
        if dlogdet is not None:
            s_dlogdet = tiles.strides(dlogdet) if form.elementwise else (dlogdet.stride(0), 0, 0)
        mask, s_mask = _mask_bytes(mask, saved)
        with tiles.on_device_of(saved):
            backward_kernel[(programs,)](
                saved, params, dy, dlogdet, dx, dparams, _packed(channel_map), mask,
                batch, channels, size, params.shape[1] // form.count,
                *tiles.strides(saved), *_params_strides(params, form),
                *((0, 0, 0) if dy is None else tiles.strides(dy)), *s_dlogdet,
                *((0, 0, 0) if dx is None else tiles.strides(dx)),
                *((0, 0, 0, 0) if dparams is None else _params_strides(dparams, form)), *s_mask,
                **_options(saved, form, t, params, dy, dparams, mask, dlogdet if form.elementwise else None),
            )  # fmt: skip
    return saved.new_empty(0) if dx is None else dx, params.new_empty(0) if dparams is None else dparams
