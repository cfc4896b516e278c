"""The public dense_net: a fully connected conditioner, all its layers in one call.

On the CPU rows go through all layers while they are in the first cache; elsewhere, and under ``torch.compile`` and
``torch.func``, it is the plain composition. When that is faster is :func:`pays`, a table and no tuning.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import dense_net as reference
from ..reference.dense_net import Activation, Share
from ._library import define, forced_backend, serving, under_transform
from .affine_coupling import _choice

ActivationName = Literal["relu", "leaky_relu", "elu", "tanh", "silu", "softplus"]
ShareName = Literal["none", "gate", "add"]

# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _saved_shape(x, weights, residual, share) -> tuple[int, int, int]:
    layers = len(weights) // 2 - 2
    slots = 1 + layers + (layers // 2 if share == Share.gate else 0)
    return slots, x.shape[0], reference.padded(weights[0].shape[0], x.dtype.itemsize)


def _composite_forward(x, shares, weights, residual, activation, share, save):
    y = reference.forward(x, shares, weights, residual, activation, share)
    if not save:
        return y, x.new_empty(0)
    kept, ungated = reference.stages(x, shares, weights, residual, activation, share)
    saved = torch.stack((*kept, *ungated))
    return y, F.pad(saved, (0, _saved_shape(x, weights, residual, share)[2] - saved.shape[2]))


def _composite_backward(dy, x, shares, saved, weights, residual, activation, share, *need):
    dx, dshares, dweights = reference.backward(dy, x, shares, weights, residual, activation, share)
    return (
        dx if need[0] else x.new_empty(0),
        dshares.contiguous() if need[1] else x.new_empty(0),
        [g.contiguous() for g in dweights] if need[2] else [],
    )


def _fake_forward(x, shares, weights, residual, activation, share, save):
    y = x.new_empty(x.shape[0], weights[-1].shape[0])
    return y, x.new_empty(_saved_shape(x, weights, residual, share) if save else 0)


def _fake_backward(dy, x, shares, saved, weights, residual, activation, share, *need):
    return (
        x.new_empty(x.shape if need[0] else 0),
        x.new_empty(shares.shape if need[1] else 0),
        [torch.empty_like(w) for w in weights] if need[2] else [],
    )


_NET = "Tensor[] weights, bool residual, int activation, int share"
_forward = define(
    "_dense_net_forward",
    f"(Tensor x, Tensor? shares, {_NET}, bool save) -> (Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
    cpu_only="PyTorch's own products, layer by layer",
)
_backward = define(
    "_dense_net_backward",
    f"(Tensor dy, Tensor x, Tensor? shares, Tensor saved, {_NET}, bool need_dx, bool need_dshares, bool need_dweights)"
    " -> (Tensor, Tensor, Tensor[])",
    reference=_composite_backward,
    fake=_fake_backward,
    cpu_only="PyTorch's own products, layer by layer",
)


# --- when it pays ----------------------------------------------------------------------------------------------------

# Hidden values. `python -m benchmarks cpu --ops dense_net`, two threads, 1 to 16,384 rows: 1.2 to 2.3 times as fast as
# separate calls forward and 2 to 4.8 times with the backward, at 32 to 128; at 256 there was nothing to gain.
WIDEST = 128
MOST_LAYERS = 64


def pays(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether one call is faster than the library's products: small networks on the CPU, of which there is a kernel."""
    return (
        x.device.type == "cpu"
        and x.dim() == 2
        and x.shape[1] == weights[0].shape[1]
        and len(weights) <= 2 * MOST_LAYERS
        and weights[0].shape[0] <= WIDEST
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and forced_backend() in (None, "native")
        and not torch.compiler.is_compiling()
        and _has_kernel()
        and not under_transform()
    )


@functools.cache
def _has_kernel() -> bool:
    return serving("_dense_net_forward", "cpu")[0] == "native"


# --- autograd -------------------------------------------------------------------------------------------------------


class _DenseNet(torch.autograd.Function):
    """Saves each layer's output before its activation."""

    @staticmethod
    def forward(ctx: Any, x, shares, residual, activation, share, *weights):
        y, saved = _forward(x, shares, weights, residual, activation, share, True)
        ctx.save_for_backward(x, shares, saved, *weights)
        ctx.options = residual, activation, share
        ctx.backend = forced_backend()
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, shares, saved, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled() or under_transform():
            dx, dshares, dweights = reference.backward(dy, x, shares, weights, *ctx.options)
        else:
            wanted = need[0], need[1], True in need[5:]
            dx, dshares, dweights = _backward.on(
                ctx.backend, dy.contiguous(), x, shares, saved, weights, *ctx.options, *wanted
            )
        grads = dweights or [None] * len(weights)
        if not all(need[5:]):
            grads = [g if n else None for g, n in zip(grads, need[5:])]
        return dx if need[0] else None, dshares if need[1] else None, None, None, None, *grads


