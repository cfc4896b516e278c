"""Symmetric convolution with mirrored borders: the cosine transform makes it one number per frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reference.lu_compose import exact_dtype
from .spectral import SpectralConv, kernel_sides, rounding


class SymmetricConv(SpectralConv):
    """A depthwise convolution with a symmetric kernel, the data mirrored at its borders; logdet ``sum_f log|H(f)|``.

    ``y_t = w_0 x_t + sum_j w_j (x_(t-j) + x_(t+j)) + bias`` on ``x [B, C, T]``, and the same along both axes of
    ``x [B, C, H, W]``. Beyond its border x goes on as its mirror image, ``x_(-1) = x_0`` (numpy.pad's "symmetric"),
    mirrored again at the next border for kernels wider than the image. Starts near the identity.

    Args:
        channels: C.
        kernel_size: an odd number, or one per axis. ``weight [C, (k + 1) / 2, ...]`` holds the centre and one side of
            it: in 2-D the quadrant.
        dims: 1 or 2.

    The vectors ``cos(pi f (t + 1/2) / T)`` of the DCT-II are its eigenvectors, ``H(f) = w_0 + 2 sum_j w_j
    cos(pi j f / T)`` its eigenvalues. Raises ``ValueError`` on the CPU if one is zero (on CUDA the log-determinant is
    -inf and the inverse NaN), for even kernels and for ``lengths``.

    Cost, with d numbers per sample and k taps along an axis: O(d log d) per sample for the transforms, as real FFTs of
    the same length, in the inverse as in the forward; once per batch O(k d) for H and O(d) for log-determinant and
    inverse, in float64. Data are transformed in their own type, in float64 where a side has a prime factor above 13.
    Reference: Karami et al. 2019 (Invertible Convolutional Flow); Makhoul 1980 for the transform.
    """

    def __init__(
        self, channels: int, kernel_size: int | Sequence[int] = 3, *, dims: int = 2, bias: bool = True
    ) -> None:
        if dims not in (1, 2):
            raise ValueError(f"SymmetricConv has 1 or 2 dims, got {dims}")
        super().__init__(channels, dims, bias)
        self.kernel_size = kernel_sides(kernel_size, dims, "SymmetricConv")
        if not all(k % 2 for k in self.kernel_size):
            raise ValueError(f"SymmetricConv needs a kernel with a centre, of odd size, got {kernel_size}")
        weight = torch.randn(channels, *((k + 1) // 2 for k in self.kernel_size))
        weight *= 0.05 / math.sqrt(math.prod(self.kernel_size))
        weight.flatten(1)[:, 0] += 1
        self.weight = nn.Parameter(weight)

    def _spectrum(self, sizes: tuple[int, ...]) -> Tensor:
        """``H(f)``, real ``[C, *sizes]``."""
        spectrum = self.weight.to(exact_dtype(self.weight))
        for n in reversed(sizes):  # each round takes the last axis of taps and puts frequencies in front
            taps = torch.arange(spectrum.shape[-1], device=spectrum.device)
            steps = torch.arange(n, device=spectrum.device)[:, None] * taps % (2 * n)
            cosines = (steps.to(spectrum.dtype) * (math.pi / n)).cos()
            spectrum = torch.tensordot(cosines * torch.where(taps > 0, 2.0, 1.0), spectrum, dims=([1], [-1]))
        return spectrum.movedim(-1, 0)

    def _log_det(self, spectrum: Tensor, sizes: tuple[int, ...]) -> Tensor:
        gone = self._vanishes(spectrum)
        self._refuse_singular(gone.any(0), sizes)
        return torch.where(gone, 0.0, spectrum).abs().log().sum()

    def _prepare_inverse(self, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        spectrum = self._spectrum(sizes)
        inverse = 1 / torch.where(self._vanishes(spectrum), math.nan, spectrum)
        return inverse.to(dtype), self._log_det(spectrum, sizes).to(dtype)

    def _singular_values(self, spectrum: Tensor) -> Tensor:
        return spectrum.abs()

    def _vanishes(self, spectrum: Tensor) -> Tensor:
        """Where ``|H(f)|`` is no more than rounding leaves of zero (NaN too)."""
        taps = 2**self.dims * self.weight.detach().to(spectrum.dtype).abs().flatten(1).sum(1)
        return ~(spectrum.detach().abs() > rounding(spectrum.dtype) * taps.reshape(-1, *[1] * self.dims))

    def _filter(self, x: Tensor, spectrum: Tensor) -> Tensor:
        numbers = torch.view_as_real(dct(x, self.dims)) * _as_dct(spectrum.to(x.dtype))
        return idct(torch.view_as_complex(numbers), x.shape[-self.dims :])

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.channels}, kernel_size={self.kernel_size}, dims={self.dims}, bias={bias}"


# --- the cosine transform ---------------------------------------------------------------------------------------------
#
# Of a real signal of n numbers, as n // 2 + 1 complex ones: C_f - i C_(n - f), C the transform and C_n = 0. A real FFT
# gives that form, another axis keeps it, and no pass over the data is spent on taking it apart.


def dct(x: Tensor, dims: int) -> Tensor:
    """``C_f = sum_t x_t cos(pi f (t + 1/2) / n)`` (half of the DCT-II) along the last axis, or both of the last two.

    As ``C_f - i C_(n - f)`` of the last axis, complex. Reference: Makhoul 1980, "A fast cosine transform in one and
    two dimensions".
    """
    n = x.shape[-1]
    if dims == 1:
        return torch.fft.rfft(_fold(x, -1)) * _turns(n, n // 2 + 1, x)
    rows = x.shape[-2]
    v = torch.fft.rfft2(_fold(_fold(x, -2), -1))
    down, right = 0.5 * _turns(rows, rows, x)[:, None], _turns(n, n // 2 + 1, x)
    return v * (down * right) + _reversed(v) * (down.conj() * right)


def idct(c: Tensor, sizes: Sequence[int]) -> Tensor:
    """The inverse of :func:`dct`, real and of ``sizes``."""
    n = sizes[-1]
    right = _turns(n, n // 2 + 1, c.real).conj()
    if len(sizes) == 1:
        return _unfold(torch.fft.irfft(c * right, n=n), -1)
    back = _turns(sizes[0], sizes[0], c.real).conj()[:, None] * right
    # C_n of the rows is zero, where _reversed has C_0.
    mirrored = 1j * torch.where(torch.arange(sizes[0], device=c.device)[:, None] > 0, back, 0.0)
    v = torch.fft.irfft2(c * back - _reversed(c) * mirrored, s=tuple(sizes))
    return _unfold(_unfold(v, -1), -2)


def _as_dct(v: Tensor) -> Tensor:
    """Numbers for all frequencies of the last axis, as real and imaginary part of what :func:`dct` has there."""
    n = v.shape[-1]
    mirrored = torch.cat([v[..., :1], v.flip(-1)[..., : n // 2]], -1)
    return torch.stack([v[..., : n // 2 + 1], mirrored], -1)


def _reversed(v: Tensor) -> Tensor:
    """``v_(-f)``, f modulo n, along the axis before the last."""
    return torch.cat([v[..., :1, :], v[..., 1:, :].flip(-2)], -2)


def _fold(x: Tensor, axis: int) -> Tensor:
    """The even positions, then the odd ones from the end: a cosine transform's input as a Fourier transform's."""
    if axis == -1:
        return torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    return torch.cat([x[..., ::2, :], x[..., 1::2, :].flip(-2)], -2)


def _unfold(v: Tensor, axis: int) -> Tensor:
    n, axis = v.shape[axis], axis + v.dim()
    even, odd = v.narrow(axis, 0, (n + 1) // 2), v.narrow(axis, (n + 1) // 2, n // 2).flip(axis)
    if n % 2:  # one more, to be cut off again
        odd = torch.cat([odd, even.narrow(axis, 0, 1)], axis)
    return torch.stack([even, odd], axis + 1).flatten(axis, axis + 1).narrow(axis, 0, n)


def _turns(n: int, count: int, x: Tensor) -> Tensor:
    """``exp(-i pi f / 2n)`` for ``count`` frequencies."""
    angle = torch.arange(count, dtype=exact_dtype(x), device=x.device) * (-math.pi / (2 * n))
    return torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
