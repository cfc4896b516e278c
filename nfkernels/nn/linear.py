"""Linear flows with one matrix as it is: full, diagonal, triangular, block diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import channel_mix
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype
from .bijection import per_channel
from .cache import cached
from .linear_bijection import (
    LinearBijection,
    add_bias,
    block_product,
    checked_log_scale,
    condition_of,
    inverse_of,
    log_abs_det_of,
    random_rotations,
    solve_triangular,
    subtract_bias,
    triangle_of,
)


class FullLinear(LinearBijection):
    """``y = W x + b`` with any invertible W, on axis 1 of ``x [B, D, *spatial]``. Starts as a random rotation.

    Cost: forward O(D^2) per row; inverse and log-determinant O(D^3) once, the inverse O(D^2) per row besides. Without
    gradients on the CPU the inverse matrix is kept until the weight changes. The O(D^3) work is done in float64.
    Raises ``ValueError`` on the CPU if W is singular (on CUDA the result is not finite).
    """

    def __init__(self, features: int, *, bias: bool = True) -> None:
        super().__init__(features, bias)
        self.weight = nn.Parameter(random_rotations(1, features)[0])

    def multiply(self, x: Tensor) -> Tensor:
        return channel_mix(x, self.weight, self.bias)

    def solve(self, y: Tensor) -> Tensor:
        inverse = cached(self, "inverse", None, (self.weight,), lambda: inverse_of(self.matrix()))
        return channel_mix(y, inverse, None if self.bias is None else -(inverse * self.bias).sum(1))

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return log_abs_det_of(self, self.weight).to(dtype)

    def matrix(self) -> Tensor:
        return self.weight.to(exact_dtype(self.weight))


class DiagonalLinear(LinearBijection):
    """``y = exp(log_scale) x + b`` on axis 1 of ``x [B, D, *spatial]``. Starts as the identity.

    Cost: O(D) for everything. The scales are positive; :class:`ActNorm` is the one that starts from data. Raises
    ``ValueError`` on the CPU if a scale is zero or infinite in float32.
    """

    def __init__(self, features: int, *, bias: bool = True) -> None:
        super().__init__(features, bias)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def multiply(self, x: Tensor) -> Tensor:
        scale = torch.exp(per_channel(checked_log_scale(self.log_scale, "DiagonalLinear", "log_scale"), x))
        return add_bias(x * scale, self.bias).to(x.dtype)

    def solve(self, y: Tensor) -> Tensor:
        scale = torch.exp(-per_channel(checked_log_scale(self.log_scale, "DiagonalLinear", "log_scale"), y))
        return (subtract_bias(y, self.bias) * scale).to(y.dtype)

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return self.log_scale.sum(dtype=exact_dtype(self.log_scale)).to(dtype)

    @torch.no_grad()
    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        log_scale = self.log_scale.double()
        return torch.exp(log_scale.max() - log_scale.min()).item()

    def matrix(self) -> Tensor:
        return torch.diag(torch.exp(self.log_scale.to(exact_dtype(self.log_scale))))


class TriangularLinear(LinearBijection):
    """``y = T x + b`` with T triangular, its diagonal ``exp(log_scale)``, on axis 1 of ``x [B, D, *spatial]``.

    A linear autoregressive flow: output i looks at inputs up to i (from i on with ``lower=False``). Starts as the
    identity. Cost: forward O(D^2) per row, inverse O(D^2) per row by substitution, log-determinant O(D). Raises
    ``ValueError`` on the CPU if a scale is zero or infinite in float32.
    """

    def __init__(self, features: int, *, lower: bool = True, bias: bool = True) -> None:
        super().__init__(features, bias)
        self.lower = lower
        self.weight = nn.Parameter(torch.zeros(features, features))  # beside the triangle it is not looked at
        self.log_scale = nn.Parameter(torch.zeros(features))

    def multiply(self, x: Tensor) -> Tensor:
        triangle = self._triangle(compute_dtype(x))
        return channel_mix(x, triangle.tril() if self.lower else triangle.triu(), self.bias)

    def solve(self, y: Tensor) -> Tensor:
        triangle = self._triangle(compute_dtype(y))
        return solve_triangular(subtract_bias(y, self.bias), triangle, upper=not self.lower).to(y.dtype)

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return self.log_scale.sum(dtype=exact_dtype(self.log_scale)).to(dtype)

    def matrix(self) -> Tensor:
        triangle = self._triangle(exact_dtype(self.weight))
        return triangle.tril() if self.lower else triangle.triu()

    def _triangle(self, dtype: torch.dtype) -> Tensor:
        return triangle_of(self.weight, checked_log_scale(self.log_scale, "TriangularLinear", "log_scale"), dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lower={self.lower}"


class BlockDiagonalLinear(LinearBijection):
    """``y = diag(W_1, ..., W_n) x + b`` with D/c full blocks of c, on axis 1 of ``x [B, D, *spatial]``.

    Starts as random rotations. Cost: forward O(c D) per row; inverse and log-determinant O(c^2 D) once (D/c blocks of
    O(c^3)), the inverse O(c D) per row besides; kept without gradients on the CPU until the weights change. Raises
    ``ValueError`` if c does not divide D, and on the CPU if a block is singular (on CUDA the result is not finite).
    """

    def __init__(self, features: int, block: int, *, bias: bool = True) -> None:
        super().__init__(features, bias)
        if block < 1 or features % block:
            raise ValueError(f"BlockDiagonalLinear of {features} features needs a block that divides them, got {block}")
        self.block = block
        self.weight = nn.Parameter(random_rotations(features // block, block))

    def multiply(self, x: Tensor) -> Tensor:
        return add_bias(block_product(x, self.weight), self.bias).to(x.dtype)

    def solve(self, y: Tensor) -> Tensor:
        weight = self.weight
        inverse = cached(self, "inverse", None, (weight,), lambda: inverse_of(weight.to(exact_dtype(weight))))
        return block_product(subtract_bias(y, self.bias), inverse).to(y.dtype)

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return log_abs_det_of(self, self.weight).to(dtype)

    def matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.to(exact_dtype(self.weight)))

    @torch.no_grad()
    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        return condition_of(self.weight)  # O(c^2 D): all blocks' singular values are the matrix's

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}"
