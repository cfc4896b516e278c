"""Philox4x32-10 in plain PyTorch: the specification of every backend's random numbers, on any device.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A key is an int64 tensor ``[seed, offset]``. Element
i of a tensor (in its logical order, whatever its strides) takes word ``i % 4`` of the counter ``(i // 4, offset)``
under the key ``seed``, each 64 bits as two words, low first, and ``u = (word >> 8) * 2**-24``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def words(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four words of counters ``(c0, c1, c2, c3)`` under ``(k0, k1)``: int64 tensors of 32-bit values, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        # Products wrap modulo 2^64, which is where their bits are; the shift's sign bits are masked off.
        p, q = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        r0, r1 = (k0 + i * _WEYL[0]) & _MASK, (k1 + i * _WEYL[1]) & _MASK
        c0, c1, c2, c3 = (q >> 32 & _MASK) ^ c1 ^ r0, q & _MASK, (p >> 32 & _MASK) ^ c3 ^ r1, p & _MASK
    return [c0, c1, c2, c3]


def uniform(shape: Sequence[int], key: Tensor, dtype: torch.dtype, *, start: int = 0) -> Tensor:
    """``u`` in ``[0, 1)`` for the elements ``start, start + 1, ...`` of a tensor, shaped and contiguous."""
    count = 1
    for n in shape:
        count *= n
    skipped = start % 4
    quads = torch.arange((skipped + count + 3) // 4, dtype=torch.int64, device=key.device) + start // 4
    seed, offset = key.narrow(-1, 0, 1), key.narrow(-1, 1, 1)
    counter = (quads & _MASK, quads >> 32 & _MASK, offset & _MASK, offset >> 32 & _MASK)
    quartets = torch.stack(torch.broadcast_tensors(*words(counter, (seed & _MASK, seed >> 32 & _MASK))), -1)
    drawn = quartets.flatten().narrow(0, skipped, count)
    return (drawn >> 8).to(dtype).reshape(shape) * 2.0**-24
