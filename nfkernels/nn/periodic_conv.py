"""Convolutions that wrap around: the Fourier transform takes them apart into one small system per frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reference.lu_compose import exact_dtype
from .spectral import SpectralConv, kernel_sides, rounding


class _PeriodicConv(SpectralConv):
    def __init__(self, channels: int, kernel_size: int | Sequence[int], dims: int, depthwise: bool, bias: bool) -> None:
        super().__init__(channels, dims, bias)
        self.kernel_size = sides = kernel_sides(kernel_size, dims, type(self).__name__)
        self.depthwise = depthwise
        weight = torch.randn(channels, 1 if depthwise else channels, *sides)
        weight *= 0.05 / math.sqrt(weight[0].numel())
        rows = torch.arange(channels)
        weight[(rows, 0 if depthwise else rows, *((k - 1) // 2 for k in sides))] += 1
        self.weight = nn.Parameter(weight)

    # --- the kernel, frequency by frequency ---

    def _spectrum(self, sizes: tuple[int, ...]) -> Tensor:
        """``K(f)`` of the half spectrum: complex ``[*half, C, C]``, depthwise ``[C, *half]``.

        A sum over taps, each with its phase modulo the size: a kernel wider than the image wraps by itself.
        """
        dtype = exact_dtype(self.weight)
        spectrum = self.weight.to(_complex(dtype)).movedim((0, 1), (-2, -1))
        for axis in reversed(range(self.dims)):  # each round takes the last kernel axis and puts frequencies in front
            n, k = sizes[axis], self.kernel_size[axis]
            count = n // 2 + 1 if axis == self.dims - 1 else n
            taps = torch.arange(k, device=spectrum.device) - (k - 1) // 2
            turns = torch.arange(count, device=spectrum.device)[:, None] * taps % n
            angle = turns.to(dtype) * (2 * math.pi / n)
            phase = torch.complex(angle.cos(), angle.sin())
            spectrum = torch.tensordot(phase, spectrum, dims=([1], [self.dims - 1]))
        return spectrum.squeeze(-1).movedim(-1, 0) if self.depthwise else spectrum

    def _log_det(self, spectrum: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if self.depthwise:
            square = _square(spectrum)
            gone = self._vanishes(square)
            self._refuse_singular(gone.any(0), sizes)
            each = 0.5 * torch.where(gone, 0.0, square).log().sum(0)
        else:
            _, each, factors, _ = torch._linalg_slogdet(spectrum)  # torch.linalg.slogdet, with the LU it is made by
            gone = self._vanishes(_square(factors.detach().diagonal(dim1=-2, dim2=-1))).any(-1)
            self._refuse_singular(gone, sizes)
            each = torch.where(gone, -math.inf, each)
        # The last axis is halved: its columns stand for their conjugates too, but 0 and n / 2 are their own.
        n = sizes[-1]
        times = torch.full((n // 2 + 1,), 2.0, dtype=each.dtype, device=each.device)
        times[0] = 1.0
        if n % 2 == 0:
            times[-1] = 1.0
        return (each * times).sum()

    def _prepare_inverse(self, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        spectrum = self._spectrum(sizes)
        logdet = self._log_det(spectrum, sizes)
        if self.depthwise:
            square = _square(spectrum)
            inverse = spectrum.conj() / torch.where(self._vanishes(square), math.nan, square)
        else:
            inverse = torch.where(torch.isneginf(logdet), math.nan, torch.linalg.inv_ex(spectrum)[0])
        return inverse.to(_complex(dtype)), logdet.to(dtype)

    def _singular_values(self, spectrum: Tensor) -> Tensor:
        return spectrum.abs() if self.depthwise else torch.linalg.svdvals(spectrum)

    def _vanishes(self, square: Tensor) -> Tensor:
        """Where ``|K(f)|^2``, or a pivot's, is no more than rounding leaves of zero (NaN too)."""
        taps = self.weight.detach().to(square.dtype).abs().flatten(1).sum(1)
        taps = taps.reshape(-1, *[1] * self.dims) if self.depthwise else taps.max()
        return ~(square > (rounding(square.dtype) * taps).square())

    # --- the data ---

    def _filter(self, x: Tensor, spectrum: Tensor) -> Tensor:
        sizes, axes = x.shape[2:], tuple(range(2, x.dim()))
        dtype = _complex(x.dtype)
        data = torch.fft.rfftn(x, dim=axes)
        if self.depthwise:
            return torch.fft.irfftn(data * spectrum.to(dtype), s=sizes, dim=axes)
        # Not in complex64 on CUDA, whose library may round its factors to TF32.
        product = torch.complex128 if x.is_cuda else dtype
        matrices = spectrum.to(product).flatten(0, self.dims - 1)
        # [B, C, f] -> [f, B, C] and back as transpositions of plain matrices, which have a fast path.
        half = data.shape
        rows = data.reshape(-1, len(matrices)).t().contiguous().reshape(len(matrices), -1, self.channels)
        rows = (rows.to(product) @ matrices.mT).to(dtype)
        data = rows.reshape(len(matrices), -1).t().contiguous().reshape(half)
        return torch.fft.irfftn(data, s=sizes, dim=axes)

    def extra_repr(self) -> str:
        sides = self.kernel_size if self.dims > 1 else self.kernel_size[0]
        return f"{self.channels}, kernel_size={sides}, depthwise={self.depthwise}, bias={self.bias is not None}"


