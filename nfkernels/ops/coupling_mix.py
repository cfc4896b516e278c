"""The public coupling mix op (a coupling and the next step's 1x1 convolution): checks, raw schemas, fakes, autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import coupling_mix as reference
from ..reference.affine_coupling import Form, compute_dtype
from ..reference.scale_map import ScaleMap
from ._layout import canonical, readable
from ._library import define, forced_backend, under_transform
from .affine_coupling import (
    _FLOATS,
    _FORM,
    IdentityName,
    LayoutName,
    OrderName,
    _like,
    affine_coupling,
    check_coupling,
    form_of,
)
from .channel_mix import channel_mix, check_mix

LIMIT = 64  # channels that the fused kernels take: one program holds all of them
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # enum DType in csrc/include/types.h


@dataclass(frozen=True)
class ConditionerInput:
    """The channels ``[start, start + count)`` of an op's output that the next conditioner reads, as that network wants
    them: written beside the output in the same pass, instead of by a slice and a cast after it."""

    start: int
    count: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


# --- raw ops: schema, reference, fake -------------------------------------------------------------------------------


def _composite_forward(x, params, weight, bias, gain, logdet, *rest):
    *form, start, count, dtype, channels_last = rest
    z, logdet = reference.forward(x, params, weight, bias, gain, logdet, Form.unpack(*form))
    z = _like(z, x)
    if count == 0:
        return z, logdet, x.new_empty(0, dtype=DTYPES[dtype])
    return z, logdet, reference.conditioner_input(z, start, count, DTYPES[dtype], channels_last)


def _composite_backward(z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, *rest):
    *form, start, need_dweight, need_dbias, rebuild = rest
    form = Form.unpack(*form)
    dx, dparams, dweight, dbias, dgain = reference.backward(
        z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, start, form
    )
    return (
        _like(dx, z),
        _like(dparams, params),
        dweight if need_dweight else weight.new_empty(0),
        dbias if need_dbias else weight.new_empty(0),
        dgain,
        _like(reference.rebuild(z, params, inverse, bias, gain, form), z) if rebuild else z.new_empty(0),
    )


def _fake_forward(x, params, weight, bias, gain, logdet, *rest):
    *_, count, dtype, channels_last = rest
    if count == 0:
        extra = x.new_empty(0, dtype=DTYPES[dtype])
    else:
        extra = reference.empty_conditioner_input(x, count, DTYPES[dtype], channels_last)
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x)), extra


def _fake_backward(z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, *rest):
    need_dweight, need_dbias, rebuild = rest[-3:]
    return (
        torch.empty_like(z),
        torch.empty_like(params),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape[0] if need_dbias else 0),
        weight.new_empty(0 if gain is None else gain.shape[0]),
        torch.empty_like(z) if rebuild else z.new_empty(0),
    )


_forward = define(
    "_coupling_mix_forward",
    "(Tensor x, Tensor params, Tensor weight, Tensor? bias, Tensor? gain, Tensor? logdet,"
    f" {_FORM}, int extra_start, int extra_count, int extra_dtype, bool extra_channels_last)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_composite_forward,
    fake=_fake_forward,
)
_backward = define(
    "_coupling_mix_backward",
    "(Tensor z, Tensor params, Tensor weight, Tensor inverse, Tensor? bias, Tensor? dz, Tensor? dlogdet,"
    f" Tensor? dextra, Tensor? gain, {_FORM}, int extra_start, bool need_dweight, bool need_dbias, bool rebuild)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_composite_backward,
    fake=_fake_backward,
)


# --- autograd -------------------------------------------------------------------------------------------------------


class _CouplingMix(torch.autograd.Function):
    """Saves the output, params and the small tensors: the data between coupling and mix is ``inverse @ (z - bias)``."""

    @staticmethod
    def forward(ctx: Any, x, params, weight, bias, inverse, gain, logdet, form, extra):
        z, total, part = _forward(x, params, weight, bias, gain, logdet, *form, *extra)
        ctx.save_for_backward(z, params, weight, inverse, bias, gain)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.start, ctx.count = form, extra[0], extra[1]
        ctx.backend = forced_backend()
        ctx.running = logdet is not None
        return z, total, part

    @staticmethod
    def backward(ctx: Any, dz, dlogdet, dextra):
        z, params, weight, inverse, bias, gain = ctx.saved_tensors
        need = ctx.needs_input_grad
        if ctx.count == 0:
            dextra = None
        if dz is None and dlogdet is None and dextra is None:
            return (None,) * 9
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or under_transform():
            # Second derivatives see the inverse as the weight's function, which the one that was given need not be.
            grads = reference.backward(
                z, params, weight, reference.inverse_of(weight), bias, dz, dlogdet, dextra, gain, ctx.start,
                Form.unpack(*ctx.form),
            )  # fmt: skip
        else:
            dz, dextra = (None if t is None else readable(t) for t in (dz, dextra))
            grads = _backward.on(
                ctx.backend, z, params, weight, inverse, bias, dz, dlogdet, dextra, gain, *ctx.form, ctx.start,
                need[2], need[3], False,
            )[:5]  # fmt: skip
        dx, dparams, dweight, dbias, dgain = grads
        return (
            dx, dparams, dweight if need[2] else None, dbias if need[3] else None, None,
            dgain if gain is not None else None, dlogdet if ctx.running else None, None, None,
        )  # fmt: skip


# --- public ---------------------------------------------------------------------------------------------------------


def coupling_mix(
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inverse_weight: Tensor | None = None,
    scale_map: ScaleMap | str = "glow",
    layout: LayoutName = "shift_scale",
    order: OrderName = "scale_first",
    identity: IdentityName = "first",
    gain: Tensor | None = None,
    logdet: Tensor | None = None,
    extra: ConditionerInput | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """An affine coupling and the channel mix that follows it, one pass: ``z = weight @ coupling(x) + bias``.

    What :func:`~nfkernels.affine_coupling` and then :func:`~nfkernels.channel_mix` compute, without the tensor between
    them: a Glow step's coupling with the next step's actnorm and 1x1 convolution (folded into weight and bias).

    Args:
        x: data, ``[B, C, *spatial]``, float32, float64, bfloat16 or float16; contiguous, channels-last or sliced.
        params: the conditioner's raw output, ``[B, 2 * Ct, *spatial]`` for ``Ct`` transformed channels
            (``[B, Ct, ...]`` for the additive map), in x's dtype or a narrower one, in any layout.
        weight: ``[C, C]``, invertible. The product is computed in float32 (float64 for float64 x), autocast or not.
        bias: ``[C]`` or None.
        inverse_weight: ``weight``'s inverse, where the caller has it (an LU layer does); only the backward reads it.
            It is taken as it is and gets no gradient: all of that goes to weight. Without it the inverse is made
            here, by an LU factorisation each time a gradient may be wanted. A singular weight gives infinite or NaN
            gradients, not an error.
        scale_map, layout, order, identity, gain: the coupling's options, as for :func:`~nfkernels.affine_coupling`.
        logdet: running log-determinant ``[B]`` that the coupling's is added to.
        extra: channels of z to write a second time, in the dtype and layout that the next conditioner reads.

    Returns:
        ``(z, logdet)``, or ``(z, logdet, part)`` with ``extra``: z shaped, typed and laid out like x; logdet ``[B]``,
        float32 (float64 for float64 x), of the coupling alone: the mix's, ``P * log|det weight|`` for P positions,
        follows from the weight and is the caller's; part ``[B, count, *spatial]``, a tensor of its own.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.

    Cost: O(B C^2 P) operations; one read of x and params, one write of z. The backward keeps z and params, not x, and
    finds the data between the two as ``weight^-1 (z - bias)``, whose rounding error is up to ``cond(weight)`` times
    z's: gradients lose as many digits (none worth the name for the near-orthogonal weights that flows train). Above
    64 channels the two ops run one after the other. Reference: Kingma & Dhariwal 2018 (Glow), table 1.
    """
    form, packed = form_of(scale_map, layout, order, identity, False)
    check_coupling(x, params, form, None, None, gain, logdet)
    check_mix(x, weight, bias)
    _check(x, inverse_weight, extra)
    if x.shape[1] > LIMIT:
        y, logdet = affine_coupling(
            x, params, scale_map=scale_map, layout=layout, order=order, identity=identity, gain=gain, logdet=logdet
        )
        return _with_part(channel_mix(y, weight, bias), logdet, extra)
    dtype = compute_dtype(x)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    if under_transform():
        return _with_part(*reference.forward(x, params, weight, bias, gain, logdet, form), extra)
    x, params, weight = canonical(x), canonical(params), weight.contiguous()
    gain = None if gain is None else gain.contiguous()
    e = extra or ConditionerInput(0, 0)
    wanted = (e.start, e.count, DTYPES.index(e.dtype), e.channels_last)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, params, weight, bias, gain, logdet)
    ):
        with torch.no_grad():
            inverse = reference.inverse_of(weight) if inverse_weight is None else inverse_weight.to(dtype)
        inverse = inverse.contiguous()
        z, total, part = _CouplingMix.apply(x, params, weight, bias, inverse, gain, logdet, packed, wanted)
    else:
        z, total, part = _forward(x, params, weight, bias, gain, logdet, *packed, *wanted)
    return (z, total) if extra is None else (z, total, part)


def _with_part(z: Tensor, logdet: Tensor, extra: ConditionerInput | None):
    if extra is None:
        return z, logdet
    return z, logdet, reference.conditioner_input(z, extra.start, extra.count, extra.dtype, extra.channels_last)


def _check(x: Tensor, inverse: Tensor | None, extra: ConditionerInput | None) -> None:
    channels = x.shape[1]
    if inverse is not None and inverse.shape != (channels, channels):
        raise ValueError(f"inverse_weight must be [{channels}, {channels}], got {tuple(inverse.shape)}")
    if inverse is not None and inverse.device != x.device:
        raise ValueError(f"inverse_weight is on {inverse.device} but x is on {x.device}")
    if extra is not None:
        if extra.dtype not in _FLOATS:
            raise ValueError(f"extra.dtype must be floating point, got {extra.dtype}")
        if extra.count < 1 or extra.start < 0 or extra.start + extra.count > channels:
            raise ValueError(
                f"extra asks for channels {extra.start} to {extra.start + extra.count} of z, which has {channels}"
            )
