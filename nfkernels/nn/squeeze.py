"""Squeeze: space becomes channels, so that couplings and channel mixes reach all of it."""

from __future__ import annotations

from torch import Tensor

from .bijection import Bijection, check_floating, check_lengths, reads_values, refuse_lengths, zero_logdet


class Squeeze(Bijection):
    """``[B, C, H, W] -> [B, f^2 C, H/f, W/f]``, new channel ``c f^2 + f fh + fw``; ``[B, C, T] -> [B, f C, T/f]``.

    A permutation of the elements: logdet 0. Raises ``ValueError`` for sizes that ``factor`` does not divide.
    Reference: Dinh et al. 2017 (RealNVP), section 3.6.
    """

    uses_context = False

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"Squeeze needs a factor of at least 1, got {factor}")
        self.factor = factor

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        f = self.factor
        check_floating(x, "Squeeze")
        if x.dim() not in (3, 4):
            raise ValueError(f"Squeeze takes [B, C, T] or [B, C, H, W], got a tensor of shape {tuple(x.shape)}")
        if any(n % f for n in x.shape[2:]):
            size = " x ".join(str(n) for n in x.shape[2:])
            raise ValueError(f"size {size} cannot be squeezed by {f}: every side must be a multiple of {f}")
        if x.dim() == 4:
            refuse_lengths(lengths, "Squeeze of images")
            return _unshuffle(x, f), zero_logdet(x)
        if lengths is not None:
            check_lengths(x, lengths)
            self.lengths_after(lengths)
        b, c, t = x.shape
        return x.reshape(b, c, t // f, f).transpose(2, 3).reshape(b, c * f, t // f), zero_logdet(x)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        f = self.factor
        check_floating(z, "Squeeze")
        per = f if z.dim() == 3 else f * f
        if z.dim() not in (3, 4) or z.shape[1] % per:
            raise ValueError(
                f"undoing a squeeze by {f} takes [B, {f} C, T] or [B, {f * f} C, H, W], got shape {tuple(z.shape)}"
            )
        if z.dim() == 4:
            refuse_lengths(lengths, "Squeeze of images")
            return _shuffle(z, f), zero_logdet(z)
        if lengths is not None:
            check_lengths(z, lengths)
        b, c, t = z.shape
        return z.reshape(b, c // f, f, t).transpose(2, 3).reshape(b, c // f, t * f), zero_logdet(z)

    def lengths_after(self, lengths: Tensor | None) -> Tensor | None:
        if lengths is None:
            return None
        if reads_values(lengths) and bool((lengths % self.factor).any()):
            raise ValueError(f"lengths {lengths.tolist()} cannot be squeezed: each must be a multiple of {self.factor}")
        return lengths // self.factor

    def lengths_before(self, lengths: Tensor | None) -> Tensor | None:
        return None if lengths is None else lengths * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


# As F.pixel_unshuffle and F.pixel_shuffle do, which leave an empty batch in its old shape.


def _unshuffle(x: Tensor, f: int) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // f, f, w // f, f).permute(0, 1, 3, 5, 2, 4).reshape(b, c * f * f, h // f, w // f)


def _shuffle(z: Tensor, f: int) -> Tensor:
    b, c, h, w = z.shape
    return z.reshape(b, c // (f * f), f, f, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // (f * f), h * f, w * f)
