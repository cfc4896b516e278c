"""Bases that are more than one normal: a mixture of them, and heavy tails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .bases import LOG_2PI, Base, check_temperature


class MixtureNormal(Base):
    """``components`` normals over ``shape``, each with a mean and a diagonal scale of its own; all learned.

    Args:
        shape: of one latent.
        components: K. Parameters ``logits [K]`` (their softmax are the weights), ``loc`` and ``log_scale``
            ``[K, *shape]``. Weights start equal, means as a draw of N(0, I), scales at 1.

    Temperature scales every component's standard deviation, not the choice among them. A sample is no differentiable
    function of the weights, so that gradients through samples would leave them out: ``has_rsample`` is False (unless
    ``logits`` are frozen) and :meth:`Flow.rsample` refuses.

    Cost: O(K) per element. Raises ``ValueError`` for less than one component.
    """

    def __init__(self, shape: Sequence[int] | int, components: int) -> None:
        super().__init__(shape)
        if components < 1:
            raise ValueError(f"MixtureNormal needs at least 1 component, got {components}")
        self.components = components
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, *self.shape))
        self.log_scale = nn.Parameter(torch.zeros(components, *self.shape))

    @property
    def has_rsample(self) -> bool:
        return not self.logits.requires_grad

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        mask, dtype = self._mask(z, lengths), compute_dtype(z)
        z, loc, log_scale = z.to(dtype)[:, None], self.loc.to(dtype), self.log_scale.to(dtype)
        if mask is not None:
            loc, log_scale = loc[..., : z.shape[-1]], log_scale[..., : z.shape[-1]]
        each = -0.5 * ((z - loc) * torch.exp(-log_scale)).square() - log_scale - 0.5 * LOG_2PI
        if mask is not None:
            each = torch.where(mask[:, None], each, 0.0)
        # By dim, not flatten(2): a batch may be empty.
        each = each.sum(tuple(range(2, each.dim()))) if each.dim() > 2 else each
        return torch.logsumexp(each + self.logits.to(dtype).log_softmax(0), 1)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        check_temperature(temperature)
        dtype, device = compute_dtype(self.loc), self.loc.device
        u = torch.rand(n, generator=generator, device=device, dtype=dtype)
        # By the cumulative weights, not multinomial: it refuses n = 0. Rounding may leave their sum below 1.
        ends = self.logits.detach().to(dtype).softmax(0).cumsum(0)
        chosen = torch.searchsorted(ends, u, right=True).clamp(max=self.components - 1)
        eps = torch.randn(n, *self.shape, generator=generator, device=device, dtype=dtype)
        return self.loc[chosen] + eps * (torch.exp(self.log_scale[chosen]) * temperature)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.components}"


class StudentT(Base):
    """Independent Student-t variables over ``shape``, of location 0 and scale 1: a base with heavy tails.

    Args:
        shape: of one latent.
        df: degrees of freedom, positive: one number, or a tensor that broadcasts to ``shape``. At 1 it is Cauchy's,
            far above 30 a normal.
        learned: whether ``log_df [*shape]`` is a parameter (else a buffer).

    Temperature scales the samples: below df = 2 there is no standard deviation. Samples are differentiable in df.
    Raises ``ValueError`` for degrees of freedom that are not positive. Reference: Jaini et al. 2020 (Tails of Lipschitz
    triangular flows); Alexanderson and Henter 2020.
    """

    log_df: Tensor

    def __init__(self, shape: Sequence[int] | int, df: float | Tensor = 5.0, *, learned: bool = False) -> None:
        super().__init__(shape)
        given = torch.as_tensor(df, dtype=torch.float32)
        if not given.is_meta and not bool((given > 0).all() & torch.isfinite(given).all()):
            raise ValueError(f"StudentT needs finite degrees of freedom above 0, got {df}")
        if given.dim() > len(self.shape) or any(m not in (1, n) for m, n in zip(given.shape[::-1], self.shape[::-1])):
            raise ValueError(f"StudentT's df must broadcast to its shape {tuple(self.shape)}, got {tuple(given.shape)}")
        log_df = given.log().expand(self.shape).clone()
        self.learned = learned
        if learned:
            self.log_df = nn.Parameter(log_df)
        else:
            self.register_buffer("log_df", log_df)

    @property
    def df(self) -> Tensor:
        return self.log_df.exp()

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        mask, dtype = self._mask(z, lengths), compute_dtype(z)
        z, df = z.to(dtype), self.log_df.to(dtype).exp()
        if mask is not None:
            df = df[..., : z.shape[-1]]
        half = 0.5 * df
        constant = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * torch.log(math.pi * df)
        # log(1 + z^2 / df), where the square of a far draw would overflow.
        scaled = z * torch.rsqrt(df)
        far = scaled.abs() > 1
        near, beyond = torch.where(far, 0.0, scaled), torch.where(far, z, 1.0)
        log_far = 2 * torch.log(beyond.abs()) - torch.log(df) + torch.log1p(df * beyond.reciprocal().square())
        each = constant - (half + 0.5) * torch.where(far, log_far, torch.log1p(near.square()))
        if mask is not None:
            each = torch.where(mask, each, 0.0)
        return each.sum(tuple(range(1, each.dim()))) if each.dim() > 1 else each

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        check_temperature(temperature)
        half = 0.5 * self.log_df.to(compute_dtype(self.log_df)).exp().expand(n, *self.shape)
        eps = torch.randn(half.shape, generator=generator, device=half.device, dtype=half.dtype)
        chi = torch._standard_gamma(half.contiguous(), generator=generator)
        # Below the smallest normal number a draw is rounded to 0: far out, but finite.
        z = eps * torch.rsqrt(chi.clamp(min=torch.finfo(chi.dtype).tiny) / half)
        return z if temperature == 1 else z * temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learned={self.learned}"
