"""Activation norms by their keys: a scale and a shift per channel, in every order and sign that is in use."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    The log-determinant per position is the sum of ``log|s|``. The arithmetic is the original's, in fewer passes.
    """

    shift: str
    scale: str
    shift_first: bool
    sign: int
    power: int
    masked: bool

    def apply(self, module, x, undo, mask, given, wanted):
        shift, scale = _spread(getattr(module, self.shift), x), _spread(getattr(module, self.scale), x)
        power = -self.power if undo else self.power
        if self.scale in RAW:
            s = scale if power == 1 else None
        else:
            s = torch.exp(scale if power == 1 else -scale if power == -1 else power * scale)
        minus = (self.sign < 0) != undo  # the shift is taken off, not put on
        if self.shift_first != undo:
            y = x - shift if minus else x + shift
            y = y / scale if s is None else y * s
        elif s is None:
            y = x / scale
            y = y - shift if minus else y + shift
        else:
            y = torch.addcmul(-shift if minus else shift, x, s)
        if self.masked and mask is not None:
            y = y * mask
        return y, None if wanted == "none" else self._logdet(module, x, undo, mask, wanted)

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
        names = {n for n, p in module._parameters.items() if p is not None}
        pair = next((k for k in KEYS if names == set(k)), None)
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

    def cores(self, module, seen):
        names = set(module._parameters)
        shift, scale = next(k for k in KEYS if names == set(k))
        for masked in (True, False) if any(s.mask is not None for s in seen) else (False,):
            for power in (1, -1) if scale in RAW else (1, -1, 3, -3):
                for first in (True, False):
                    for sign in (1, -1):
                        yield ChannelAffine(shift, scale, first, sign, power, masked)