# --- public ---------------------------------------------------------------------------------------------------------


def dense_net(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    residual: bool = True,
    activation: ActivationName = "relu",
    shares: Tensor | None = None,
    share: ShareName = "none",
) -> Tensor:
    """A fully connected conditioner ``[B, in] -> [B, out]``, all its layers in one call.

    ``residual``: ``h = W0 x + b0``, then blocks ``h + W2 act(W1 act(h) + b1) + b2``, then ``Wl h + bl``; otherwise
    ``Wl act(... act(W1 act(W0 x + b0) + b1)) + bl``.

    Args:
        x: ``[B, in]``, float32 or float64, any strides.
        weights: a weight ``[out, in]`` and a bias ``[out]`` for each layer in turn, as ``nn.Linear`` keeps them, in x's
            type; the hidden ones are all of one width.
        activation: ``"relu"``, ``"leaky_relu"`` (0.01), ``"elu"``, ``"tanh"``, ``"silu"`` or ``"softplus"``.
        shares: what a context adds, ``[B, shares * hidden]``: with ``share="gate"`` one for each block, by whose
            sigmoid the block's output is multiplied; with ``share="add"`` one that is added to the first layer's
            output, and for a residual net one more for each block's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.

    Cost: ``2 B (in h + layers h^2 + h out)`` operations, the backward twice that; keeps each layer's output.
    Reference: Durkan et al. 2019 (Neural Spline Flows), appendix B.1.
    """
    act, part = int(_choice(Activation, activation, "activation")), int(_choice(Share, share, "share"))
    _check(x, weights, residual, shares, part)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or under_transform():
        return reference.forward(x, shares, weights, residual, act, part)
    return run(x, shares, weights, bool(residual), act, part)


def run(x: Tensor, shares: Tensor | None, weights: Sequence[Tensor], residual: bool, activation: int, share: int):
    """:func:`dense_net` of arguments that are known to fit."""
    if shares is not None:
        shares = shares.contiguous()
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weights[0].requires_grad
        or (shares is not None and shares.requires_grad)
        or any(w.requires_grad for w in weights)
    ):
        return _DenseNet.apply(x, shares, residual, activation, share, *weights)
    return _forward(x, shares, weights, residual, activation, share, False)[0]


def _check(x, weights, residual, shares, share) -> None:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be [B, in] in float32 or float64, got {x.dtype} {tuple(x.shape)}")
    if len(weights) < 4 or len(weights) % 2 or (residual and len(weights) % 4):
        raise ValueError(
            f"weights must be a weight and a bias for each of at least 2 layers (an even number of them for a residual "
            f"net), got {len(weights)} tensors"
        )
    if len(weights) > 2 * MOST_LAYERS:
        raise ValueError(f"a network has at most {MOST_LAYERS} layers, got {len(weights) // 2}")
    hidden, last = weights[0].shape[0], len(weights) - 2
    for i in range(0, len(weights), 2):
        w, b = weights[i], weights[i + 1]
        height, width = w.shape[0] if i == last else hidden, x.shape[1] if i == 0 else hidden
        if w.shape != (height, width) or b.shape != (height,):
            raise ValueError(
                f"layer {i // 2} must have a weight [{height}, {width}] and a bias [{height}], got {tuple(w.shape)} "
                f"and {tuple(b.shape)}"
            )
        for t in (w, b):
            if t.dtype != x.dtype or t.device != x.device:
                raise ValueError(f"layer {i // 2} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")
    blocks = len(weights) // 4 - 1 if residual else 0
    count = (0, blocks, blocks + 1)[share]
    if (shares is None) != (share == Share.none) or (share == Share.gate and not blocks):
        raise ValueError("shares go with share='gate' (residual nets) or share='add', and these with shares")
    if shares is not None and (shares.shape != (x.shape[0], count * hidden) or shares.dtype != x.dtype):
        raise ValueError(
            f"shares must be {x.dtype} [{x.shape[0]}, {count * hidden}] for {count} shares, got {shares.dtype} "
            f"{tuple(shares.shape)}"
        )
