"""Activation norms by their keys: a scale and a shift per channel, in every order and sign that is in use."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops import channel_affine
from ..registry import register
from ..swap import original_of
from .family import Core, Family

# (shift, scale): the names in use; a scale named in RAW is one, any other is a logarithm.
KEYS = (
    ("loc", "scale"), ("bias", "logs"), ("m", "logs"), ("shift", "log_scale"), ("translation", "log_scale"),
    ("loc", "log_scale"), ("bias", "log_scale"), ("b", "logs"), ("t", "s"), ("shift", "scale"), ("bias", "scale"),
)  # fmt: skip
RAW = ("scale",)
FLAGS = ("initialized", "is_initialized", "inited", "_initialized", "is_inited")


@dataclass(frozen=True)
class ChannelAffine(Core):
    """``(x + sign * shift) * s`` or, ``shift_first`` being False, ``x * s + sign * shift``; ``s = exp(power *
    log_scale)``, or the scale itself (its reciprocal for a power of -1). ``masked``: what is outside of it is zero.
    ``exact``: the shift comes first as it does in the original, for data so far from zero that ``x s + shift s`` would
    lose digits.

    The log-determinant per position is the sum of ``log|s|``.
    """

    shift: str
    scale: str
    shift_first: bool
    sign: int
    power: int
    masked: bool
    exact: bool = False

    def apply(self, module, x, undo, mask, given, wanted):
        shift, scale = getattr(module, self.shift), getattr(module, self.scale)
        minus = (self.sign < 0) != undo  # the shift is taken off, not put on
        shift_first = self.shift_first != undo
        if x.dim() > 2 and x.dtype == scale.dtype and not (self.exact and shift_first):
            shift, s = shift.view(-1), self._scale(scale.view(-1), undo)
            shift = shift * s if shift_first else shift
            y = channel_affine(x, s, -shift if minus else shift)
        else:  # a table is bound by the number of calls
            shift, s = _spread(shift, x), self._scale(_spread(scale, x), undo)
            if shift_first:
                y = (x - shift if minus else x + shift) * s
            else:
                y = torch.addcmul(-shift if minus else shift, x, s)
        if self.masked and mask is not None:
            y = y * mask
        return y, None if wanted == "none" else self._logdet(module, x, undo, mask, wanted)

    def _scale(self, scale: Tensor, undo: bool) -> Tensor:
        power = -self.power if undo else self.power
        if self.scale in RAW:
            return scale if power == 1 else scale.reciprocal()
        return torch.exp(scale if power == 1 else -scale if power == -1 else power * scale)

    def _logdet(self, module: nn.Module, x: Tensor, undo: bool, mask: Tensor | None, wanted: str) -> Tensor:
        scale = getattr(module, self.scale)
        total = scale.abs().log().sum() if self.scale in RAW else scale.sum()
        return constant_logdet(total, -self.power if undo else self.power, x, mask if self.masked else None, wanted)


def constant_logdet(total: Tensor, times: float, x: Tensor, mask: Tensor | None, factor: str) -> Tensor:
    """The log-determinant of a layer whose Jacobian is one at every position: ``times * total`` of them."""
    if factor == "batch":
        if mask is not None:
            lengths = mask.sum((1, 2))
            return total * (lengths if times == 1 else times * lengths)
        # A tensor of its own: some callers add to it in place.
        return total * torch.full((x.shape[0],), times * math.prod(x.shape[2:]), dtype=total.dtype, device=x.device)
    if factor == "one_batch":
        return total * torch.full((x.shape[0],), times, dtype=total.dtype, device=x.device)
    count = {"positions": math.prod(x.shape[2:]), "batch_positions": x.shape[0] * math.prod(x.shape[2:]), "one": 1}
    times = times * count[factor]
    return total if times == 1 else total * times


def _spread(p: Tensor, x: Tensor) -> Tensor:
    return p if p.dim() > 1 or x.dim() == 2 else p.view(-1, *[1] * (x.dim() - 2))


def _keys(module: nn.Module) -> tuple[str, str] | None:
    names = {n for n, p in module._parameters.items() if p is not None}
    return next((k for k in KEYS if names == set(k)), None)


def flag_of(module: nn.Module) -> bool | None:
    """Whether the first batch has been seen; None for a layer without a flag."""
    for name in FLAGS:
        flag = module._buffers.get(name)
        if flag is not None:
            return bool(flag.any())
        if isinstance(vars(module).get(name), bool):
            return vars(module)[name]
    return None


@functools.cache
def _watched(live: type, flag: str) -> type:
    """A flag that is a plain attribute costs nothing to look at, and some callers set it back."""

    def watched(name: str):
        def method(self, *args, **kwargs):
            if not getattr(self, flag):
                return getattr(original_of(type(self)), name)(self, *args, **kwargs)
            return getattr(super(layer, self), name)(*args, **kwargs)

        method.__name__ = name
        return method

    layer = type("Layer", (live,), {name: watched(name) for name in live._methods})
    return layer


@register()
class ActNorms(Family):
    """rosinality, chrischute, y0ast, SurVAE, FInCFlow, Glow-TTS, VITS' ElementwiseAffine, and who writes alike."""

    unknown = "looks like an ActNorm by its keys, but computes no known form of one"

    def looks_like(self, module):
        pair = _keys(module)
        if pair is None or any(m is not None for m in module._modules.values()):
            return False
        if any(b is not None and n not in FLAGS for n, b in module._buffers.items()):
            return False
        a, b = (module._parameters[n] for n in pair)
        channels = max(a.shape, default=0)
        return a.shape == b.shape and a.dim() in range(1, 5) and a.numel() == channels

    def ready(self, module):
        return flag_of(module) is not False

    def layer(self, module):
        live = super().layer(module)
        name = next((n for n in FLAGS if isinstance(vars(module).get(n), bool)), None)
        return live if name is None or not self.ready(module) else _watched(live, name)

    def disturb(self, module, generator):
        """The shift by little: whether digits are lost depends on its place."""
        shift = module._parameters[_keys(module)[0]]
        before = shift.detach().clone()
        super().disturb(module, generator)
        with torch.no_grad():
            shift.copy_(before + 0.05 * torch.randn(shift.shape, generator=generator).to(shift))

    def stretch(self, module, generator):
        scale = _keys(module)[1]
        far = 16 * torch.rand(module._parameters[scale].shape, generator=generator) - 8
        with torch.no_grad():
            p = module._parameters[scale]
            p.copy_((far.exp() * p.sign().to(far) if scale in RAW else far).to(p))

    def cores(self, module, seen):
        shift, scale = _keys(module)
        masks = (True, False) if any(s.mask is not None for s in seen) else (False,)
        powers = (1, -1) if scale in RAW else (1, -1, 3, -3)
        for exact, masked, power in itertools.product((False, True), masks, powers):
            for first, sign in itertools.product((True, False), (1, -1)):
                yield ChannelAffine(shift, scale, first, sign, power, masked, exact)
