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

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(x, self.features, type(self).__name__, own=self._any_parameter())
        return self._valid(self.multiply(x), lengths), self.log_abs_det(x, lengths=lengths)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_channels(z, self.features, type(self).__name__, own=self._any_parameter())
        return self._valid(self.solve(z), lengths), -self.log_abs_det(z, lengths=lengths)

    def log_abs_det(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        logdet, count = self.log_abs_det_matrix(compute_dtype(x)), positions(x, lengths)
        if not isinstance(count, int) or count != 1:  # a product less for every table
            logdet = logdet * count
        return logdet.expand(x.shape[0])

    @torch.no_grad()
    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        return condition_of(self.matrix())

    def _any_parameter(self) -> Tensor:
        return next(self.parameters())

    def _valid(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """A bias moves padding, which is zero on both sides."""
        mask = None if self.bias is None else valid_mask(y, lengths)
        return y if mask is None else torch.where(mask, y, 0.0)

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"


# --- shared by the layers ---------------------------------------------------------------------------------------------


def random_rotations(count: int, channels: int) -> Tensor:
    return torch.linalg.qr(torch.randn(count, channels, channels))[0]


def checked_log_scale(log_s: Tensor, layer: str, name: str = "log_s") -> Tensor:
    """``log_s``, looked at on the CPU: a scale near the ends of float32, beyond e^80 or below e^-80, is told."""
    if reads_values(log_s) and log_s.numel():
        largest = torch.linalg.vector_norm(log_s.detach(), math.inf).item()
        if not largest < 80:  # nor for NaN
            raise ValueError(f"a matrix of this {layer} is singular: {name} reached {largest:.3g} (float32: 87)")
    return log_s


def log_abs_det_of(layer: nn.Module, matrices: Tensor) -> Tensor:
    """``log|det|`` of ``[..., C, C]``, summed, in float64: O(C^3) each; kept as inverses are."""

    def made() -> Tensor:
        wide = matrices.to(exact_dtype(matrices))
        _, logdets, factors, _ = torch._linalg_slogdet(wide)  # torch.linalg.slogdet, with the LU it is made by
        # A pivot that is rounding of its column stands for zero.
        pivots = factors.detach().diagonal(dim1=-2, dim2=-1).abs()
        columns = torch.linalg.vector_norm(wide.detach(), math.inf, dim=-2)  # the largest of each, in one pass
        gone = ~(pivots > 8 * torch.finfo(wide.dtype).eps * columns).all(-1)
        if reads_values(gone) and bool(gone.any()):
            raise ValueError(f"a matrix of this {type(layer).__name__} is singular: it has no inverse")
        return torch.where(gone, math.nan, logdets).sum()

    return cached(layer, "logdet", None, (matrices,), made).clone()  # what is kept is nobody else's


def condition_of(matrices: Tensor) -> float:
    """The largest over the smallest singular value of ``[..., C, C]`` taken together; NaN of what is not finite."""
    if not bool(torch.isfinite(matrices).all()):
        return math.nan
    values = torch.linalg.svdvals(matrices.double())
    return (values.max() / values.min()).item() if bool(values.min() > 0) else math.inf


def triangle_of(weight: Tensor, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [..., D, D]`` with ``exp(log_scale)`` on its diagonal; a solve reads one of its triangles only."""
    return torch.diagonal_scatter(weight.to(dtype), torch.exp(log_scale.to(dtype)), dim1=-2, dim2=-1)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + per_channel(bias, y)


def subtract_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y - per_channel(bias, y)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a library product of ``x`` is computed in: float32 stays float32 only where it may not be rounded to TF32 or
    bfloat16 (``torch.set_float32_matmul_precision``, which a compiled graph cannot ask for)."""
    dtype = compute_dtype(x)
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest":
        return dtype
    return exact_dtype(x)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix [out, in]`` times ``x [B, in, *spatial]`` at every position; square ones are ``channel_mix``'s."""
    dtype = product_dtype(x)
    wide, matrix = x.to(dtype), matrix.to(dtype)
    with no_autocast(x.device.type):
        if x.dim() == 2:
            return F.linear(wide, matrix).to(compute_dtype(x))
        y = torch.matmul(matrix, wide.flatten(2)).to(compute_dtype(x))
        return y.reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def solve_triangular(x: Tensor, triangle: Tensor, *, upper: bool) -> Tensor:
    """``triangle^-1 x`` at every position of ``x [B, D, *spatial]``: O(D^2) each."""
    dtype = product_dtype(x)
    wide, triangle = x.to(dtype), triangle.to(dtype)
    with no_autocast(x.device.type):
        if x.dim() == 2:
            y = torch.linalg.solve_triangular(triangle.mT, wide, upper=not upper, left=False)
        else:
            y = torch.linalg.solve_triangular(triangle, wide.flatten(2), upper=upper).reshape(x.shape)
    return y.to(compute_dtype(x))


def block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """``blocks [n, c, c]`` times ``x [B, n c, *spatial]``, block by block, at every position."""
    dtype = product_dtype(x)
    blocks = blocks.to(dtype)
    count, size = blocks.shape[:2]
    with no_autocast(x.device.type):
        split = x.to(dtype).reshape(x.shape[0], count, size, x.shape[2:].numel())
        if split.shape[3] == 1:  # tables: one product of all rows for each block
            y = torch.bmm(split[..., 0].transpose(0, 1), blocks.mT).transpose(0, 1)
        else:
            y = torch.matmul(blocks, split)
        return y.reshape(x.shape).to(compute_dtype(x))


def inverse_of(matrices: Tensor) -> Tensor:
    """``[..., C, C]`` solved against the identity; not finite where singular, without a wait for the device."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve_ex(matrices, identity.expand_as(matrices))[0]
