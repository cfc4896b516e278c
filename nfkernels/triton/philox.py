"""Philox4x32-10 in Triton: registers in, registers out (``nfkernels/reference/philox.py`` is the specification)."""

import triton
import triton.language as tl

M_0: tl.constexpr = tl.constexpr(0xD2511F53)
M_1: tl.constexpr = tl.constexpr(0xCD9E8D57)
WEYL_0: tl.constexpr = tl.constexpr(0x9E3779B9)
WEYL_1: tl.constexpr = tl.constexpr(0xBB67AE85)


@triton.jit
def load_key(p_key):
    """``[seed, offset]`` as 64-bit numbers without a sign."""
    return tl.load(p_key).to(tl.uint64, bitcast=True), tl.load(p_key + 1).to(tl.uint64, bitcast=True)


@triton.jit
def words(b_counter, b_seed, b_offset):
    """The four words (uint32) of 64-bit counters: elements 4 i .. 4 i + 3 of a tensor have the counter i."""
    b_counter = b_counter.to(tl.uint64)
    c_0 = b_counter.to(tl.uint32)
    c_1 = (b_counter >> 32).to(tl.uint32)
    c_2 = b_offset.to(tl.uint32) + c_0 * 0
    c_3 = (b_offset >> 32).to(tl.uint32) + c_0 * 0
    k_0 = b_seed.to(tl.uint32)
    k_1 = (b_seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p = c_0.to(tl.uint64) * M_0
        q = c_2.to(tl.uint64) * M_1
        c_0 = (q >> 32).to(tl.uint32) ^ c_1 ^ k_0
        c_1 = q.to(tl.uint32)
        c_2 = (p >> 32).to(tl.uint32) ^ c_3 ^ k_1
        c_3 = p.to(tl.uint32)
        k_0 = (k_0.to(tl.uint64) + WEYL_0).to(tl.uint32)
        k_1 = (k_1.to(tl.uint64) + WEYL_1).to(tl.uint32)
    return c_0, c_1, c_2, c_3


@triton.jit
def uniform(b_first, b_seed, b_offset, QUADS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """u for a tile ``[ROWS, N]`` whose rows start at the elements ``b_first`` ([ROWS, 1], int64) and run on from there.

    ``QUADS``: every start is a multiple of 4 and N is too: four neighbours share one call. Else each makes its own.
    """
    if QUADS:
        b_counter = (b_first >> 2) + tl.arange(0, N // 4)[None, :]
        w_0, w_1, w_2, w_3 = words(b_counter, b_seed, b_offset)
        b_word = tl.reshape(tl.join(tl.join(w_0, w_2), tl.join(w_1, w_3)), [ROWS, N])
    else:
        b_index = b_first + tl.arange(0, N)[None, :]
        w_0, w_1, w_2, w_3 = words(b_index >> 2, b_seed, b_offset)
        b_which = b_index & 3
        b_word = tl.where(b_which < 2, tl.where(b_which == 0, w_0, w_1), tl.where(b_which == 2, w_2, w_3))
    return (b_word >> 8).to(tl.int32).to(DTYPE) * 5.9604644775390625e-08
