"""What the layers share that a transform takes apart into independent systems, one per frequency."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype
from .bijection import check_channels, check_width, per_channel, reads_values
from .cache import cached
from .linear_bijection import ConstantJacobian


class SpectralConv(ConstantJacobian):
    """``y = T^-1(K T(x)) + bias`` on ``x [B, C, *sizes]`` with ``dims`` spatial axes.

    A subclass has ``weight``, and says what T is (:meth:`_filter`), and what K is at each frequency of an image of
    these sizes: its :meth:`_spectrum`, in float64, from which log-determinant, inverse and condition number are made.
    """

    weight: Tensor

    def __init__(self, channels: int, dims: int, bias: bool) -> None:
        super().__init__()
        check_width(channels, type(self).__name__)
        self.channels, self.dims = channels, dims
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sizes, dtype = self._sizes(x, lengths), compute_dtype(x)
        spectrum = self._spectrum(sizes)
        logdet = self._log_det(spectrum, sizes)
        y = self._filtered(x.to(dtype), spectrum)
        if self.bias is not None:
            y = y + per_channel(self.bias, x)
        return y.to(x.dtype), logdet.to(dtype).expand(x.shape[0])

    def log_abs_det(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        sizes = self._sizes(x, lengths)
        return self._log_det(self._spectrum(sizes), sizes).to(compute_dtype(x)).expand(x.shape[0])

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sizes, dtype = self._sizes(z, lengths), compute_dtype(z)
        inverse, logdet = cached(
            self, "inverse", (sizes, dtype), (self.weight,), lambda: self._prepare_inverse(sizes, dtype)
        )
        x = z.to(dtype) if self.bias is None else z.to(dtype) - per_channel(self.bias, z)
        return self._filtered(x, inverse).to(z.dtype), -logdet.expand(z.shape[0])

    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        """Of the map on data of ``shape`` (its last axes are the image's): about 1e16 and more if it has no inverse."""
        if shape is None or len(shape) < self.dims:
            raise ValueError(
                f"the condition number of a {type(self).__name__} depends on its data's size: give a shape"
            )
        with torch.no_grad():
            spectrum = self._spectrum(tuple(shape)[-self.dims :])
            if not bool(torch.isfinite(spectrum).all()):
                return math.nan
            singular = self._singular_values(spectrum)
            return (singular.max() / singular.min()).item() if bool(singular.min() > 0) else math.inf

    def _filtered(self, x: Tensor, spectrum: Tensor) -> Tensor:
        if x.numel() == 0:  # MKL transforms no empty batch
            return x
        # Other sizes go by Bluestein's algorithm, which loses a digit of float32.
        exact = x.dtype if all(map(_is_smooth, x.shape[2:])) else exact_dtype(x)
        return self._filter(x.to(exact), spectrum).to(x.dtype)

    # --- what a subclass has ---

    def _spectrum(self, sizes: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _log_det(self, spectrum: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """``sum_f log|det K(f)|``, a scalar in float64."""
        raise NotImplementedError

    def _prepare_inverse(self, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inverse's spectrum and the forward's log-determinant, for data of type ``dtype``: no data is needed."""
        raise NotImplementedError

    def _singular_values(self, spectrum: Tensor) -> Tensor:
        raise NotImplementedError

    def _filter(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """x with every frequency multiplied by its part of ``spectrum``."""
        raise NotImplementedError

    # --- words ---

    def _sizes(self, x: Tensor, lengths: Tensor | None) -> tuple[int, ...]:
        name = type(self).__name__
        check_channels(x, self.channels, name, own=self.weight)
        if x.dim() != self.dims + 2 or 0 in x.shape[2:]:
            form = "[B, C, T]" if self.dims == 1 else "[B, C, H, W]"
            raise ValueError(f"{name} takes {form}, got a tensor of shape {tuple(x.shape)}")
        if lengths is not None:
            raise ValueError(f"{name} reaches across the end of its axis: it takes no lengths")
        return tuple(x.shape[2:])

    def _refuse_singular(self, gone: Tensor, sizes: tuple[int, ...]) -> None:
        """On the CPU, ``ValueError`` naming the first frequency of ``gone``, bool over them."""
        if reads_values(gone) and bool(gone.any()):
            where = gone.nonzero()[0].tolist()
            place = f"({', '.join(map(str, where))})" if len(where) > 1 else str(where[0])
            size = " x ".join(map(str, sizes))
            raise ValueError(f"the kernel of this {type(self).__name__} has no inverse at frequency {place} of {size}")


def _is_smooth(n: int) -> bool:
    """Whether n has small prime factors only, which the FFT takes one by one."""
    for prime in (2, 3, 5, 7, 11, 13):
        while n % prime == 0:
            n //= prime
    return n == 1


def rounding(dtype: torch.dtype) -> float:
    """A frequency is taken as lost where no more of it is left than this, relative to all the taps together."""
    return 8 * torch.finfo(dtype).eps


def kernel_sides(kernel_size: int | Sequence[int], dims: int, layer: str) -> tuple[int, ...]:
    sides = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size,) * dims
    if not all(isinstance(side, Integral) for side in sides):
        raise ValueError(f"{layer} needs a whole number for a kernel size, got {kernel_size!r}")
    if len(sides) != dims or min(sides) < 1:
        raise ValueError(f"{layer} needs a kernel size of at least 1 for each of {dims} axes, got {kernel_size}")
    return sides
