"""Affine coupling and the channel mix behind it, as one op, in plain PyTorch: ``z = W coupling(x) + bias``.

In Glow (Kingma & Dhariwal 2018) every coupling is followed by the next step's actnorm and 1x1 convolution, which are
one matrix and one bias. Between the two the data stays in the arithmetic's type: low-precision data is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import affine_coupling, channel_mix
from .affine_coupling import Form, compute_dtype


def forward(x, params, weight, bias, gain, logdet, form: Form) -> tuple[Tensor, Tensor]:
    """``(z, logdet)``; the log-determinant is the running one and the coupling's, without the mix's."""
    y, logdet = affine_coupling.forward(x.to(compute_dtype(x)), params, None, None, gain, logdet, form)
    return channel_mix.forward(y, weight, bias).to(x.dtype), logdet


def conditioner_input(z: Tensor, start: int, count: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Channels ``[start, start + count)`` of z once more, never a view of it."""
    part = z.narrow(1, start, count)
    return empty_conditioner_input(part, count, dtype, channels_last).copy_(part)


def empty_conditioner_input(like: Tensor, count: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    batch, _, *spatial = like.shape
    if channels_last:
        return like.new_empty((batch, *spatial, count), dtype=dtype).movedim(-1, 1)
    return like.new_empty((batch, count, *spatial), dtype=dtype)


def backward(
    z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, extra_start: int, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dparams, dweight, dbias, dgain)`` from the output, with ``inverse = weight^-1``; differentiable itself
    where the inverse is a differentiable function of the weight."""
    dtype = compute_dtype(z)
    y = channel_mix.rebuild(z.to(dtype), inverse, bias)
    dz = torch.zeros_like(y) if dz is None else dz.to(dtype)
    if dextra is not None:
        beyond = z.shape[1] - extra_start - dextra.shape[1]
        dz = dz + F.pad(dextra.to(dtype), (0, 0) * (z.dim() - 2) + (extra_start, beyond))
    dy, dweight, dbias = channel_mix.backward(y, weight, dz)
    dx, dparams, dgain = affine_coupling.backward(y, params, dy, dlogdet, None, None, gain, form)
    return dx.to(z.dtype), dparams, dweight, dbias, dgain


def rebuild(z, params, inverse, bias, gain, form: Form) -> Tensor:
    """The coupling's input from z, as a reversible backward needs it."""
    y = channel_mix.rebuild(z.to(compute_dtype(z)), inverse, bias)
    return affine_coupling.rebuild(y, params, None, None, gain, form).to(z.dtype)


def inverse_of(weight: Tensor) -> Tensor:
    """``weight^-1`` by LU and substitution, without asking the device whether it is singular; differentiable."""
    identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return torch.linalg.solve_ex(weight, identity).result
