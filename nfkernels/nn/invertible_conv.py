"""The invertible 1x1 convolution: a learned mixing of channels, kept factored or whole."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops import channel_mix
from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_channels, positions, reads_values


class InvertibleConv1x1(Bijection):
    """``y[b, :, p] = W x[b, :, p]`` on ``x [B, C, *spatial]``; logdet ``P * log|det W|``. Starts as a random rotation.

    Args:
        channels: C.
        parametrization: ``"plu"``: ``W = P (L + I) (U + diag(sign * exp(log_s)))``, whose log-determinant is the sum
            of ``log_s`` and whose inverse is two triangular solves; ``"full"``: W itself, O(C^3) for both.

    Raises ``ValueError`` on the CPU if W is singular (on CUDA the result is not finite: no forward waits for it).

    The small matrix work is done in float64 where the device has it (never in TF32), the mixing in float32. Cost:
    O(C^2) per position and O(C^3) once. Reference: Kingma & Dhariwal 2018 (Glow), section 3.2, eq. 10-11.
    """

    uses_context = False

    def __init__(self, channels: int, parametrization: Literal["plu", "full"] = "plu") -> None:
        super().__init__()
        self.channels, self.parametrization = channels, parametrization
        rotation = random_rotations(1, channels)
        if parametrization == "full":
            self.weight = nn.Parameter(rotation[0])
        elif parametrization == "plu":
            permutation, lower, upper, log_s, sign_s = (v[0] for v in plu(rotation))
            self.lower, self.upper, self.log_s = nn.Parameter(lower), nn.Parameter(upper), nn.Parameter(log_s)
            self.register_buffer("permutation", permutation)
            self.register_buffer("sign_s", sign_s)
        else:
            raise ValueError(f"unknown parametrization {parametrization!r}: expected 'plu' or 'full'")

    def forward(self, x, context=None, *, lengths=None):
        check_channels(x, self.channels, "InvertibleConv1x1")
        weight, logdet = self._matrix()
        return channel_mix(x, weight.to(compute_dtype(x))), self._total(logdet, x, lengths)

    def inverse(self, z, context=None, *, lengths=None):
        check_channels(z, self.channels, "InvertibleConv1x1")
        if self.parametrization == "plu":
            inverse = plu_inverse(self.permutation[None], self.lower[None], *self._upper())[0]
            logdet = self.log_s.sum()
        else:
            weight, logdet = self._matrix()
            identity = torch.eye(self.channels, dtype=weight.dtype, device=weight.device)
            inverse = torch.linalg.solve_ex(weight, identity)[0]
        return channel_mix(z, inverse.to(compute_dtype(z))), -self._total(logdet, z, lengths)

    def _upper(self) -> tuple[Tensor, Tensor]:
        return self.upper[None], signed_diagonal(self.log_s[None], self.sign_s[None], "InvertibleConv1x1")

    def _matrix(self) -> tuple[Tensor, Tensor]:
        if self.parametrization == "plu":
            return plu_matrix(self.permutation[None], self.lower[None], *self._upper())[0], self.log_s.sum()
        weight = self.weight.to(exact_dtype(self.weight))
        logdet = torch.linalg.slogdet(weight).logabsdet
        if reads_values(weight) and not torch.isfinite(logdet):
            raise ValueError("the matrix of this InvertibleConv1x1 is singular: it has no inverse")
        return weight, logdet

    def _total(self, logdet: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
        return (logdet.to(compute_dtype(x)) * positions(x, lengths)).expand(x.shape[0])

    def extra_repr(self) -> str:
        return f"{self.channels}, parametrization={self.parametrization!r}"


# --- batched matrix work, shared with GlowSteps -----------------------------------------------------------------------


def exact_dtype(w: Tensor) -> torch.dtype:
    """float64 where the device has it: no TF32, and an inverse that matches its matrix to float32's last digit."""
    return torch.float32 if w.device.type == "mps" else torch.float64


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Data maths keeps its precision; meta tensors, which only carry shapes, have no autocast to turn off."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def random_rotations(count: int, channels: int) -> Tensor:
    return torch.linalg.qr(torch.randn(count, channels, channels))[0]


def plu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(permutation, lower, upper, log_s, sign_s)`` of ``weight [K, C, C]``, batched; the triangles strict."""
    permutation, lower, upper = torch.linalg.lu(weight)
    s = upper.diagonal(dim1=-2, dim2=-1)
    return permutation, lower.tril(-1), upper.triu(1), s.abs().log(), s.sign()


def signed_diagonal(log_s: Tensor, sign_s: Tensor, layer: str) -> Tensor:
    """The diagonal of U, ``[K, C]``; a zero or overflowing entry is told on the CPU."""
    log_s = log_s.to(exact_dtype(log_s))
    if reads_values(log_s) and log_s.numel() and not bool(log_s.detach().abs().max() < 80):
        raise ValueError(f"a matrix of this {layer} is singular: log_s reached {log_s.detach().abs().max():.3g}")
    return sign_s * torch.exp(log_s)


def plu_matrix(permutation: Tensor, lower: Tensor, upper: Tensor, diagonal: Tensor) -> Tensor:
    """``P (L + I) (U + diag)``, ``[K, C, C]``, in :func:`exact_dtype`, all K in a handful of launches."""
    dtype = diagonal.dtype
    with no_autocast(lower.device.type):
        upper = torch.diag_embed(diagonal) + upper.triu(1)
        return torch.bmm(permutation.to(dtype), torch.baddbmm(upper, lower.tril(-1).to(dtype), upper))


def plu_inverse(permutation: Tensor, lower: Tensor, upper: Tensor, diagonal: Tensor) -> Tensor:
    """The inverse of :func:`plu_matrix` by two batched triangular solves."""
    dtype = diagonal.dtype
    with no_autocast(lower.device.type):
        upper = torch.diag_embed(diagonal) + upper.triu(1)
        half = torch.linalg.solve_triangular(
            lower.tril(-1).to(dtype), permutation.to(dtype).mT, upper=False, unitriangular=True
        )
        return torch.linalg.solve_triangular(upper, half, upper=True)
