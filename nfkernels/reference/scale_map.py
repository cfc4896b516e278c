"""The scale maps of affine couplings: how a conditioner's raw output becomes a positive scale.

Every library picks its own map. They are one family here: with ``a = prescale * r + offset``,

=============  ======================================================
kind           scale
=============  ======================================================
``additive``   ``s = 1`` (the conditioner gives shifts only)
``exp``        ``log s = gain * clip(a, -clamp, clamp)``
``sigmoid``    ``s = gain * sigmoid(a) + eps``
``tanh``       ``log s = gain * clamp * tanh(a)``
``atan``       ``log s = gain * clamp * atan(a)``
``softplus``   ``s = min(gain * softplus(a) + eps, clamp)``
``softclip``   ``log s = gain * a / (1 + |a| / clamp)``
=============  ======================================================

and ``reciprocal`` takes ``1 / s``. A gain tensor, one learned factor per channel, multiplies ``gain``. With
``scaled_shift`` the prescale acts on the whole of the raw output, the shift included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["additive", "exp", "sigmoid", "tanh", "atan", "softplus", "softclip"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Below this, softplus(a) = e^a to working precision and its logarithm is taken from a series.
SOFTPLUS_TAIL = -15.0


@dataclass(frozen=True)
class ScaleMap:
    """How a raw conditioner output ``r`` becomes the scale ``s > 0`` of an affine coupling (see the module's table).

    ``clamp`` is ``inf`` where nothing clips; ``tanh``, ``atan`` and ``softclip`` need a finite one.
    Raises ``ValueError`` for an unknown kind or a constant that cannot give a positive scale.
    """

    kind: Kind = "exp"
    prescale: float = 1.0
    offset: float = 0.0
    gain: float = 1.0
    clamp: float = math.inf
    eps: float = 0.0
    reciprocal: bool = False
    scaled_shift: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown scale map {self.kind!r}: expected one of {', '.join(KINDS)}")
        for name in ("prescale", "offset", "gain", "eps"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"ScaleMap.{name} must be finite, got {getattr(self, name)}")
        if not self.clamp > 0:
            raise ValueError(f"ScaleMap.clamp must be positive, got {self.clamp}")
        if self.kind in ("tanh", "atan", "softclip") and not math.isfinite(self.clamp):
            raise ValueError(
                f"the {self.kind} map needs a finite clamp, for example ScaleMap({self.kind!r}, clamp=2.0)"
            )
        if self.eps < 0:
            raise ValueError(f"ScaleMap.eps must not be negative, got {self.eps}")
        if self.kind in ("sigmoid", "softplus") and self.gain <= 0:
            raise ValueError(f"the {self.kind} map needs a positive gain, got {self.gain}")
        numbers = (self.prescale, self.offset, self.gain, self.clamp, self.eps)
        flags = f"{self.reciprocal:d}{self.scaled_shift:d}"
        object.__setattr__(self, "text", " ".join([self.kind, *map(repr, map(float, numbers)), flags]))

    # Presets, named after who computes exactly this.

    @staticmethod
    def additive() -> ScaleMap:
        """NICE (Dinh et al. 2014): shift only, volume preserving."""
        return ScaleMap("additive")

    @staticmethod
    def exp() -> ScaleMap:
        """RealNVP (Dinh et al. 2017) without a clamp: ``s = exp(r)``."""
        return ScaleMap("exp")

    @staticmethod
    def glow() -> ScaleMap:
        """Glow (Kingma & Dhariwal 2018): ``s = sigmoid(r + 2)``."""
        return ScaleMap("sigmoid", offset=2.0)

    @staticmethod
    def nflows() -> ScaleMap:
        """nflows' default: ``s = sigmoid(r + 2) + 1e-3``."""
        return ScaleMap("sigmoid", offset=2.0, eps=1e-3)

    @staticmethod
    def nflows_softplus() -> ScaleMap:
        """nflows' general activation: ``s = clamp(softplus(r) + 1e-3, 0, 3)``."""
        return ScaleMap("softplus", eps=1e-3, clamp=3.0)

    @staticmethod
    def freia(c: float = 2.0) -> ScaleMap:
        """FrEIA's GLOWCouplingBlock: ``log s = c * 0.636 * atan(r)``."""
        return ScaleMap("atan", clamp=0.636 * c)

    @staticmethod
    def freia_all_in_one(c: float = 2.0) -> ScaleMap:
        """FrEIA's AllInOneBlock: ``log s = c * tanh(r / 10)`` and the shift ``t / 10``, of the raw r and t."""
        return ScaleMap("tanh", prescale=0.1, clamp=c, scaled_shift=True)

    @staticmethod
    def realnvp(c: float = 1.0) -> ScaleMap:
        """``log s = c * tanh(r)``; with a learned gain tensor this is RealNVP's ``scale * tanh(r)``."""
        return ScaleMap("tanh", clamp=c)

    @staticmethod
    def zuko(slope: float = 1e-3) -> ScaleMap:
        """zuko's MonotonicAffineTransform: ``log s = r / (1 + |r / ln(slope)|)``."""
        return ScaleMap("softclip", clamp=abs(math.log(slope)))

    @staticmethod
    def parse(value: ScaleMap | str) -> ScaleMap:
        """A ScaleMap as it is, or a preset by name: ``"glow"``, ``"exp"``, ``"additive"``, ``"nflows"`` ..."""
        if isinstance(value, ScaleMap):
            return value
        if isinstance(value, str) and value in PRESETS:
            return getattr(ScaleMap, value)()
        raise ValueError(f"unknown scale map {value!r}: expected a ScaleMap or one of {', '.join(PRESETS)}")

    @staticmethod
    def from_text(text: str) -> ScaleMap:
        """The map that has this ``text``: how a map travels through ``torch.compile``, which makes an object's floats
        symbolic (with ``dynamic=True``) but never a string."""
        kind: Any
        kind, *numbers, flags = text.split(" ")
        prescale, offset, gain, clamp, eps = [float(n) for n in numbers]
        return ScaleMap(kind, prescale, offset, gain, clamp, eps, flags[0] == "1", flags[1] == "1")

    @property
    def has_scale(self) -> bool:
        """Whether the conditioner gives a raw scale at all (``additive`` gives shifts only)."""
        return self.kind != "additive"


PRESETS = ("additive", "exp", "glow", "nflows", "nflows_softplus", "freia", "realnvp", "zuko")
PRESET_TEXT: dict[str, str] = {name: getattr(ScaleMap, name)().text for name in PRESETS}


def log_scale(m: ScaleMap, r: Tensor, gain: Tensor | None = None) -> Tensor:
    """``log s`` for raw values ``r`` (any shape; ``gain`` broadcastable), by the stablest formula of each map."""
    a = r * m.prescale + m.offset
    k = m.gain if gain is None else m.gain * gain
    if m.kind == "exp":
        log_s = k * (a.clamp(-m.clamp, m.clamp) if math.isfinite(m.clamp) else a)
    elif m.kind == "tanh":
        log_s = k * (m.clamp * torch.tanh(a))
    elif m.kind == "atan":
        log_s = k * (m.clamp * torch.atan(a))
    elif m.kind == "softclip":
        log_s = k * (a / (1 + a.abs() / m.clamp))
    elif m.kind == "sigmoid":
        log_s = _log(k, F.logsigmoid(a)) if m.eps == 0 else torch.log(k * torch.sigmoid(a) + m.eps)
    elif m.kind == "softplus":
        if m.eps == 0:
            u = torch.exp(a.clamp(max=SOFTPLUS_TAIL))
            tail = a - u / 2 + 5 * u * u / 24
            log_s = _log(k, torch.where(a < SOFTPLUS_TAIL, tail, torch.log(_softplus(a.clamp(min=SOFTPLUS_TAIL)))))
        else:
            log_s = torch.log(k * _softplus(a) + m.eps)
        if math.isfinite(m.clamp):
            log_s = log_s.clamp(max=math.log(m.clamp))
    else:
        log_s = torch.zeros_like(r)
    return -log_s if m.reciprocal else log_s


def scale(m: ScaleMap, r: Tensor, gain: Tensor | None = None) -> Tensor:
    """The scale ``s`` itself: through the sigmoid where that is the map, else ``exp(log s)``."""
    if m.kind == "sigmoid":
        s = (m.gain if gain is None else m.gain * gain) * torch.sigmoid(r * m.prescale + m.offset) + m.eps
        return 1 / s if m.reciprocal else s
    return torch.exp(log_scale(m, r, gain))


def log_scale_derivatives(m: ScaleMap, r: Tensor, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``d log s / d r`` and ``d log s / d gain`` (of the gain tensor), in closed form and without cancellation."""
    a = r * m.prescale + m.offset
    k = m.gain if gain is None else m.gain * gain
    one = torch.ones_like(a)
    if m.kind == "exp":
        inside = (a.abs() <= m.clamp).to(a.dtype) if math.isfinite(m.clamp) else one
        value, slope = a.clamp(-m.clamp, m.clamp) if math.isfinite(m.clamp) else a, inside
        d, dg = k * slope, m.gain * value
    elif m.kind == "tanh":
        u = torch.exp(-2 * a.abs())  # 1 - tanh^2 = 4u / (1 + u)^2 keeps its digits where tanh saturates
        d, dg = k * (m.clamp * (4 * u / (1 + u) ** 2)), m.gain * (m.clamp * torch.tanh(a))
    elif m.kind == "atan":
        d, dg = k * (m.clamp / (1 + a * a)), m.gain * (m.clamp * torch.atan(a))
    elif m.kind == "softclip":
        q = 1 + a.abs() / m.clamp
        d, dg = k / (q * q), m.gain * (a / q)
    elif m.kind == "sigmoid":
        if m.eps == 0:
            d, dg = torch.sigmoid(-a), _reciprocal(gain, one)
        else:
            p = torch.sigmoid(a)
            s = k * p + m.eps
            d, dg = k * p * torch.sigmoid(-a) / s, m.gain * p / s
    elif m.kind == "softplus":
        if m.eps == 0:
            u = torch.exp(a.clamp(max=SOFTPLUS_TAIL))
            body = a.clamp(min=SOFTPLUS_TAIL)
            d = torch.where(a < SOFTPLUS_TAIL, 1 - u / 2, torch.sigmoid(body) / _softplus(body))
            dg = _reciprocal(gain, one)
        else:
            s = k * _softplus(a) + m.eps
            d, dg = k * torch.sigmoid(a) / s, m.gain * _softplus(a) / s
        if math.isfinite(m.clamp):
            inside = (k * _softplus(a) + m.eps <= m.clamp).to(a.dtype)
            d, dg = d * inside, dg * inside
    else:
        d = dg = torch.zeros_like(a)
    d = d * m.prescale
    return (-d, -dg) if m.reciprocal else (d, dg)


def _softplus(a: Tensor) -> Tensor:
    # Not clamp + log1p(exp(-|a|)): autograd would take 1, not 1/2, for its slope at 0, where new conditioners start.
    return -F.logsigmoid(-a)


def _log(k: float | Tensor, rest: Tensor) -> Tensor:
    if isinstance(k, Tensor):
        return torch.log(k) + rest
    return rest if k == 1 else math.log(k) + rest


def _reciprocal(gain: Tensor | None, one: Tensor) -> Tensor:
    return one if gain is None else one / gain
