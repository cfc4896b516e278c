"""A flow over images of whole grey levels: dequantisation on the way in, rounding on the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import dequantize, philox_uniform
from ..reference.affine_coupling import compute_dtype
from ..reference.dequantize import _LARGEST, _unit
from .bases import Base
from .batches import chunked
from .bijection import Bijection, reads_values, zero_logdet
from .flow import Flow


class ImageFlow(Flow):
    """A :class:`Flow` over images ``uint8 [B, C, H, W]`` of ``grey_levels`` values, ``0 .. grey_levels - 1``.

    The density is over ``x = (image + u) / grey_levels`` in ``[0, 1)``, u uniform in ``[0, 1)`` (uniform
    dequantisation, Theis et al. 2016) or drawn from a learned ``q(u | image)`` (variational, Ho et al. 2019). Floating
    point data is taken as such x, uint8 as images:

    - :meth:`bits_per_dim` and :meth:`nll` take uint8 images; :meth:`log_prob` takes x, in nats;
    - :meth:`forward` and :meth:`encode` take either (encode dequantises with u = 1/2, forward with random u);
    - :meth:`sample` and :meth:`decode` return uint8; :meth:`rsample` and the ``_and_log_prob`` pair return x.

    Args:
        bijection, base, embed: see :class:`Flow`.
        shape: ``(channels, height, width)``.
        grey_levels: 2 to 256.
        dequantizer: None for uniform dequantisation. Else a bijection of the unit cube, such as
            :class:`VariationalDequantization`, that makes u ``[B, C, H, W]`` of uniform noise in ``[0, 1)``, with
            ``log q(u | image) = -logdet``; its context is the image, in the same floating point type, with the grey
            levels' middles between -1 and 1. It is trained together with the flow, by the same loss.

    Raises ``ValueError`` for a shape or grey levels no image has, ``TypeError`` for a dequantizer that is no Bijection.
    """

    def __init__(
        self,
        bijection: Bijection,
        base: Base,
        shape: Sequence[int],
        *,
        grey_levels: int = 256,
        embed: nn.Module | None = None,
        dequantizer: Bijection | None = None,
    ) -> None:
        super().__init__(bijection, base, embed=embed)
        if len(shape) != 3 or any(n < 1 for n in shape):
            raise ValueError(f"an image's shape is (channels, height, width), got {tuple(shape)}")
        if not 2 <= grey_levels <= 256:
            raise ValueError(f"grey_levels must be from 2 to 256 (images are uint8), got {grey_levels}")
        if not isinstance(dequantizer, Bijection | None):
            raise TypeError(f"dequantizer must be a Bijection or None, got {type(dequantizer).__name__}")
        self.event_shape = torch.Size(shape)
        self.grey_levels = grey_levels
        self.dequantizer = dequantizer

    # Images have no lengths: what overrides a method of Flow below takes none.

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(z, logdet)`` of images (dequantised at random) or of x in ``[0, 1)``; logdet is with respect to x.

        From the logdet of images ``log q(u | image)`` is taken off (0 where u is uniform): with it
        ``base.log_prob(z) + logdet - D log(grey_levels)`` is the bound on ``log P(image)`` at this u. ``noise``: of
        :meth:`noise`, where it is not to be drawn here.
        """
        self._check_shape(x)
        if x.is_floating_point():
            return super().forward(x, context)
        x, log_q = self._dequantized(x, self.noise(x, generator=generator) if noise is None else noise)
        z, logdet = super().forward(x, context)
        return z, logdet if log_q is None else logdet - log_q

    def dequantize(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """``(image + u) / grey_levels``: uint8 in, float32 in ``[0, 1)`` out (float64 from a float64 dequantizer).

        u is uniform in ``[0, 1)``, or the dequantizer's. :meth:`quantize` gives the images back exactly. The noise is
        Philox's (:func:`nfkernels.dequantize`), under a key drawn from ``generator``, or from torch's own. Raises
        ``ValueError`` for other types, and for values that are no grey levels (on the CPU only).
        """
        return self._dequantized(images, self.noise(images, generator=generator))[0]

    def dequantize_and_log_prob(
        self, images: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`dequantize`, with ``log q(u | image) [B]`` in nats, the density of u (0 where it is uniform)."""
        x, log_q = self._dequantized(images, self.noise(images, generator=generator))
        return x, zero_logdet(x) if log_q is None else log_q

    def quantize(self, x: Tensor) -> Tensor:
        """The image that x in ``[0, 1)`` lies in; what lies outside goes to the nearest grey level."""
        return (x * self.grey_levels).floor().clamp(0, self.grey_levels - 1).to(torch.uint8)

    def bits_per_dim(
        self,
        images: Tensor,
        context: Tensor | None = None,
        *,
        draws: int = 1,
        importance_samples: int = 1,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """An upper bound on ``-log2 P(image) / D``, ``[B]``: the mean over ``draws`` of

        ``-log(mean_k p((image + u_k) / grey_levels) / q(u_k | image)) / (D ln 2) + log2(grey_levels)``,

        the inner mean over ``importance_samples`` draws of u. One sample gives the usual bound; with more its
        expectation falls (never rises) towards the truth (Burda et al. 2016, theorem 1). ``draws`` only takes noise
        from the number. ``batch_size`` bounds the images that go through the networks at once; one beyond the number of
        images takes several of an image's samples together.

        Raises ``ValueError`` for anything but uint8 images of the flow's shape with values below ``grey_levels``
        (values are looked at on the CPU only).
        """
        self._check_shape(images)
        if images.dtype != torch.uint8:
            raise ValueError(f"bits_per_dim takes uint8 images, got {images.dtype}: for x in [0, 1) there is log_prob")
        for name, count in (("draws", draws), ("importance_samples", importance_samples)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        context = self._matched(context, images)
        together = 1 if batch_size is None else max(1, batch_size // max(1, len(images)))
        total: Tensor | None = None
        for _ in range(draws):
            summed: Tensor | None = None
            for start in range(0, importance_samples, together):
                count = min(together, importance_samples - start)
                weight = self._log_weights(images, context, count, generator, batch_size).logsumexp(0)
                summed = weight if summed is None else torch.logaddexp(summed, weight)
            assert summed is not None
            bits = self._bits(summed - math.log(importance_samples))
            total = bits if total is None else total + bits
        assert total is not None
        return total / draws

    def nll(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The training loss in bits per dimension, a scalar: uint8 images are dequantised once, x in [0, 1) is not.

        Of images it is the bound of :meth:`bits_per_dim`, and trains the dequantizer too. ``noise``: of :meth:`noise`.
        """
        z, logdet = self(x, context, generator=generator, noise=noise)
        return self._bits(self.base.log_prob(z) + logdet).mean()

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:  # type: ignore[override]
        """``log p(x) [B]`` in nats for x in ``[0, 1)``. Raises ``ValueError`` for uint8: see :meth:`bits_per_dim`."""
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise ValueError(f"log_prob takes floating point x in [0, 1), got {x.dtype}: for images use bits_per_dim")
        return super().log_prob(x, context, batch_size=batch_size)

    def encode(self, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:  # type: ignore[override]
        """The latent of images (at the middle of their grey levels, so that :meth:`decode` gives them back) or of x."""
        self._check_shape(x)
        if not x.is_floating_point():
            self._check_levels(x)
            x = (x.float() + 0.5) / self.grey_levels
        return super().encode(x, context, batch_size=batch_size)

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:  # type: ignore[override]
        """The images of a latent, uint8. For x itself, with gradients: ``decode_continuous``."""
        return self.quantize(self.decode_continuous(z, context, batch_size=batch_size))

    def decode_continuous(self, z: Tensor, context: Tensor | None = None, *, batch_size: int | None = None) -> Tensor:
        """The x of a latent, with gradients: near ``[0, 1)``, not rounded and not clipped."""
        return super().decode(z, context, batch_size=batch_size)

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Images ``uint8 [n, C, H, W]`` (``[n, B, C, H, W]`` for a context ``[B, ...]``); see :meth:`Flow.sample`."""
        return self.quantize(
            self.rsample(n, context, temperature=temperature, generator=generator, batch_size=batch_size)
        )

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:  # type: ignore[override]
        """Sets what starts from data (ActNorm) from this batch, now; of images also in the dequantizer."""
        self._check_shape(x)
        if not x.is_floating_point():
            noise = self.noise(x)
            if self.dequantizer is not None:
                self.dequantizer.initialize(noise, self._centred(x, noise.dtype))
            x = self._dequantized(x, noise)[0]
        super().initialize(x, context)

    def noise(
        self, images: Tensor, *, generator: torch.Generator | None = None, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """All that is random in one dequantisation of uint8 images ``[B, C, H, W]``, for ``nll(images, noise=...)``.

        With ``rows = (first, of)`` the images are the rows from ``first`` on of a batch of ``of``, and get the noise
        that they would get in it: a batch that is shared out or gone through in parts is one batch. Floating point
        ``[B, C, H, W]``: uniform noise, or, where no more is needed, x itself. Raises ``ValueError`` as
        :meth:`dequantize`, and for rows that are not there.
        """
        self._check_levels(images)
        if rows is not None and rows != (0, len(images)):
            first, of = rows
            if not 0 <= first <= of - len(images):
                raise ValueError(f"{len(images)} images are not rows {first} to {first + len(images)} of {of}")
            # Noise counts a tensor's elements from its first: the rows before are drawn too, which is cheap.
            whole = torch.cat([images.new_zeros(first, *images.shape[1:]), images])
            return self.noise(whole, generator=generator)[first:]
        # Seed and offset both drawn, on the device: nothing waits for it, and one state of the generator is one noise.
        key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=images.device)
        if self.dequantizer is None:
            return dequantize(images, key, levels=self.grey_levels)[0]
        own = next(self.dequantizer.parameters(), None)
        dtype = torch.float32 if own is None else compute_dtype(own)
        return philox_uniform(torch.empty_like(images, dtype=dtype), key)

    def _dequantized(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(x, log q)`` of :meth:`_noise`; None for a log q that is zero."""
        if self.dequantizer is None:
            return noise, None
        u, logdet = self.dequantizer(noise, self._centred(images, noise.dtype))
        return _unit(images.to(u.dtype), u, float(self.grey_levels), _LARGEST[u.dtype]), -logdet

    def _centred(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return (2 * images.to(dtype) + 1) / self.grey_levels - 1

    def _log_weights(
        self,
        images: Tensor,
        context: Tensor | None,
        count: int,
        generator: torch.Generator | None,
        batch_size: int | None,
    ) -> Tensor:
        """``log p(x) - log q(u | image)`` of ``count`` draws, ``[count, B]``. Each has a key of its own, whatever the
        number that go together."""

        def weigh(images: Tensor, noise: Tensor, context: Tensor | None) -> Tensor:
            x, log_q = self._dequantized(images, noise)
            log_p = self._log_prob(x, context)
            return log_p if log_q is None else log_p - log_q

        noise = [self.noise(images, generator=generator) for _ in range(count)]
        if count == 1:
            return chunked(weigh, batch_size, images, noise[0], context)[None]
        if context is not None and context.shape[0] > 1:  # one is that of all
            context = context.repeat(count, *[1] * (context.dim() - 1))
        weights = chunked(weigh, batch_size, images.repeat(count, 1, 1, 1), torch.cat(noise), context)
        return weights.unflatten(0, (count, len(images)))

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
