"""Invertible 1x1 convolutions by their keys: the matrix whole, in LU factors, of reflections, or shared by groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...nn.linear_bijection import inverse_of
from ...nn.orthogonal import reflection_factors, rotation
from ...ops import channel_mix, lu_compose
from ...reference.lu_compose import no_autocast
from ..registry import register
from .actnorm import constant_logdet
from .family import Core, Family, Seen


@dataclass(frozen=True)
class Factors:
    """Keys of ``W = P (L + I) (U + diag(s))``: s is ``sign * exp(log_s)``, or raw where there is no sign."""

    permutation: str
    lower: str
    upper: str
    diagonal: str
    sign: str | None
    others: frozenset[str] = frozenset()  # masks and identities, which must be what their names say


FACTORS = (
    Factors("w_p", "w_l", "w_u", "w_s", "s_sign", frozenset({"u_mask", "l_mask", "l_eye"})),
    Factors("p", "lower", "upper", "log_s", "sign_s"),
    Factors("p", "lower", "upper", "log_s", "sign_s", frozenset({"l_mask", "eye"})),
    Factors("p", "l", "u", "log_s", "sign_s"),
    Factors("p", "l", "u", "log_s", "sign_s", frozenset({"l_mask", "eye"})),
    Factors("P", "L", "U", "log_S", "sign_S", frozenset({"eye"})),
    Factors("p", "lower", "upper", "upper_diag", None, frozenset({"lower_diag"})),
)


# --- where the matrix comes from: (W or None, its inverse or None, log|det W| or None) -------------------------------


def _whole(core: Mix, module: nn.Module, undo: bool, logdet: bool) -> tuple:
    weight = _weight(module, core.source)
    weight = weight if weight.dim() == 2 else weight.flatten(1)
    total = None
    with no_autocast(weight.device.type):
        if logdet:
            total = torch.linalg.slogdet(weight.double())[1].to(torch.float32 if core.rounded else weight.dtype)
        if not undo:
            return weight, None, total
        if core.narrow:  # as the original has it
            return None, torch.linalg.inv_ex(weight.float())[0].to(weight.dtype), total
        return None, inverse_of(weight.double()), total


def _factored(core: Mix, module: nn.Module, undo: bool, logdet: bool) -> tuple:
    source = core.source
    diagonal = getattr(module, source.diagonal)
    if source.sign is None:
        log_s, sign = diagonal.abs().log(), diagonal.detach().sign()
    else:
        log_s, sign = diagonal, getattr(module, source.sign)
    return lu_compose(
        getattr(module, source.lower), getattr(module, source.upper), log_s, sign=sign,
        permutation=getattr(module, source.permutation).argmax(-1), inverse=undo, weight=not undo,
    )  # fmt: skip


def _reflections(core: Mix, module: nn.Module, undo: bool, logdet: bool) -> tuple:
    q = rotation(*reflection_factors(getattr(module, core.source), "layer"))
    return (None, q.mT, None) if undo else (q, None, None)


def _weight(module: nn.Module, source: str) -> Tensor:
    return module.conv.weight if source == "conv" else getattr(module, source)


MATRICES: dict[str, Callable] = {"whole": _whole, "factored": _factored, "reflections": _reflections}


@dataclass(frozen=True)
class Mix(Core):
    """``y[b, :, p] = W x[b, :, p]``, or with the transpose of W. ``groups``: of Glow-TTS, c channels at a time, half of
    them from each half of the data. ``narrow``, ``rounded``: W's inverse, its log-determinant are float32 always.
    ``signed``: the original's log-determinant is NaN where det W < 0."""

    kind: str
    source: object
    channels: int
    transposed: bool = False
    groups: int = 0
    masked: bool = False
    narrow: bool = False
    rounded: bool = False
    signed: bool = False

    def fits(self, x):
        if self.groups:
            return x.dim() == 3 and x.shape[1] % self.groups == 0
        return x.dim() > 1 and x.shape[1] == self.channels

    def apply(self, module, x, undo, mask, given, wanted):
        weight, inverse, total = MATRICES[self.kind](self, module, undo, wanted != "none")
        matrix = inverse if undo else weight
        matrix = matrix.mT if self.transposed else matrix
        y = self._grouped(x, matrix) if self.groups else channel_mix(x, matrix)
        mask = mask if self.masked else None
        if mask is not None:
            y = y * mask
        if wanted == "none" or total is None:
            return y, None
        times = (x.shape[1] // self.groups if self.groups else 1) * (-1 if undo else 1)
        return y, constant_logdet(total, times, x, mask, wanted)

    def _grouped(self, x: Tensor, matrix: Tensor) -> Tensor:
        b, c, t = x.shape
        n, m = self.groups, c // self.groups
        split = x.reshape(b, 2, m, n // 2, t).transpose(2, 3).reshape(b, n, m * t)
        return channel_mix(split, matrix).view(b, 2, n // 2, m, t).transpose(2, 3).reshape(b, c, t)


def _own(module: nn.Module) -> tuple[dict, dict, list[str]]:
    """Its parameters, buffers and submodules, without empty places; tensors that are plain attributes are buffers."""
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    buffers = {n: b for n, b in module._buffers.items() if b is not None}
    return parameters, buffers, [n for n, m in module._modules.items() if m is not None]


def _square(t: Tensor) -> bool:
    return t.dim() >= 2 and t.shape[0] == t.shape[1] and t.numel() == t.shape[0] ** 2


@register()
class Mixes(Family):
    """The matrices of rosinality, chrischute, y0ast, SurVAE, FInCFlow, WaveGlow, RAD-TTS, NeMo and Glow-TTS.

    WaveGlow's ``torch.logdet`` is NaN where det W < 0, and the inverse it keeps (``W_inverse``, ``weight_inv``) is
    stale once W has been trained. What replaces it gives log|det W|, and inverts the W of the day.
    """

    unknown = "looks like an invertible 1x1 convolution by its keys, but computes no known form of one"
    bypassed = ("conv",)
    caches = ("W_inverse", "weight_inv")

    def looks_like(self, module):
        return next(self._sources(module), None) is not None

    def _sources(self, module: nn.Module) -> Iterator[tuple[str, object, int]]:
        parameters, buffers, children = _own(module)
        if children == ["conv"] and not parameters and not buffers:
            conv = module._modules["conv"]
            if type(conv) in (nn.Conv1d, nn.Conv2d) and set(_own(conv)[0]) == {"weight"} and _square(conv.weight):
                yield "whole", "conv", conv.weight.shape[0]
        elif not children and len(parameters) == 1 and not buffers:
            ((name, p),) = parameters.items()
            if name in ("weight", "W") and _square(p):
                yield "whole", name, p.shape[0]
            if name == "V" and p.dim() == 2:
                yield "reflections", name, p.shape[1]
        elif not children:
            for f in FACTORS:
                trained, fixed = {f.lower, f.upper, f.diagonal}, {f.permutation, *f.others} | {f.sign} - {None}
                shape = parameters[f.lower].shape if f.lower in parameters else ()
                if set(parameters) == trained and set(buffers) == fixed and len(shape) == 2 and shape[0] == shape[1]:
                    yield "factored", f, shape[0]

    def refuse(self, module):
        for kind, f, channels in self._sources(module):
            if kind != "factored":
                continue
            p = getattr(module, f.permutation)
            if p.is_meta:
                return f"its {f.permutation} has no values yet (meta device)"
            ones = ((p == 1).sum(0) == 1).all() & ((p == 1).sum(1) == 1).all()
            if p.shape != (channels, channels) or not bool(ones & ((p == 0) | (p == 1)).all()):
                return f"its {f.permutation} is no permutation"
            if "lower_diag" in f.others and not bool((module.lower_diag == 1).all()):
                return "the diagonal of its lower factor is not 1"
            if f.sign is not None and not bool((getattr(module, f.sign).abs() == 1).all()):
                return f"its {f.sign} is not +1 and -1"
        return None

    def disturb(self, module, generator):
        super().disturb(module, generator)
        for name in self.caches:
            vars(module).pop(name, None)  # of another matrix than this one
        for kind, source, _ in self._sources(module):
            if kind == "whole" and _determinant(_weight(module, source)) < 0:
                _turn(_weight(module, source))  # to where torch.logdet is a number

    def stretch(self, module, generator):
        for kind, f, _ in self._sources(module):
            if kind == "factored" and f.sign is not None:
                log_s = module._parameters[f.diagonal]
                with torch.no_grad():
                    log_s.copy_((12 * torch.rand(log_s.shape, generator=generator) - 6).to(log_s))

    def remarks(self, module):
        found, core = [], self.form.core
        if vars(module).keys() & set(self.caches):
            found.append("the inverse it kept is not used: it would be stale after training")
        if core.signed and _determinant(_weight(module, core.source)) < 0:
            found.append("det W < 0: its log-determinant was NaN, now it is log|det W|")
        return found

    def cores(self, module, seen):
        split = vars(module).get("n_split")
        masks = (True, False) if any(s.mask is not None for s in seen) else (False,)
        for kind, source, channels in self._sources(module):
            groups = channels if isinstance(split, int) and split == channels and not split % 2 else 0
            whole = kind == "whole"
            signed = whole and _is_signed(module, source, seen[0])
            both = (False, True)
            for masked, rounded, narrow, transposed in itertools.product(
                masks, *[both if whole else (False,)] * 2, both
            ):
                yield Mix(kind, source, channels, transposed, groups, masked, narrow, rounded, signed)


def _determinant(weight: Tensor) -> float:
    return float(torch.linalg.det(weight.detach().flatten(1).double()))


@torch.no_grad()
def _turn(weight: Tensor) -> None:
    """Changes the sign of det W and nothing else of it."""
    weight[0] *= -1


def _is_signed(module: nn.Module, source: str, seen: Seen) -> bool:
    """Whether the module's log-determinant is NaN where det W < 0."""
    weight, second = _weight(module, source), seen.second
    if not isinstance(second, Tensor):
        return False
    _turn(weight)
    try:
        out = getattr(module, seen.method.name)(**seen.given)
    finally:
        _turn(weight)
    return isinstance(out, tuple) and isinstance(out[1], Tensor) and bool(out[1].isnan().any() & ~second.isnan().any())
