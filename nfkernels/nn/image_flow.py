"""A flow over images of whole grey levels: dequantisation on the way in, rounding on the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import dequantize
from .bases import Base
from .bijection import Bijection, reads_values
from .flow import Flow, _chunked


class ImageFlow(Flow):
    """A :class:`Flow` over images ``uint8 [B, C, H, W]`` of ``grey_levels`` values, ``0 .. grey_levels - 1``.

    The density is over ``x = (image + u) / grey_levels`` in ``[0, 1)``, u uniform in ``[0, 1)`` (uniform
    dequantisation, Theis et al. 2016). Floating point data is taken as such x, uint8 as images:

    - :meth:`bits_per_dim` and :meth:`nll` take uint8 images; :meth:`log_prob` takes x, in nats;
    - :meth:`forward` and :meth:`encode` take either (encode dequantises with u = 1/2, forward with random u);
    - :meth:`sample` and :meth:`decode` return uint8; :meth:`rsample` and the ``_and_log_prob`` pair return x.
    """

    def __init__(
        self,
        bijection: Bijection,
        base: Base,
        shape: Sequence[int],
        *,
        grey_levels: int = 256,
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__(bijection, base, embed=embed)
        if len(shape) != 3 or any(n < 1 for n in shape):
            raise ValueError(f"an image's shape is (channels, height, width), got {tuple(shape)}")
        if not 2 <= grey_levels <= 256:
            raise ValueError(f"grey_levels must be from 2 to 256 (images are uint8), got {grey_levels}")
        self.event_shape = torch.Size(shape)
        self.grey_levels = grey_levels

    def forward(self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None):
        """``(z, logdet)`` of images (dequantised at random) or of x in ``[0, 1)``; logdet is with respect to x."""
        self._check_shape(x)
        if not x.is_floating_point():
            x = self.dequantize(x, generator=generator)
        return super().forward(x, context)

    def dequantize(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """``(image + u) / grey_levels``, u uniform in ``[0, 1)``: uint8 in, float32 in ``[0, 1)`` out.

        :meth:`quantize` gives the images back exactly. The noise is Philox's (:func:`nfkernels.dequantize`), under a
        key drawn from ``generator``, or from torch's own. Raises ``ValueError`` for other types, and for values that
        are no grey levels (on the CPU only).
        """
        self._check_levels(images)
        # Seed and offset both drawn, on the device: nothing waits for it, and one state of the generator is one noise.
        key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=images.device)
        return dequantize(images, key, levels=self.grey_levels)[0]

    def quantize(self, x: Tensor) -> Tensor:
        """The image that x in ``[0, 1)`` lies in; what lies outside goes to the nearest grey level."""
        return (x * self.grey_levels).floor().clamp(0, self.grey_levels - 1).to(torch.uint8)

    def bits_per_dim(
        self,
        images: Tensor,
        context: Tensor | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """An upper bound on ``-log2 P(image) / D``, ``[B]``: the mean over ``draws`` of u of

        ``-log p((image + u) / grey_levels) / (D ln 2) + log2(grey_levels)``.

        Raises ``ValueError`` for anything but uint8 images of the flow's shape with values below ``grey_levels``
        (values are looked at on the CPU only).
        """
        self._check_shape(images)
        if images.dtype != torch.uint8:
            raise ValueError(f"bits_per_dim takes uint8 images, got {images.dtype}: for x in [0, 1) there is log_prob")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        total: Tensor | None = None
        for _ in range(draws):
            x = self.dequantize(images, generator=generator)
            bits = self._bits(_chunked(self._log_prob, batch_size, x, self._matched(context, x)))
            total = bits if total is None else total + bits
        assert total is not None
        return total / draws

    def nll(self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The training loss in bits per dimension, a scalar: uint8 images are dequantised once, x in [0, 1) is not."""
        z, logdet = self(x, context, generator=generator)
        return self._bits(self.base.log_prob(z) + logdet).mean()

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """``log p(x) [B]`` in nats for x in ``[0, 1)``. Raises ``ValueError`` for uint8: see :meth:`bits_per_dim`."""
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise ValueError(f"log_prob takes floating point x in [0, 1), got {x.dtype}: for images use bits_per_dim")
        return super().log_prob(x, context, batch_size=batch_size)

    def encode(self, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """The latent of images (at the middle of their grey levels, so that :meth:`decode` gives them back) or of x."""
        self._check_shape(x)
        if not x.is_floating_point():
            self._check_levels(x)
            x = (x.float() + 0.5) / self.grey_levels
        return super().encode(x, context, batch_size=batch_size)

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """The images of a latent, uint8. For x itself, with gradients: ``decode_continuous``."""
        return self.quantize(self.decode_continuous(z, context, batch_size=batch_size))

    def decode_continuous(self, z: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """The x of a latent, with gradients: near ``[0, 1)``, not rounded and not clipped."""
        return super().decode(z, context, batch_size=batch_size)

    @torch.no_grad()
    def sample(self, n=1, context=None, *, temperature=1.0, generator=None, batch_size=None):
        """Images ``uint8 [n, C, H, W]`` (``[n, B, C, H, W]`` for a context ``[B, ...]``); see :meth:`Flow.sample`."""
        return self.quantize(
            self.rsample(n, context, temperature=temperature, generator=generator, batch_size=batch_size)
        )

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Sets what starts from data (ActNorm) from this batch of images or x, now."""
        self._check_shape(x)
        super().initialize(x if x.is_floating_point() else self.dequantize(x), context)

    def _bits(self, log_prob: Tensor) -> Tensor:
        return log_prob / (-math.log(2) * self.event_shape.numel()) + math.log2(self.grey_levels)

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[1:] != self.event_shape:
            wanted = ", ".join(map(str, self.event_shape))
            raise ValueError(f"this flow takes images [B, {wanted}], got a tensor of shape {tuple(x.shape)}")

    def _check_levels(self, images: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if self.grey_levels < 256 and reads_values(images) and images.numel():
            found = int(images.max())
            if found >= self.grey_levels:
                raise ValueError(f"an image has the value {found}, but this flow has {self.grey_levels} grey levels")

    def _check_data(self, x: Tensor) -> None:
        self._check_shape(x)
        super()._check_data(x)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, grey_levels={self.grey_levels}"
