"""The LU-factored linear flow."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import lu_layer, lu_linear
from ..ops.lu_compose import DiagonalName
from ..reference.lu_compose import Diagonal, diagonal_of, exact_dtype
from .bijection import check_channels
from .invertible_conv import plu
from .linear_bijection import LinearBijection, checked_log_scale, random_rotations

PermutationName = Literal["none", "reverse", "random"]
Start = Literal["identity", "rotation"]


class LULinear(LinearBijection):
    """``y = P L U x + b`` on axis 1 of ``x [B, D, *spatial]``: L unit lower, U upper triangular, P a fixed permutation.

    Args:
        features: D.
        permutation: ``"none"``, ``"reverse"``, ``"random"`` (drawn once) or int64 ``[D]``: output i is row
            ``permutation[i]`` of ``L U x``.
        diagonal: of U: ``"exp"``: ``sign * exp(log_s)``; ``"softplus"``: ``softplus(log_s) + eps``, as in nflows.
        start: ``"identity"``: ``L = U = I``, up to the permutation; ``"rotation"``: the factors, P and signs among
            them, of a random rotation.

    Cost: O(D^2) per row forward and inverse (two triangular solves; no inverse matrix is made), log-determinant O(D):
    ``sum log|s|``. With more rows than features the forward and the gradients also make ``L U`` once, O(D^3). Raises
    ``ValueError`` for options that do not fit together, and on the CPU if the diagonal is zero or infinite in float32.
    Reference: Kingma & Dhariwal 2018 (Glow), section 3.2, eq. 10; Oliva et al. 2018.
    """

    permutation: Tensor
    sign_s: Tensor

    def __init__(
        self,
        features: int,
        *,
        permutation: PermutationName | Tensor = "none",
        diagonal: DiagonalName = "exp",
        eps: float = 1e-3,
        start: Start = "identity",
        bias: bool = True,
    ) -> None:
        super().__init__(features, bias)
        for name, value, known in (("diagonal", diagonal, DiagonalName), ("start", start, Start)):
            if value not in get_args(known):
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(map(repr, get_args(known)))}")
        if not 0 <= eps < 1:  # nor for NaN; from 1 on it could not start as the identity
            raise ValueError(f"eps must be at least 0 and below 1, got {eps}")
        self.diagonal, self.eps = diagonal, eps
        sign = order = None
        if start == "rotation":
            if diagonal != "exp" or not (isinstance(permutation, str) and permutation == "none"):
                raise ValueError("a rotation has its own signs and permutation: give diagonal='exp' and no permutation")
            order, lower, upper, log_s, sign = (v[0] for v in plu(random_rotations(1, features)))
        else:
            order = _order(permutation, features)
            lower, upper = torch.zeros(features, features), torch.zeros(features, features)
            # softplus(log_s) + eps = 1
            one = torch.tensor(1.0 - eps).expm1().log() if diagonal == "softplus" else torch.tensor(0.0)
            log_s = one.repeat(features)
        self.lower, self.upper, self.log_s = nn.Parameter(lower), nn.Parameter(upper), nn.Parameter(log_s)
        self.register_buffer("permutation", order)
        self.register_buffer("sign_s", sign)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, lengths=lengths) if lengths is not None else self._at_once(x, False)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().inverse(z, lengths=lengths) if lengths is not None else self._at_once(z, True)

    def _at_once(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The product or the solve and its log-determinant in one call."""
        check_channels(x, self.features, "LULinear", own=self.lower)
        return lu_layer(
            x, self.lower, self.upper, self._checked(), self.bias, sign=self.sign_s, permutation=self.permutation,
            diagonal=self.diagonal, eps=self.eps, inverse=inverse,
        )  # fmt: skip

    def multiply(self, x: Tensor) -> Tensor:
        return self._apply_factors(x, False)

    def solve(self, y: Tensor) -> Tensor:
        return self._apply_factors(y, True)

    def _apply_factors(self, x: Tensor, inverse: bool) -> Tensor:
        return lu_linear(
            x, self.lower, self.upper, self._checked(), self.bias, sign=self.sign_s, permutation=self.permutation,
            diagonal=self.diagonal, eps=self.eps, inverse=inverse,
        )  # fmt: skip

    def _checked(self) -> Tensor:
        """``log_s``, with what is not a scale told on the CPU."""
        if self.diagonal == "exp":
            return checked_log_scale(self.log_s, "LULinear")
        checked_log_scale(self._log_diagonal(self.log_s.detach()), "LULinear", "log s")
        return self.log_s

    def _log_diagonal(self, log_s: Tensor) -> Tensor:
        """``log|s|`` in :func:`exact_dtype`, as the op makes s."""
        kind = Diagonal[self.diagonal]
        return diagonal_of(log_s.to(exact_dtype(log_s)), None, kind, self.eps)[1]

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        if self.diagonal == "exp":
            return self.log_s.sum(dtype=exact_dtype(self.log_s)).to(dtype)
        return self._log_diagonal(self.log_s).sum().to(dtype)

    def matrix(self) -> Tensor:
        dtype = exact_dtype(self.lower)
        s = torch.exp(self._log_diagonal(self.log_s))
        upper = self.upper.to(dtype).triu(1) + torch.diag(s if self.sign_s is None else s * self.sign_s)
        product = upper + self.lower.to(dtype).tril(-1) @ upper
        return product if self.permutation is None else product[self.permutation]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, diagonal={self.diagonal!r}, permuted={self.permutation is not None}"


def _order(permutation: PermutationName | Tensor, features: int) -> Tensor | None:
    if isinstance(permutation, Tensor):
        if permutation.dtype != torch.int64 or permutation.shape != (features,):
            raise ValueError(
                f"permutation must be int64 [{features}], got {permutation.dtype} {list(permutation.shape)}"
            )
        if not permutation.is_meta and not torch.equal(permutation.sort()[0].cpu(), torch.arange(features)):
            raise ValueError(f"permutation must hold each of 0 to {features - 1} once")
        return permutation.clone()
    if permutation not in get_args(PermutationName):
        known = ", ".join(map(repr, get_args(PermutationName)))
        raise ValueError(f"unknown permutation {permutation!r}: expected {known} or an int64 tensor")
    if permutation == "none":
        return None
    return torch.arange(features - 1, -1, -1) if permutation == "reverse" else torch.randperm(features)
