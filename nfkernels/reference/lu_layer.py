"""A whole LU layer in plain PyTorch: dense or packed triangles, a permutation on either side, and the log-determinant.

``y = P (L + I) (U + diag s) x[columns] + b``; packed triangles hold their strict halves row by row, as nflows and
normflows keep them (``numpy.tril_indices`` and ``numpy.triu_indices``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import lu_linear
from .affine_coupling import compute_dtype
from .lu_compose import Diagonal, diagonal_of, exact_dtype


def dense(entries: Tensor, width: int, upper: bool) -> Tensor:
    """``[D, D]`` with zeros elsewhere from the packed strict triangle ``[D (D - 1) / 2]``; a matrix itself as it is."""
    if entries.dim() == 2:
        return entries
    place = places(width, upper, entries.device)
    return entries.new_zeros(width * width).scatter(0, place, entries).view(width, width)


def packed(matrix: Tensor, upper: bool) -> Tensor:
    """The strict triangle of ``[D, D]``, row by row."""
    return matrix.reshape(-1)[places(matrix.shape[0], upper, matrix.device)]


def places(width: int, upper: bool, device: torch.device) -> Tensor:
    """int64 ``[D (D - 1) / 2]``: where the strict triangle's elements lie in the matrix, row by row."""
    make = _places if torch.compiler.is_compiling() else _cached_places
    return make(width, upper, device)


def _places(width: int, upper: bool, device: torch.device) -> Tensor:
    indices = torch.triu_indices if upper else torch.tril_indices
    rows, columns = indices(width, width, 1 if upper else -1, device=device)
    return rows * width + columns


_cached_places = functools.lru_cache(maxsize=256)(_places)


def log_abs_det(x: Tensor, log_s: Tensor, diagonal: int, eps: float, inverse: bool) -> Tensor:
    """``[B]`` in the arithmetic's type: the sum of log|s| at every position of x, negated for the inverse."""
    total = diagonal_of(log_s.to(exact_dtype(log_s)), None, diagonal, eps)[1].sum()
    count = x.shape[2:].numel()
    total = (total * (-count if inverse else count)).to(compute_dtype(x))
    return total.expand(x.shape[0])


def forward(
    x, lower, upper, log_s, sign, permutation, columns, bias, diagonal: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """``(y, logdet [B])``, or with ``inverse`` x from y and the log-determinant of that."""
    width = x.shape[1]
    factors = dense(lower, width, False), dense(upper, width, True), log_s, sign, permutation, bias
    z = x if columns is None or inverse else x.index_select(1, columns)
    z = lu_linear.forward(z, *factors, diagonal, eps, inverse)
    if columns is not None and inverse:
        z = z.index_select(1, torch.argsort(columns))
    return z, log_abs_det(x, log_s, diagonal, eps, inverse)


def backward(
    dy, dlogdet, saved, lower, upper, log_s, sign, permutation, columns, diagonal: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dlower, dupper, dlog_s, dbias)`` from the map's x: the input, or with ``inverse`` the output."""
    width = saved.shape[1]
    factors = dense(lower, width, False), dense(upper, width, True), log_s, sign, permutation
    # The argument that a solve's gradient is for is y, in whose order nothing of `columns` stands.
    ordered = saved if columns is None else saved.index_select(1, columns)
    given = dy if columns is None or not inverse else dy.index_select(1, columns)
    dx, dlower, dupper, dlog_s, dbias = lu_linear.backward(given, ordered, *factors, diagonal, eps, inverse)
    if columns is not None and not inverse:
        dx = dx.index_select(1, torch.argsort(columns))
    if lower.dim() == 1:
        dlower = packed(dlower, False)
    if upper.dim() == 1:
        dupper = packed(dupper, True)
    if dlogdet is not None:
        count = saved.shape[2:].numel()
        slope = dlogdet.sum() * (-count if inverse else count)
        if diagonal == Diagonal.softplus:
            wide = log_s.to(exact_dtype(log_s))
            slope = slope * torch.sigmoid(wide) / diagonal_of(wide, None, diagonal, eps)[0]
        dlog_s = dlog_s + slope.to(dlog_s.dtype)
    return dx, dlower, dupper, dlog_s, dbias
