"""The inverse of a masked autoregressive layer in Triton: a program to a tile of samples, degree after degree.

A degree adds a few units to each layer, whose values later degrees read. They go through a scratch buffer in global
memory, a program's own, which its caches hold; the barrier between a layer's stores and the next one's loads orders
them as in ``autoregressive_conv.py``, and where it does not, the reference serves. Weights that a mask hides are never
read. All sums are plain multiply-adds, in an order that the shape alone fixes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.affine_coupling import Layout
from ..reference.autoregressive_inverse import AFFINE, Activation, Shape, Transform
from ..reference.autoregressive_inverse import forward as reference_forward
from . import _tiles as tiles
from ._couple import couple
from .affine_coupling import _options
from .autoregressive_conv import barrier_orders_stores
from .scale_map import exp, tanh

PRODUCTS = 4096  # weight times value, that a program has in flight; half in float64
MOST_ROWS, MOST_INPUTS = 16, 64  # units that a tile makes, and that it reads
FEW, MANY = 16, 64  # samples to a program
MANY_FROM = 16384  # samples in all

RELU: tl.constexpr = tl.constexpr(int(Activation.relu))
LEAKY_RELU: tl.constexpr = tl.constexpr(int(Activation.leaky_relu))
ELU: tl.constexpr = tl.constexpr(int(Activation.elu))
SILU: tl.constexpr = tl.constexpr(int(Activation.silu))


@triton.jit
def _activated(b_v, KIND: tl.constexpr):
    if KIND == RELU:
        b_a = tl.where(b_v < 0.0, 0.0, b_v)
    elif KIND == LEAKY_RELU:
        b_a = tl.where(b_v < 0.0, 0.01 * b_v, b_v)
    elif KIND == ELU:
        b_a = tl.where(b_v < 0.0, exp(tl.where(b_v < 0.0, b_v, 0.0)) - 1.0, b_v)
    elif KIND == SILU:
        b_a = b_v / (1.0 + exp(-b_v))
    else:
        b_a = tanh(b_v)
    return b_a


@triton.jit
def _sums(
    p_weight, o_row, m_row, width, p_in, s_in, m_b, count, p_order,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """``[rows, samples]``: what rows ``o_row`` of a weight make of the first ``count`` inputs, in an order if given."""
    b_sum = tl.zeros([BLOCK_R, BLOCK_B], DTYPE)
    for i_k in range(0, count, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < count
        if p_order is not None:
            o_k = tl.load(p_order + o_k, mask=m_k, other=0)
        p_k = p_in[None, :] + o_k.to(tl.int64)[:, None] * s_in
        b_in = tl.load(p_k, mask=m_k[:, None] & m_b[None, :], other=0.0)
        p_w = p_weight + o_row.to(tl.int64)[:, None] * width + o_k[None, :]
        b_w = tl.load(p_w, mask=m_row[:, None] & m_k[None, :], other=0.0)
        b_sum += tl.sum(b_w[:, :, None] * b_in[None, :, :], 1)
    return b_sum


@triton.jit
def inverse_kernel(
    p_z, p_weights, p_biases, p_context, p_table, p_layers, p_active, p_given, p_x, p_logdet,
    B, D, units, passes, layers, context_units, s_zb, s_zc, s_xb, s_xc, s_cb,
    ACTIVATION: tl.constexpr, LAST_ACTIVE: tl.constexpr, PER: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    KIND: tl.constexpr, NEGATE: tl.constexpr,
    PRESCALE: tl.constexpr, OFFSET: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    LOG_GAIN: tl.constexpr, LOG_CLAMP: tl.constexpr, SHIFT_FIRST: tl.constexpr, SHIFT_FACTOR: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """``p_layers``: see :func:`_layers`. ``p_active`` holds the units as the next layer reads them, ``[programs, units,
    BLOCK_B]``; ``p_given`` as they were before the activation, for layers that are added to later ones, or is None."""
    i_program = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_B)
    o_b = i_program * BLOCK_B + o_s
    m_b = o_b < B
    p_active += i_program * units * BLOCK_B
    if p_given is not None:
        p_given += i_program * units * BLOCK_B
    p_order = p_table + passes + 1
    b_total = tl.zeros([BLOCK_B], DTYPE)
    for i_g in range(passes):
        known = tl.load(p_table + i_g)
        found = tl.load(p_table + i_g + 1)
        seen = known
        below = tl.full([], 0, tl.int64)  # the first unit of the layer before
        for i_layer in range(layers):
            p_layer = p_layers + i_layer * 5
            width = tl.load(p_layer)
            start = tl.load(p_layer + 1)
            p_weight = p_weights + tl.load(p_layer + 2)
            added = tl.load(p_layer + 3)
            p_degrees = p_table + tl.load(p_layer + 4) + i_g
            first = tl.load(p_degrees)
            last = tl.load(p_degrees + 1)
            for i_r in range(first, last, BLOCK_R):
                o_r = i_r + tl.arange(0, BLOCK_R)
                m_r = o_r < last
                if i_layer == 0:
                    b_v = _sums(
                        p_weight, o_r, m_r, width, p_x + o_b * s_xb, s_xc, m_b, seen, p_order,
                        DTYPE, BLOCK_R, BLOCK_K, BLOCK_B,
                    )  # fmt: skip
                else:
                    b_v = _sums(
                        p_weight, o_r, m_r, width, p_active + below * BLOCK_B + o_s, BLOCK_B, m_b, seen, None,
                        DTYPE, BLOCK_R, BLOCK_K, BLOCK_B,
                    )  # fmt: skip
                o_u = start + o_r
                b_v += tl.load(p_biases + o_u, mask=m_r, other=0.0)[:, None]
                if p_context is not None:
                    m_c = (m_r & (o_u < context_units))[:, None] & m_b[None, :]
                    b_v += tl.load(p_context + o_b[None, :] * s_cb + o_u[:, None], mask=m_c, other=0.0)
                o_out = o_u[:, None] * BLOCK_B + o_s[None, :]
                if p_given is not None:
                    o_a = added + o_r
                    m_a = (m_r & (o_a >= 0))[:, None]
                    b_v += tl.load(p_given + (o_a[:, None] * BLOCK_B + o_s[None, :]), mask=m_a, other=0.0)
                    tl.store(p_given + o_out, b_v, mask=m_r[:, None])
                b_a = _activated(b_v, ACTIVATION)
                if not LAST_ACTIVE:
                    b_a = tl.where(i_layer + 1 < layers, b_a, b_v)
                tl.store(p_active + o_out, b_a, mask=m_r[:, None])
            tl.debug_barrier()
            seen = last
            below = start
        p_layer = p_layers + layers * 5
        width = tl.load(p_layer)
        p_bias = p_biases + units
        p_weight = p_weights + tl.load(p_layer + 2)
        for i_f in range(known, found, BLOCK_R):
            o_f = i_f + tl.arange(0, BLOCK_R)
            m_f = o_f < found
            o_d = tl.load(p_order + o_f, mask=m_f, other=0)
            b_t = _sums(
                p_weight, o_d * PER + SHIFT, m_f, width, p_active + below * BLOCK_B + o_s, BLOCK_B, m_b, seen, None,
                DTYPE, BLOCK_R, BLOCK_K, BLOCK_B,
            )  # fmt: skip
            b_t += tl.load(p_bias + o_d * PER + SHIFT, mask=m_f, other=0.0)[:, None]
            b_r = b_t
            if PER == 2:
                b_r = _sums(
                    p_weight, o_d * PER + SCALE, m_f, width, p_active + below * BLOCK_B + o_s, BLOCK_B, m_b, seen, None,
                    DTYPE, BLOCK_R, BLOCK_K, BLOCK_B,
                )  # fmt: skip
                b_r += tl.load(p_bias + o_d * PER + SCALE, mask=m_f, other=0.0)[:, None]
            o_c = o_d.to(tl.int64)[:, None]
            m_out = m_f[:, None] & m_b[None, :]
            b_z = tl.load(p_z + o_b[None, :] * s_zb + o_c * s_zc, mask=m_out, other=0.0)
            b_x, b_log_s = couple(
                b_z, b_t, b_r, b_r, False,
                KIND, NEGATE, PRESCALE, OFFSET, GAIN, CLAMP, EPS, LOG_GAIN, LOG_CLAMP, SHIFT_FIRST, SHIFT_FACTOR,
            )  # fmt: skip
            tl.store(p_x + o_b[None, :] * s_xb + o_c * s_xc, b_x, mask=m_out)
            b_total += tl.sum(tl.where(m_out, b_log_s, 0.0), 0)
        tl.debug_barrier()
    tl.store(p_logdet + o_b, b_total, mask=m_b)


# --- launcher --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _layers(
    device: torch.device, features: int, widths: tuple[int, ...], residual: tuple[int, ...], passes: int
) -> Tensor:
    """int64 ``[L + 1, 5]``, per layer: its inputs, its first unit among all, its weight's start among all, the first
    unit of the layer that is added to it or less than none, its offsets in the table of degrees."""
    rows, start, weight = [], 0, 0
    starts = []
    for i, width in enumerate((*widths, 0)):
        inputs = widths[i - 1] if i else features
        added = starts[residual[i]] if i < len(widths) and residual[i] >= 0 else -(2**31)
        rows.append([inputs, start, weight, added, passes + 1 + features + i * (passes + 1)])
        starts.append(start)
        start += width
        weight += width * inputs
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)


def _joined(parts: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Flat, one after the other; zeros for what is None."""
    return torch.cat([like.new_zeros(n) if t is None else t.flatten() for t, n in zip(parts, sizes, strict=True)])


