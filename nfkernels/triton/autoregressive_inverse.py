"""The autoregressive inverse where Triton serves: the reference, one evaluation of the network for every degree.

There is no Triton kernel: a pass adds a few units that all later ones read back, which asks for shared memory that
Triton does not hand out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.autoregressive_inverse import Shape, Transform
from ..reference.autoregressive_inverse import forward as reference_forward


def forward(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], contexts: Sequence[Tensor | None],
    table: Tensor, passes: int, activation: int, residual: Sequence[int], final_activation: bool, form: Sequence[int],
    constants: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw op ``_autoregressive_inverse_forward``, every argument already checked."""
    shape = Shape(passes, activation, residual, final_activation)
    x, logdet = reference_forward(z, weights, biases, contexts, table, shape, Transform(form, constants))
    return torch.empty_like(z).copy_(x), logdet
