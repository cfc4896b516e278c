"""The emerging convolution: two autoregressive convolutions of opposite orders, together a full receptive field."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from ..ops import autoregressive_conv
from ..ops.autoregressive_conv import MaskName, OrderName
from ..reference.affine_coupling import compute_dtype
from ..reference.lu_compose import exact_dtype
from .bijection import check_channels, check_width, positions, refuse_lengths
from .linear_bijection import ConstantJacobian, checked_log_scale

ORDERS: tuple[OrderName, OrderName] = ("forward", "reverse")


class EmergingConv2d(ConstantJacobian):
    """An invertible k x k convolution on ``x [B, C, H, W]``: one that looks back, then one that looks ahead.

    Args:
        channels: C.
        kernel_size: k, odd.
        mask: the taps of each of the two, see :func:`nfkernels.autoregressive_conv`: ``"square"`` ones compose to the
            k x k square, ``"raster"`` ones to more.
        bias: whether a bias ``[C]`` is added at the end.

    The centre taps are triangular across channels, lower then upper, with the diagonals ``exp(log_s)``; logdet
    ``H W sum(log_s)``. Starts near the identity. The data stays in float32 (float64 for float64 x), autocast or not.

    Raises ``ValueError`` for other shapes, for lengths (an image has no sequence axis), and on the CPU if a diagonal is
    zero or infinite (on CUDA the result is not finite: no forward waits for it).

    Cost: O(k^2 C D) for D = C H W elements, forward and inverse; the inverse takes ``2 (H + W - 1)`` dependent steps
    (square) or ``2 (W + (k//2 + 1) (H - 1))`` (raster). Reference: Hoogeboom, van den Berg & Welling 2019 (Emerging
    Convolutions for Generative Normalizing Flows), sections 3.1-3.2.
    """

    channels: int
    kernel_size: int
    mask: MaskName
    weight: nn.Parameter
    log_s: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, channels: int, kernel_size: int = 3, *, mask: MaskName = "square", bias: bool = True) -> None:
        super().__init__()
        check_width(channels, "EmergingConv2d")
        if not isinstance(kernel_size, Integral) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number, got {kernel_size!r}")
        if mask not in ("square", "raster"):
            raise ValueError(f"unknown mask {mask!r}: expected one of square, raster")
        self.channels, self.kernel_size, self.mask = channels, kernel_size, mask
        shape = (2, channels, channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape) * (0.1 / (kernel_size * channels**0.5)))
        self.log_s = nn.Parameter(torch.zeros(2, channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(x, lengths)
        first, second = self._weights(x)
        y = autoregressive_conv(x, first, order=ORDERS[0], mask=self.mask)
        return autoregressive_conv(y, second, self.bias, order=ORDERS[1], mask=self.mask), self._total(self.log_s, x)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(z, lengths)
        first, second = self._weights(z)
        y = autoregressive_conv(z, second, self.bias, order=ORDERS[1], mask=self.mask, inverse=True)
        return autoregressive_conv(y, first, order=ORDERS[0], mask=self.mask, inverse=True), -self._total(self.log_s, z)

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        refuse_lengths(lengths, "EmergingConv2d")
        check_channels(x, self.channels, "EmergingConv2d", own=self.weight)
        if x.dim() != 4:
            raise ValueError(f"EmergingConv2d takes images [B, C, H, W], got a tensor of shape {tuple(x.shape)}")

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both kernels, the diagonals in the place of the centres'."""
        dtype, half = compute_dtype(x), self.kernel_size // 2
        log_s = checked_log_scale(self.log_s, "EmergingConv2d").to(dtype)
        centre = torch.zeros(self.kernel_size**2, dtype=torch.bool, device=log_s.device)
        centre[half * (self.kernel_size + 1)] = True
        diagonal = torch.eye(self.channels, dtype=torch.bool, device=log_s.device)[..., None] & centre
        weight = self.weight.to(dtype).flatten(3)
        weight = torch.where(diagonal, torch.exp(log_s)[:, :, None, None], weight).reshape(self.weight.shape)
        return weight[0], weight[1]

    def log_abs_det(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        self._check(x, lengths)
        return self._total(checked_log_scale(self.log_s, "EmergingConv2d"), x)

    def _total(self, log_s: Tensor, x: Tensor) -> Tensor:
        total = log_s.sum(dtype=exact_dtype(log_s)) * positions(x, None)
        return total.to(compute_dtype(x)).expand(x.shape[0])

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, mask={self.mask!r}, bias={self.bias is not None}"
