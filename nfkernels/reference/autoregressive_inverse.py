"""The inverse of a masked autoregressive layer in plain PyTorch: one pass of the network for every degree.

``z_i = f(x_i; p_i(x_{< i}))`` with the params p from a masked network (MADE). The passes solve for x: once the features
of degrees below g are known, so are the params of those of degree g. Germain et al. 2015 (MADE), equations 12-13;
Papamakarios et al. 2017 (Masked Autoregressive Flow), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import affine_coupling, rational_quadratic_spline
from .affine_coupling import compute_dtype
from .lu_compose import no_autocast


class Activation(IntEnum):
    """Between the layers. As in csrc/include/autoregressive_inverse.h."""

    relu = 0
    leaky_relu = 1
    elu = 2
    silu = 3
    tanh = 4


_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.relu: F.relu,
    Activation.leaky_relu: F.leaky_relu,
    Activation.elu: F.elu,
    Activation.silu: F.silu,
    Activation.tanh: torch.tanh,
}


class Shape(NamedTuple):
    """What a masked network is besides its weights; the raw op takes it unpacked."""

    passes: int
    activation: int
    residual: Sequence[int]  # per hidden layer: the earlier one whose sums are added to its own, or -1
    final_activation: bool


class Transform(NamedTuple):
    """The elementwise transform: which one, its discrete options, and its constants; the raw op takes it unpacked."""

    form: Sequence[int]
    constants: Sequence[float]


# The first number of a form: an affine map's one more, a spline's two.
AFFINE, SPLINE = 0, 1


def forward(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], contexts: Sequence[Tensor | None],
    table: Tensor, shape: Shape, transform: Transform,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(x, logdet)``: see :func:`nfkernels.ops.autoregressive_inverse`; every argument already checked."""
    degrees = degrees_of(table, z.shape[1], [w.shape[0] for w in weights[:-1]], shape.passes)
    with no_autocast(z.device.type):
        z = z.to(compute_dtype(z))
        masked = masked_weights(weights, degrees, z.dtype)
        x, total = torch.zeros_like(z), z.new_zeros(z.shape[0])
        for step in range(shape.passes):
            params = network(x, masked, biases, contexts, shape)
            x, total = elementwise(z, params, transform)
            if step + 1 < shape.passes:  # what is not known yet may be anything: zero times that is not zero
                x = torch.where(degrees[0] <= step, x, 0.0)
        return x, total


def network(x: Tensor, weights, biases, contexts, shape: Shape) -> Tensor:
    """The params of every feature; ``weights`` are masked already."""
    act, at = _ACTIVATIONS[shape.activation], x
    sums: list[Tensor] = []
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        at = F.linear(at, weight, None if bias is None else bias.to(x.dtype))
        if i == last:
            break
        if contexts[i] is not None:
            at = at + contexts[i].to(x.dtype)
        if shape.residual[i] >= 0:
            at = at + sums[shape.residual[i]]
        sums.append(at)
        if i + 1 < last or shape.final_activation:
            at = act(at)
    return at


def elementwise(z: Tensor, params: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """Every feature by its own params, as if all were known: ``(x, logdet [B])``."""
    kind, *numbers = transform.form
    if kind == SPLINE:
        spline = rational_quadratic_spline.Form(*numbers, *transform.constants)
        return rational_quadratic_spline.forward(z, params, None, None, None, spline)
    form = affine_coupling.Form.unpack(*numbers, *transform.constants)
    return affine_coupling.forward(z, params, None, None, None, None, form)


def degrees_of(table: Tensor, features: int, widths: Sequence[int], passes: int) -> list[Tensor]:
    """The degree of every feature, then of every unit of each hidden layer, from the table of
    :class:`nfkernels.ops.Degrees`."""
    offsets = passes + 1
    starts = [0] + [offsets + features + i * offsets for i in range(len(widths))]
    found = []
    for start, width in zip(starts, [features, *widths], strict=True):
        ends = table[start + 1 : start + offsets].contiguous()
        found.append(torch.bucketize(torch.arange(width, device=table.device, dtype=table.dtype), ends, right=True))
    order = table[offsets : offsets + features].long()
    found[0] = torch.empty_like(found[0]).scatter(0, order, found[0])
    return found


def masked_weights(weights: Sequence[Tensor], degrees: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A unit sees the features below its degree and the units up to it; a feature's params the units up to its own."""
    masked = []
    features = degrees[0]
    for i, weight in enumerate(weights):
        if i + 1 < len(weights):
            sees = degrees[i][None] < degrees[1][:, None] if i == 0 else degrees[i][None] <= degrees[i + 1][:, None]
        else:
            rows = features.repeat_interleave(weight.shape[0] // max(len(features), 1))
            sees = degrees[i][None] <= rows[:, None]
        masked.append(torch.where(sees, weight.to(dtype), 0.0))
    return masked
