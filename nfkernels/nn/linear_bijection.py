"""What all linear flows share: ``y = W x + b`` on axis 1, at every position, with a log-determinant of W alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype, no_autocast
from .bijection import Bijection, check_channels, per_channel, positions, reads_values, valid_mask
from .cache import cached


class ConstantJacobian(Bijection):
    """A bijection whose Jacobian does not depend on the data: its log-determinant can be had without transforming."""

    uses_context = False

    def log_abs_det(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """``log|det J|`` of the forward, ``[B]``, for data like ``x``, of which only shape, type and device matter."""
        raise NotImplementedError

    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        """The largest over the smallest singular value of the Jacobian, NaN where the layer does not know it. Waits for
        the device. ``shape``: of one sample, for layers whose Jacobian depends on it. The layer's inverse loses about
        that many units in the last place."""
        return math.nan


class LinearBijection(ConstantJacobian):
    """``y[b, :, p] = W x[b, :, p] + bias`` on ``x [B, features, *spatial]``. A layer says what W is: how it multiplies,
    how it is undone, its ``log|det|``, and W itself."""

    def __init__(self, features: int, bias: bool) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"{type(self).__name__} needs at least 1 feature, got {features}")
        self.features = features
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def multiply(self, x: Tensor) -> Tensor:
        """``W x + bias``."""
        raise NotImplementedError

    def solve(self, y: Tensor) -> Tensor:
        """``W^-1 (y - bias)``."""
        raise NotImplementedError

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        """``log|det W|``, without a shape, in ``dtype``."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """W, ``[features, features]``, dense, for a look at it: O(features^3) in the worst case."""
        raise NotImplementedError

    def forward(self, x, context=None, *, lengths=None):
        check_channels(x, self.features, type(self).__name__)
        return self._valid(self.multiply(x), lengths), self.log_abs_det(x, lengths=lengths)

    def inverse(self, z, context=None, *, lengths=None):
        check_channels(z, self.features, type(self).__name__)
        return self._valid(self.solve(z), lengths), -self.log_abs_det(z, lengths=lengths)

    def log_abs_det(self, x, *, lengths=None):
        logdet, count = self.log_abs_det_matrix(compute_dtype(x)), positions(x, lengths)
        if not isinstance(count, int) or count != 1:  # a product less for every table
            logdet = logdet * count
        return logdet.expand(x.shape[0])

    @torch.no_grad()
    def condition_number(self, shape=None):
        values = torch.linalg.svdvals(self.matrix().double())
        return (values.max() / values.min()).item()

    def _valid(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """A bias moves padding, which is zero on both sides."""
        mask = None if self.bias is None else valid_mask(y, lengths)
        return y if mask is None else torch.where(mask, y, 0.0)

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"


# --- shared by the layers ---------------------------------------------------------------------------------------------


def random_rotations(count: int, channels: int) -> Tensor:
    return torch.linalg.qr(torch.randn(count, channels, channels))[0]


def checked_log_scale(log_s: Tensor, layer: str) -> Tensor:
    """``log_s``, looked at on the CPU: a scale of zero or beyond float32 is told."""
    if reads_values(log_s) and log_s.numel():
        largest = torch.linalg.vector_norm(log_s.detach(), math.inf).item()
        if not largest < 80:  # nor for NaN
            raise ValueError(f"a matrix of this {layer} is singular: log_s reached {largest:.3g}")
    return log_s


def log_abs_det_of(layer: nn.Module, matrices: Tensor) -> Tensor:
    """``log|det|`` of ``[..., C, C]``, summed, in float64: O(C^3) each; kept as inverses are."""

    def made() -> Tensor:
        logdets = torch.linalg.slogdet(matrices.to(exact_dtype(matrices))).logabsdet
        return checked_log_abs_det(logdets.sum(), type(layer).__name__)

    return cached(layer, "logdet", None, (matrices,), made)


def triangle_of(weight: Tensor, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [..., D, D]`` with ``exp(log_scale)`` on its diagonal; a solve reads one of its triangles only."""
    return torch.diagonal_scatter(weight.to(dtype), torch.exp(log_scale.to(dtype)), dim1=-2, dim2=-1)


def checked_log_abs_det(logdet: Tensor, layer: str) -> Tensor:
    """``log|det|`` of a matrix, looked at on the CPU."""
    if reads_values(logdet) and not bool(torch.isfinite(logdet.detach()).all()):
        raise ValueError(f"a matrix of this {layer} is singular: it has no inverse")
    return logdet


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + per_channel(bias, y)


def subtract_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y - per_channel(bias, y)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix [out, in]`` times ``x [B, in, *spatial]`` at every position; square ones are ``channel_mix``'s."""
    dtype = compute_dtype(x)
    matrix = matrix.to(dtype)
    with no_autocast(x.device.type):
        if x.dim() == 2:
            return F.linear(x.to(dtype), matrix)
        return torch.matmul(matrix, x.flatten(2).to(dtype)).reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def solve_triangular(x: Tensor, triangle: Tensor, *, upper: bool) -> Tensor:
    """``triangle^-1 x`` at every position of ``x [B, D, *spatial]``: O(D^2) each."""
    dtype = compute_dtype(x)
    triangle = triangle.to(dtype)
    with no_autocast(x.device.type):
        if x.dim() == 2:
            return torch.linalg.solve_triangular(triangle.mT, x.to(dtype), upper=not upper, left=False)
        return torch.linalg.solve_triangular(triangle, x.flatten(2).to(dtype), upper=upper).reshape(x.shape)


def block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """``blocks [n, c, c]`` times ``x [B, n c, *spatial]``, block by block, at every position."""
    dtype = compute_dtype(x)
    blocks = blocks.to(dtype)
    count, size = blocks.shape[:2]
    with no_autocast(x.device.type):
        split = x.to(dtype).reshape(x.shape[0], count, size, x.shape[2:].numel())
        if split.shape[3] == 1:  # tables: one product of all rows for each block
            return torch.bmm(split[..., 0].transpose(0, 1), blocks.mT).transpose(0, 1).reshape(x.shape)
        return torch.matmul(blocks, split).reshape(x.shape)


def inverse_of(matrices: Tensor) -> Tensor:
    """``[..., C, C]`` solved against the identity; not finite where singular, without a wait for the device."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve_ex(matrices, identity.expand_as(matrices))[0]
