"""Base distributions: what the latent follows. They know their shape, never the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..ops import gaussian_log_density
from ..reference.affine_coupling import compute_dtype
from .bijection import positions, valid_mask
from .config import Recorded

LOG_2PI = math.log(2 * math.pi)


class Base(Recorded, nn.Module):
    """A distribution over ``[*shape]``: ``log_prob(z, context=None) -> [B]`` and ``sample(n, ...) -> [n, *shape]``.

    Given ``lengths [B]``, ``log_prob`` counts the valid positions of the last axis only, and z may have fewer positions
    than ``shape`` (a batch of short sequences). Raises ``ValueError`` for a z of another shape, a temperature below 0
    and a shape with negative numbers.
    """

    like: Tensor

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__()
        self.shape = torch.Size((shape,) if isinstance(shape, int) else tuple(shape))
        if any(n < 0 for n in self.shape):
            raise ValueError(f"a {type(self).__name__} is over a shape of numbers from 0 on, got {tuple(self.shape)}")
        # Knows the device and the dtype that samples are made in, wherever the flow is moved or loaded.
        self.register_buffer("like", torch.zeros(()))

    @property
    def has_rsample(self) -> bool:
        """Whether samples carry the gradients of all parameters."""
        return True

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is not 0, as ``torch.distributions`` tells it."""
        return constraints.independent(constraints.real, len(self.shape))

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """``log p(z) [B]`` in nats of ``z [B, *shape]``, float32 (float64 for float64 z)."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """``n`` samples ``[n, *shape]``, on the base's device; ``temperature`` scales the standard deviation."""
        raise NotImplementedError

    def _mask(self, z: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Checks the shape; where z is valid, bool ``[B, 1, T]``, None without lengths."""
        fits = z.shape[1:] == self.shape
        if lengths is not None and len(self.shape) == 2 and z.dim() == 3:
            fits = z.shape[1] == self.shape[0] and z.shape[2] <= self.shape[1]
        if not fits:
            raise ValueError(f"this base is over {tuple(self.shape)}, got a tensor of shape {tuple(z.shape)}")
        return valid_mask(z, lengths)

    def extra_repr(self) -> str:
        return str(tuple(self.shape))


def check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")


class StandardNormal(Base):
    """N(0, I) over ``shape``. Temperature scales the standard deviation: 0 gives the mode."""

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        mask = self._mask(z, lengths)
        if mask is None:
            return gaussian_log_density(z)
        z = torch.where(mask, z.to(compute_dtype(z)), 0.0)
        count = z.shape[1] * positions(z, lengths)
        return z.square().flatten(1).sum(1).mul(-0.5) - 0.5 * LOG_2PI * count

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        check_temperature(temperature)
        z = torch.randn(n, *self.shape, generator=generator, device=self.like.device, dtype=self.like.dtype)
        return z if temperature == 1 else z * temperature


class DiagonalNormal(Base):
    """A normal over ``shape`` with learned mean ``loc`` and log standard deviation ``log_scale``, both ``[*shape]``.

    For ones that depend on the context, end the flow's layers with ``DiagonalPrior(channels, context_channels=E)`` on a
    standard normal: it is the same density, and the latents stay N(0, I).
    """

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__(shape)
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.log_scale = nn.Parameter(torch.zeros(self.shape))

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        mask = self._mask(z, lengths)
        dtype = compute_dtype(z)
        loc, log_scale = self.loc.to(dtype), self.log_scale.to(dtype)
        if mask is None:
            # Not with loc and log_scale as params: their gradients would be made for every sample and then summed.
            return gaussian_log_density((z.to(dtype) - loc) * torch.exp(-log_scale)) - log_scale.sum()
        loc, log_scale = loc[:, : z.shape[2]], log_scale[:, : z.shape[2]]
        eps = (z.to(dtype) - loc) * torch.exp(-log_scale)
        each = -0.5 * eps.square() - log_scale - 0.5 * LOG_2PI
        return torch.where(mask, each, 0.0).flatten(1).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        check_temperature(temperature)
        eps = torch.randn(n, *self.shape, generator=generator, device=self.loc.device, dtype=compute_dtype(self.loc))
        return self.loc + eps * (torch.exp(self.log_scale) * temperature)


class Uniform(Base):
    """Uniform on the box ``[low, high]`` over ``shape``; density 0 (``log_prob`` -inf) outside.

    What is rounded to a bound lies inside, as a spline on ``[low, high]`` gives it back. Temperature other than 1 is
    refused.
    """

    def __init__(self, shape: Sequence[int] | int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(shape)
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"Uniform needs low < high, both finite, got {low} and {high}")
        self.low, self.high = float(low), float(high)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), len(self.shape))

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        mask = self._mask(z, lengths)
        inside = (z >= self.low) & (z <= self.high)
        count: int | Tensor = z.new_full(z.shape[:1], z.shape[1:].numel(), dtype=compute_dtype(z))
        if mask is not None:
            inside, count = inside | ~mask, z.shape[1] * positions(z, lengths)
        return torch.where(inside.flatten(1).all(1), -math.log(self.high - self.low) * count, -math.inf)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        if temperature != 1:
            raise ValueError("a uniform base has no standard deviation that temperature could scale: leave it at 1")
        u = torch.rand(n, *self.shape, generator=generator, device=self.like.device, dtype=self.like.dtype)
        return u * (self.high - self.low) + self.low