def _context(contexts: Sequence[Tensor | None], widths: Sequence[int], like: Tensor) -> Tensor | None:
    """``[B, units of the layers up to the last one that has any]``."""
    given = [i for i, t in enumerate(contexts) if t is not None]
    if not given:
        return None
    upto = given[-1] + 1
    if upto == 1:
        return contexts[0].contiguous()
    parts = zip(contexts[:upto], widths, strict=False)
    return torch.cat([like.new_zeros(like.shape[0], n) if t is None else t for t, n in parts], 1)


def forward(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], contexts: Sequence[Tensor | None],
    table: Tensor, passes: int, activation: int, residual: Sequence[int], final_activation: bool, form: Sequence[int],
    constants: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(x, logdet)``; the raw op ``_autoregressive_inverse_forward``, every argument already checked."""
    x = torch.empty_like(z)
    if form[0] != AFFINE or not barrier_orders_stores(z.get_device()):
        shape = Shape(passes, activation, residual, final_activation)
        made, total = reference_forward(z, weights, biases, contexts, table, shape, Transform(form, constants))
        return x.copy_(made), total
    batch, features = z.shape
    if z.numel() == 0:
        return x, z.new_zeros(batch)
    total = z.new_empty(batch)
    widths = tuple(w.shape[0] for w in weights[:-1])
    f, options = _options(form[1], *constants)
    first = f.layout in (Layout.shift_scale, Layout.shift_scale_interleaved)
    block_b = FEW if batch < MANY_FROM else MANY
    most = PRODUCTS if z.dtype == torch.float32 else PRODUCTS // 2
    block_r = min(MOST_ROWS, tiles.power_of_2(tiles.divide_up(max(1, *widths), passes)), most // (8 * block_b))
    block_k = min(MOST_INPUTS, most // (block_r * block_b), tiles.power_of_2(max(features, *widths)))
    programs, units = tiles.divide_up(batch, block_b), sum(widths)
    active = z.new_empty((programs, units, block_b))
    given = z.new_empty((programs, units, block_b)) if any(i >= 0 for i in residual) else None
    context = _context(contexts, widths, z)
    with tiles.on_device_of(z):
        inverse_kernel[(programs,)](
            z, _joined(weights, [0] * len(weights), z), _joined(biases, [w.shape[0] for w in weights], z), context,
            table, _layers(z.device, features, widths, tuple(residual), passes), active, given, x, total,
            batch, features, units, passes, len(widths), 0 if context is None else context.shape[1],
            *z.stride(), *x.stride(), 0 if context is None else context.shape[1],
            ACTIVATION=activation, LAST_ACTIVE=final_activation, PER=2 if f.map.has_scale else 1,
            SHIFT=0 if first or not f.map.has_scale else 1, SCALE=1 if first else 0, **options,
            DTYPE=tiles.TRITON_DTYPE[z.dtype], BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_B=block_b,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return x, total
