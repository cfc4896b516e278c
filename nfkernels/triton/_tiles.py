"""What the launchers share: strides over ``[B, C, P]``, tile sizes, and the second stage of a log-determinant.

Tile sizes come from the numbers here, by shape; nothing is tuned inside a call (that would break graph capture).
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements in flight of a program: 8 for each thread of 4 warps
WIDE_TILE = 2048  # of a sample that has that many, with 8 warps
ROW_LIMIT = 512  # samples of at most this many elements share a program (1024 where P = 1)
ONE_PROGRAM_TILES = 4  # a sample of at most this many tiles keeps to one program, and the log-det to one kernel
PROGRAMS = 4096  # wanted in all where samples are split: several waves on any GPU of today
MIXED_TILE = 32  # channels in a tile whose tensors disagree about which axis has the unit stride
WORKERS = 256  # programs that each write one partial of a weight's or a gain's gradient

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def divide_up(n: int, by: int) -> int:
    return -(-n // by)


def positions(x: Tensor) -> int:
    """P: the product of the sizes after the channels."""
    size = 1
    for n in x.shape[2:]:
        size *= n
    return size


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over ``[B, C, P]``. Those of axes of size one are arbitrary in torch and mean nothing: 0 here."""
    inner = 0
    for n, s in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if n > 1:
            inner = s
            break
    batch = x.stride(0) if x.shape[0] > 1 else 0
    channel = x.stride(1) if x.shape[1] > 1 else 0
    return batch, channel, inner if positions(x) > 1 else 0


def span(x: Tensor | None) -> int:
    """How far from a sample's first element its last one lies."""
    if x is None or x.numel() == 0:
        return 0
    _, channel, inner = strides(x)
    return (x.shape[1] - 1) * channel + (positions(x) - 1) * inner


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets inside one sample need 64 bits (offsets of samples always have them); with room for padding."""
    return max(span(t) for t in tensors) >= 2**30


class Tile(NamedTuple):
    """One program's tile: ``[samples, elements]`` of rows, ``[channels, positions]`` of images."""

    rows: bool
    block_0: int
    block_1: int
    warps: int


def tile(x: Tensor, params: Tensor) -> Tile:
    """Rows where several samples fit one program, else images: one sample split over channels and positions."""
    channels, size = x.shape[1], positions(x)
    n = channels * size
    if n <= (ROW_LIMIT if size > 1 else TILE):
        block = power_of_2(n)
        return Tile(True, max(1, min(TILE // block, power_of_2(x.shape[0]))), block, 4)
    elements = WIDE_TILE if n >= WIDE_TILE else TILE
    warps = 8 if elements == WIDE_TILE else 4
    channels_inner = [strides(t)[1] == 1 and t.shape[1] > 1 for t in (x, params)]
    if all(channels_inner):
        block_c = min(power_of_2(channels), elements)
        block_p = min(elements // block_c, power_of_2(size))
    else:
        # Of two layouts, one is read across its unit stride; Triton turns that tile in shared memory.
        most = min(power_of_2(channels), MIXED_TILE) if any(channels_inner) else 1
        block_p = min(power_of_2(size), elements // most)
        block_c = min(elements // block_p, power_of_2(channels))
    return Tile(False, block_c, block_p, warps)


def on_device_of(x: Tensor):
    """Triton launches on the current device: makes it x's, where it is another one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


@triton.jit
def sum_partials_kernel(
    p_partials, p_running, p_out, rows, n, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_rows = tl.program_id(0)
    o_rows = i_rows * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < rows
    p_rows = p_partials + o_rows.to(tl.int64)[:, None] * n
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], p_out.dtype.element_ty)
    for i_n in range(0, n, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_sum += tl.load(p_rows + o_n[None, :], mask=m_rows[:, None] & (o_n < n)[None, :], other=0.0)
    b_out = tl.sum(b_sum, 1)
    if p_running is not None:
        b_out += tl.load(p_running + o_rows, mask=m_rows, other=0.0)
    tl.store(p_out + o_rows, b_out, mask=m_rows)


def sum_partials(partials: Tensor, running: Tensor | None, out: Tensor) -> None:
    """``out[b] = sum(partials[b, :]) + running[b]``, in an order that the shape alone fixes."""
    rows, n = partials.shape
    block_n = min(power_of_2(n), TILE)
    block_rows = max(1, min(TILE // block_n, 32))
    grid = (divide_up(rows, block_rows),)
    sum_partials_kernel[grid](
        partials, running, out, rows, n, BLOCK_ROWS=block_rows, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True
    )
