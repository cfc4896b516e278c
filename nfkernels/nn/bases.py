"""Base distributions: what the latent follows. They know their shape, never the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .config import Recorded

_LOG_2PI = math.log(2 * math.pi)


class Base(Recorded, nn.Module):
    """A distribution over ``[*shape]``: ``log_prob(z, context=None) -> [B]`` and ``sample(n, ...) -> [n, *shape]``."""

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__()
        self.shape = torch.Size((shape,) if isinstance(shape, int) else tuple(shape))
        # Knows the device and the dtype that samples are made in, wherever the flow is moved or loaded.
        self.register_buffer("like", torch.zeros(()))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        raise NotImplementedError

    def _check(self, z: Tensor) -> None:
        if z.shape[1:] != self.shape:
            raise ValueError(f"this base is over {tuple(self.shape)}, got a tensor of shape {tuple(z.shape)}")

    def extra_repr(self) -> str:
        return str(tuple(self.shape))


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")


class StandardNormal(Base):
    """N(0, I) over ``shape``. Temperature scales the standard deviation: 0 gives the mode."""

    def log_prob(self, z, context=None):
        self._check(z)
        z = z.to(compute_dtype(z)).flatten(1)
        return z.square().sum(1).mul(-0.5) - 0.5 * _LOG_2PI * z.shape[1]

    def sample(self, n, generator=None, temperature=1.0):
        _check_temperature(temperature)
        z = torch.randn(n, *self.shape, generator=generator, device=self.like.device, dtype=self.like.dtype)
        return z if temperature == 1 else z * temperature


class DiagonalNormal(Base):
    """A normal over ``shape`` with learned mean ``loc`` and log standard deviation ``log_scale``, both ``[*shape]``."""

    def __init__(self, shape: Sequence[int] | int) -> None:
        super().__init__(shape)
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.log_scale = nn.Parameter(torch.zeros(self.shape))

    def log_prob(self, z, context=None):
        self._check(z)
        dtype = compute_dtype(z)
        log_scale = self.log_scale.to(dtype)
        eps = (z.to(dtype) - self.loc.to(dtype)) * torch.exp(-log_scale)
        constant = log_scale.sum() + 0.5 * _LOG_2PI * self.shape.numel()
        return eps.square().flatten(1).sum(1).mul(-0.5) - constant

    def sample(self, n, generator=None, temperature=1.0):
        _check_temperature(temperature)
        eps = torch.randn(n, *self.shape, generator=generator, device=self.loc.device, dtype=compute_dtype(self.loc))
        return self.loc + eps * (torch.exp(self.log_scale) * temperature)


class Uniform(Base):
    """Uniform on the box ``[low, high)`` over ``shape``; density 0 outside. Temperature other than 1 is refused."""

    def __init__(self, shape: Sequence[int] | int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(shape)
        if not low < high:
            raise ValueError(f"Uniform needs low < high, got {low} and {high}")
        self.low, self.high = float(low), float(high)

    def log_prob(self, z, context=None):
        self._check(z)
        z = z.flatten(1)
        inside = ((z >= self.low) & (z < self.high)).all(1)
        density = torch.full_like(z[:, :0].sum(1, dtype=compute_dtype(z)), -math.log(self.high - self.low) * z.shape[1])
        return torch.where(inside, density, -math.inf)

    def sample(self, n, generator=None, temperature=1.0):
        if temperature != 1:
            raise ValueError("a uniform base has no standard deviation that temperature could scale: leave it at 1")
        u = torch.rand(n, *self.shape, generator=generator, device=self.like.device, dtype=self.like.dtype)
        return u * (self.high - self.low) + self.low
