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

    def _spectrum(self, sizes):
        """``H(f)``, real ``[C, *sizes]``."""
        spectrum = self.weight.to(exact_dtype(self.weight))
        for n in reversed(sizes):  # each round takes the last axis of taps and puts frequencies in front
            taps = torch.arange(spectrum.shape[-1], device=spectrum.device)
            steps = torch.arange(n, device=spectrum.device)[:, None] * taps % (2 * n)
            cosines = (steps.to(spectrum.dtype) * (math.pi / n)).cos()
            spectrum = torch.tensordot(cosines * torch.where(taps > 0, 2.0, 1.0), spectrum, dims=([1], [-1]))
        return spectrum.movedim(-1, 0)

    def _log_det(self, spectrum, sizes):
        gone = self._vanishes(spectrum)
        self._refuse_singular(gone.any(0), sizes)
        return torch.where(gone, 0.0, spectrum).abs().log().sum()

    def _prepare_inverse(self, sizes, dtype):
        spectrum = self._spectrum(sizes)
        inverse = 1 / torch.where(self._vanishes(spectrum), math.nan, spectrum)
        return inverse.to(dtype), self._log_det(spectrum, sizes).to(dtype)

    def _singular_values(self, spectrum):
        return spectrum.abs()

    def _vanishes(self, spectrum: Tensor) -> Tensor:
        """Where ``|H(f)|`` is no more than rounding leaves of zero (NaN too)."""
        taps = 2**self.dims * self.weight.detach().to(spectrum.dtype).abs().flatten(1).sum(1)
        return ~(spectrum.detach().abs() > rounding(spectrum.dtype) * taps.reshape(-1, *[1] * self.dims))

    def _filter(self, x, spectrum):
        spectrum = spectrum.to(x.dtype)
        if self.dims == 1:
            return idct(dct(x) * spectrum)
        return idct(idct(dct(dct(x).mT) * spectrum.mT).mT)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.channels}, kernel_size={self.kernel_size}, dims={self.dims}, bias={bias}"


# --- the cosine transform ---------------------------------------------------------------------------------------------


def dct(x: Tensor) -> Tensor:
    """``2 sum_t x_t cos(pi f (t + 1/2) / n)`` along the last axis (DCT-II), by one real FFT of n points.

    Reference: Makhoul 1980, "A fast cosine transform in one and two dimensions".
    """
    n = x.shape[-1]
    v = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)) * _turns(n, x)
    return 2 * torch.cat([v.real, -v.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


def idct(x: Tensor) -> Tensor:
    """The inverse of :func:`dct`."""
    n = x.shape[-1]
    x = 0.5 * x
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), x.flip(-1)[..., : n // 2]], -1)
    v = torch.fft.irfft(torch.complex(x[..., : n // 2 + 1], -mirrored) * _turns(n, x).conj(), n=n)
    even, odd = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    if n % 2:  # one more, to be cut off again
        odd = torch.cat([odd, even[..., :1]], -1)
    return torch.stack([even, odd], -1).flatten(-2)[..., :n]


def _turns(n: int, x: Tensor) -> Tensor:
    angle = torch.arange(n // 2 + 1, dtype=x.dtype, device=x.device) * (-math.pi / (2 * n))
    return torch.complex(angle.cos(), angle.sin())
