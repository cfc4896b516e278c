"""Philox uniforms in Triton: the raw op (``nfkernels/reference/philox.py`` is the specification)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles as tiles
from .philox import load_key, uniform


@triton.jit
def uniform_kernel(p_y, p_key, n, C, P, s_b, s_c, s_p, DENSE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i_first = tl.program_id(0).to(tl.int64) * BLOCK
    b_seed, b_offset = load_key(p_key)
    b_u = uniform(tl.full([1, 1], 0, tl.int64) + i_first, b_seed, b_offset, True, DTYPE, 1, BLOCK)
    o_n = i_first + tl.arange(0, BLOCK)[None, :]
    if DENSE:
        o_y = o_n
    else:
        o_row = o_n // P
        o_y = (o_row // C) * s_b + (o_row % C) * s_c + (o_n % P) * s_p
    tl.store(p_y + o_y, b_u, mask=o_n < n)


def forward(like: Tensor, key: Tensor) -> Tensor:
    """The raw op ``_philox_uniform_forward``, every argument already checked."""
    y = torch.empty_like(like)
    if y.numel() == 0:
        return y
    with tiles.on_device_of(y):
        uniform_kernel[(tiles.divide_up(y.numel(), tiles.TILE),)](
            y, key.contiguous(), y.numel(), y.shape[1], tiles.positions(y), *tiles.strides(y),
            DENSE=y.is_contiguous(), DTYPE=tiles.TRITON_DTYPE[y.dtype], BLOCK=tiles.TILE,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y
