"""Orthogonal matrices as products of reflections, and the QR-factored linear flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype, no_autocast
from .bijection import reads_values
from .cache import cached
from .linear_bijection import (
    LinearBijection,
    add_bias,
    checked_log_scale,
    product,
    solve_triangular,
    subtract_bias,
    triangle_of,
)

# From D/DENSE reflections on Q is made: its product costs what two thin ones of D/2 do, and rounds less from D/3.
DENSE = 3


def reflection_factors(vectors: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """``(A, V)`` in :func:`exact_dtype` with ``H_1 ... H_m = I - A V^T`` for ``H_i = I - 2 v_i v_i^T / |v_i|^2``.

    ``vectors [m, D]`` are the ``v_i``; ``A = V S^-1`` with ``S = striu(V^T V) + diag(|v_i|^2 / 2)``, one product and
    one triangular solve: O(m^2 D). Reference: Joffrain et al. 2006, the UT transform.
    """
    rows = vectors.to(exact_dtype(vectors))
    with no_autocast(rows.device.type):
        products = rows @ rows.mT
        squares = products.diagonal(dim1=-2, dim2=-1)
        if reads_values(squares) and not bool((squares.detach() > 0).all() & torch.isfinite(squares.detach()).all()):
            raise ValueError(f"a reflection of this {layer} has no direction: its vector is zero or not finite")
        middle = products.triu(1) + torch.diag_embed(0.5 * squares)
        return torch.linalg.solve_triangular(middle, rows.mT, upper=True, left=False), rows.mT


class HouseholderOrthogonal(LinearBijection):
    """``y = H_1 H_2 ... H_m x`` on axis 1 of ``x [B, D, *spatial]``: an orthogonal W; logdet 0, condition number 1.

    Args:
        features: D.
        reflections: m. D of them reach every orthogonal matrix of determinant (-1)^D; the default.

    In WY form, ``x - A (V^T x)``: two thin products and not m rank-1 updates; from D/3 reflections on Q is made and the
    product is one. The inverse is the transpose. Cost: O(m D) per row either way, O(m^2 D) once (O(m D^2) where Q is
    made), in float64. Raises ``ValueError`` on the CPU if a vector is zero. Reference: Tomczak & Welling 2016, section
    3; Joffrain et al. 2006 (UT transform).
    """

    def __init__(self, features: int, reflections: int | None = None, *, bias: bool = False) -> None:
        super().__init__(features, bias)
        self.vectors = random_vectors(features, reflections, "HouseholderOrthogonal")

    def multiply(self, x: Tensor) -> Tensor:
        return add_bias(reflect(self, x), self.bias).to(x.dtype)

    def solve(self, y: Tensor) -> Tensor:
        return reflect(self, subtract_bias(y, self.bias), transposed=True).to(y.dtype)

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return self.vectors.new_zeros((), dtype=dtype)

    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        return 1.0 if bool((self.vectors.detach().abs().sum(1) > 0).all()) else math.nan

    def matrix(self) -> Tensor:
        return rotation(*reflection_factors(self.vectors, "HouseholderOrthogonal"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={self.vectors.shape[0]}"


def random_vectors(features: int, reflections: int | None, layer: str) -> nn.Parameter:
    """``[m, D]``; m is D where it is not given."""
    reflections = features if reflections is None else reflections
    if reflections < 1:
        raise ValueError(f"{layer} needs at least 1 reflection, got {reflections}")
    return nn.Parameter(torch.randn(reflections, features))


def rotation(a: Tensor, v: Tensor) -> Tensor:
    """``I - A V^T``, dense."""
    return torch.eye(a.shape[-2], dtype=a.dtype, device=a.device) - a @ v.mT


def reflect(layer: HouseholderOrthogonal | QRLinear, x: Tensor, *, transposed: bool = False) -> Tensor:
    """Q or its transpose, of a layer's ``vectors``, times x, in the arithmetic's type: ``x - A (V^T x)``, or a product
    with Q itself; kept while the vectors do not change."""
    reflections, features = layer.vectors.shape

    def factors() -> tuple[Tensor, ...]:
        a, v = reflection_factors(layer.vectors, type(layer).__name__)
        return (a, v) if DENSE * reflections < features else (rotation(a, v),)

    made = cached(layer, "reflections", None, (layer.vectors,), factors)
    if len(made) == 1:
        return product(x, made[0].mT if transposed else made[0])
    a, v = reversed(made) if transposed else made
    return x.to(compute_dtype(x)) - product(product(x, v.mT), a)


class QRLinear(LinearBijection):
    """``y = Q (R x) + b`` on axis 1 of ``x [B, D, *spatial]``: Q of Householder reflections, R upper triangular.

    R has the diagonal ``exp(log_scale)`` and starts as the identity; Q starts at random. Cost: O((m + D) D) per row
    either way (the inverse by the transpose and one substitution), O(m D^2) once, log-determinant O(D). Raises
    ``ValueError`` on the CPU if a scale or a reflection's vector is zero. Reference: Hoogeboom et al. 2019 (Emerging
    convolutions), section 4.1.
    """

    def __init__(self, features: int, reflections: int | None = None, *, bias: bool = True) -> None:
        super().__init__(features, bias)
        self.vectors = random_vectors(features, reflections, "QRLinear")
        self.upper = nn.Parameter(torch.zeros(features, features))  # beside the triangle it is not looked at
        self.log_scale = nn.Parameter(torch.zeros(features))

    def multiply(self, x: Tensor) -> Tensor:
        y = product(x, self._triangle(compute_dtype(x)).triu())
        return add_bias(reflect(self, y), self.bias).to(x.dtype)

    def solve(self, y: Tensor) -> Tensor:
        x = reflect(self, subtract_bias(y, self.bias), transposed=True)
        return solve_triangular(x, self._triangle(x.dtype), upper=True).to(y.dtype)

    def log_abs_det_matrix(self, dtype: torch.dtype) -> Tensor:
        return self.log_scale.sum(dtype=exact_dtype(self.log_scale)).to(dtype)

    def matrix(self) -> Tensor:
        return rotation(*reflection_factors(self.vectors, "QRLinear")) @ self._triangle(exact_dtype(self.upper)).triu()

    def _triangle(self, dtype: torch.dtype) -> Tensor:
        return triangle_of(self.upper, checked_log_scale(self.log_scale, "QRLinear", "log_scale"), dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={self.vectors.shape[0]}"