class PeriodicConv1d(_PeriodicConv):
    """``y_t = sum_j weight[..., j] x_(t + j - (k - 1) // 2) + bias``, t modulo T, on ``x [B, C, T]``.

    The circular convolution of ``nn.Conv1d(C, C, k, padding="same", padding_mode="circular")``, for every T and k,
    wider than T too. ``depthwise``: each channel by itself. Starts near the identity. See :class:`PeriodicConv2d` for
    cost and errors.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, depthwise: bool = False, bias: bool = True) -> None:
        super().__init__(channels, kernel_size, 1, depthwise, bias)


class PeriodicConv2d(_PeriodicConv):
    """The circular convolution of ``x [B, C, H, W]`` with a ``[C, C, kh, kw]`` kernel; logdet ``sum_f log|det K(f)|``.

    As ``nn.Conv2d(C, C, k, padding="same", padding_mode="circular")`` computes it, for every size and odd or even
    kernel, wider than the image too (it wraps around again). Starts near the identity.

    Args:
        channels: C.
        kernel_size: a number or ``(kh, kw)``.
        depthwise: each channel by itself, ``[C, 1, kh, kw]``.

    Raises ``ValueError`` on the CPU if the kernel has no inverse at some frequency (on CUDA the log-determinant is
    -inf and the inverse NaN: no forward waits for it), and for ``lengths``.

    Cost, with d = C H W and kernels of k by k: the Fourier transforms take O(d log d) per sample and the products
    O(C d), depthwise O(d), in the inverse as in the forward. Once per batch the kernel's spectrum takes O(k C d) and
    its log-determinants and inverses, one C x C system for each of the H (W // 2 + 1) frequencies that a real kernel
    determines, O(C^2 d); depthwise O(k d) and O(d). The spectrum is made and solved in float64; float32 data are
    transformed in float32, in float64 where a side has a prime factor above 13. Reference: Hoogeboom et al. 2019
    (Emerging convolutions), section 3.2.
    """

    def __init__(
        self, channels: int, kernel_size: int | Sequence[int] = 3, *, depthwise: bool = False, bias: bool = True
    ) -> None:
        super().__init__(channels, kernel_size, 2, depthwise, bias)


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64  # dtype.to_complex() cannot be compiled


def _square(v: Tensor) -> Tensor:
    return v.real.square() + v.imag.square()
