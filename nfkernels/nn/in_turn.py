"""The inverse of an autoregressive layer, feature after feature, where no kernel does all passes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Degrees


def invert_in_turn(
    transform: Any,
    z: Tensor,
    act: Callable[[Tensor], Tensor],
    *,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    degrees: Degrees,
    context: Sequence[Tensor | None],
    residual: Sequence[int] | None,
    final_activation: bool,
) -> tuple[Tensor, Tensor]:
    """``(x, logdet)`` without gradients: what :func:`nfkernels.ops.autoregressive_inverse` computes, for any transform.

    The network is that op's. A pass computes the units whose turn it is, the params of the features that they decide,
    and those features: all passes together cost about one evaluation of the network and one of the transform.
    """
    features = torch.tensor(degrees.features, device=z.device)
    order = features.argsort(stable=True)
    per_feature = weights[-1].shape[0] // max(len(features), 1)
    rows = (order[:, None] * per_feature + torch.arange(per_feature, device=z.device)).flatten()
    # By degree, so that all that is known is at the front.
    weights = [weights[0][:, order], *weights[1:-1], weights[-1][rows]]
    biases = [*biases[:-1], biases[-1][rows]]
    z, x = z[:, order], torch.zeros_like(z)
    sums = [z.new_empty(z.shape[0], w.shape[0]) for w in weights[:-1]]
    outs = [torch.empty_like(v) for v in sums]
    total, last = None, len(sums) - 1
    starts = [_starts(d, degrees.passes) for d in (degrees.features, *degrees.hidden)]
    for turn in range(degrees.passes):
        seen, read = x, starts[0][turn]
        for i, (v, out) in enumerate(zip(sums, outs, strict=True)):
            low, high = starts[1 + i][turn : turn + 2]
            if low < high:
                new = F.linear(seen[:, :read], weights[i][low:high, :read], biases[i][low:high])
                if context[i] is not None:
                    new = new + context[i][:, low:high]
                if residual is not None and residual[i] >= 0:
                    new = new + sums[residual[i]][:, low:high]
                v[:, low:high] = new
                out[:, low:high] = new if i == last and not final_activation else act(new)
            seen, read = out, high
        low, high = starts[0][turn : turn + 2]
        own = slice(low * per_feature, high * per_feature)
        params = F.linear(seen[:, :read], weights[-1][own, :read], biases[-1][own])
        x[:, low:high], logdet = transform.inverse(z[:, low:high], params)
        total = logdet if total is None else total + logdet
    return x[:, order.argsort()], total


def _starts(degrees: Sequence[int], passes: int) -> list[int]:
    """How many of these have a degree below 0, 1, .. passes."""
    counts = [0] * (passes + 1)
    for degree in degrees:
        if degree < passes:
            counts[degree + 1] += 1
    for turn in range(passes):
        counts[turn + 1] += counts[turn]
    return counts
