"""The invertible 1x1 convolution: a learned mixing of channels, factored or whole, of all channels or in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import channel_mix, channel_mix_from_output, lu_compose
from ..ops.lu_compose import LUMatrices
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype, no_autocast
from .cache import cached
from .linear_bijection import (
    LinearBijection,
    block_product,
    checked_log_scale,
    condition_of,
    inverse_of,
    log_abs_det_of,
    random_rotations,
    triangle_of,
)
from .orthogonal import reflection_factors, rotation
from .replay import gradients

Parametrization = Literal["plu", "full", "qr"]


class InvertibleConv1x1(LinearBijection):
    """``y[b, :, p] = W x[b, :, p]`` on ``x [B, C, *spatial]``; logdet ``P * log|det W|``. Starts as a random rotation.

    Args:
        channels: C.
        parametrization: ``"plu"``: ``W = P (L + I) (U + diag(sign * exp(log_s)))``, whose log-determinant is the sum
            of ``log_s`` and whose inverse is two triangular solves; ``"qr"``: ``W = Q R``, Q of C reflections, R upper
            triangular with the diagonal ``exp(log_s)``; ``"full"``: W itself.
        groups: W is block diagonal, a matrix of C/groups for each run of C/groups channels.
        shared: the groups share one matrix (Glow-TTS).

    Raises ``ValueError`` if groups does not divide C, and on the CPU if W is singular (on CUDA the result is not
    finite: no forward waits for it).

    The small matrix work is done in float64 where the device has it (never in TF32), the mixing in float32. Cost, with
    c = C/groups: O(c C) per position; once O(c^2 C) for W or its inverse, and for the log-determinant O(C) factored,
    O(c^2 C) full. Without gradients on the CPU the inverse is kept until a parameter changes. Reference: Kingma &
    Dhariwal 2018 (Glow), section 3.2, eq. 10-11; QR: Hoogeboom et al. 2019, section 4.1.
    """

    permutation: Tensor
    sign_s: Tensor

    def __init__(
        self, channels: int, parametrization: Parametrization = "plu", *, groups: int = 1, shared: bool = False
    ) -> None:
        super().__init__(channels, bias=False)
        if parametrization not in get_args(Parametrization):
            raise ValueError(f"unknown parametrization {parametrization!r}: expected 'plu', 'full' or 'qr'")
        if groups < 1 or channels % groups:
            raise ValueError(f"InvertibleConv1x1 of {channels} channels needs groups that divide them, got {groups}")
        self.channels, self.parametrization, self.groups, self.shared = channels, parametrization, groups, shared
        count, size = (1 if shared else groups), channels // groups
        # One matrix has no axis of groups.
        self._one = count == 1
        rotations = random_rotations(count, size)
        if parametrization == "full":
            self.weight = self._parameter(rotations)
        elif parametrization == "qr":
            self.vectors = self._parameter(torch.randn(count, size, size))
            self.upper, self.log_s = (self._parameter(torch.zeros(count, *n)) for n in ((size, size), (size,)))
        else:
            permutation, lower, upper, log_s, sign_s = plu(rotations)
            self.lower, self.upper, self.log_s = map(self._parameter, (lower, upper, log_s))
            self.register_buffer("permutation", permutation[0] if self._one else permutation)
            self.register_buffer("sign_s", sign_s[0] if self._one else sign_s)

    def _parameter(self, v: Tensor) -> nn.Parameter:
        return nn.Parameter(v[0] if self._one else v)

    def multiply(self, x: Tensor) -> Tensor:
        return self._mix(x, self.matrices(compute_dtype(x)))

    def solve(self, y: Tensor) -> Tensor:
        dtype = compute_dtype(y)
        return self._mix(
            y, cached(self, "inverse", dtype, (*self.parameters(), *self.buffers()), lambda: self.inverses(dtype))
        )

    @torch.no_grad()
    def from_output(
        self,
        z: Tensor,
        dz: Tensor | None,
        dlogdet: Tensor | None,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        if self.groups > 1:
            return super().from_output(z, dz, dlogdet, wanted, context, lengths=lengths)
        dtype = compute_dtype(z)
        with torch.enable_grad():
            matrix, logdet = self.matrices(dtype), self.log_abs_det(z, lengths=lengths)
        x, dx, dmatrix, _ = channel_mix_from_output(
            z, matrix.detach(), self.inverses(dtype), None, torch.zeros_like(z) if dz is None else dz
        )
        return x, dx, gradients([matrix, logdet], wanted, [dmatrix.to(matrix.dtype), dlogdet])

    def matrices(self, dtype: torch.dtype) -> Tensor:
        """W, ``[C, C]``, or the groups', ``[G, c, c]``, in ``dtype`` or better."""
        if self.parametrization == "full":
            return self.weight.to(exact_dtype(self.weight))
        if self.parametrization == "qr":
            return rotation(*reflection_factors(self.vectors, "InvertibleConv1x1")) @ self._triangle().triu()
        return self._composed(dtype, inverse=False).weight

    def inverses(self, dtype: torch.dtype) -> Tensor:
        """Their inverses, by substitution where they are factored."""
        if self.parametrization == "full":
            return inverse_of(self.matrices(dtype))
        if self.parametrization == "qr":
            transpose = rotation(*reflection_factors(self.vectors, "InvertibleConv1x1")).mT
            with no_autocast(transpose.device.type):
                return torch.linalg.solve_triangular(self._triangle(), transpose, upper=True)
        return self._composed(dtype, weight=False).inverse

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        repeats = self.groups if self.shared else 1
        if self.parametrization != "full":
            log_s = checked_log_scale(self.log_s, "InvertibleConv1x1")
            return repeats * log_s.sum(dtype=exact_dtype(log_s)).to(dtype)
        return repeats * log_abs_det_of(self, self.weight).to(dtype)

    def matrix(self) -> Tensor:
        matrices = self.matrices(exact_dtype(next(self.parameters())))
        if self.groups == 1:
            return matrices
        return torch.block_diag(*(matrices.expand(self.groups, -1, -1) if self._one else matrices))

    @torch.no_grad()
    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        return condition_of(self.matrices(torch.float64))

    def _mix(self, x: Tensor, matrices: Tensor) -> Tensor:
        if not self._one:
            return block_product(x, matrices).to(x.dtype)
        if self.groups == 1:
            return channel_mix(x, matrices)
        split = x.reshape(x.shape[0] * self.groups, self.channels // self.groups, *x.shape[2:])
        return channel_mix(split, matrices).reshape(x.shape)

    def _composed(self, dtype: torch.dtype, **options: Any) -> LUMatrices:
        factors = (self.lower, self.upper, checked_log_scale(self.log_s, "InvertibleConv1x1"))
        lower, upper, log_s = (t.to(dtype) for t in factors)
        return lu_compose(lower, upper, log_s, sign=self.sign_s, permutation=self.permutation, **options)

    def _triangle(self) -> Tensor:
        log_s = checked_log_scale(self.log_s, "InvertibleConv1x1")
        return triangle_of(self.upper, log_s, exact_dtype(log_s))

    def extra_repr(self) -> str:
        grouped = f", groups={self.groups}, shared={self.shared}" if self.groups > 1 else ""
        return f"{self.channels}, parametrization={self.parametrization!r}{grouped}"


# --- shared with GlowSteps and LULinear -------------------------------------------------------------------------------


def plu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(permutation, lower, upper, log_s, sign_s)`` of ``weight [K, C, C]``, as :func:`nfkernels.lu_compose` takes
    them."""
    permutation, lower, upper = torch.linalg.lu(weight)
    s = upper.diagonal(dim1=-2, dim2=-1)
    return permutation.argmax(-1), lower.tril(-1), upper.triu(1), s.abs().log(), s.sign()
