"""The forms of a rational-quadratic spline: how a conditioner's raw output becomes bins, heights and slopes.

With ``K`` bins, each element has ``K`` raw widths, ``K`` raw heights and, by ``derivatives``, ``K - 1``, ``K`` or
``K + 1`` raw slopes ``r``:

============  =========================================================  ===================================
sizes         widths (heights alike), of the whole interval              slopes
============  =========================================================  ===================================
``softmax``   ``m + (1 - K m) softmax(prescale * r)``, m the minimum     ``min_derivative + softplus(r)``
``softclip``  ``softmax(clip(prescale * r, c / 2))``                     ``exp(clip(r, c))``
============  =========================================================  ===================================

where ``clip(r, c) = r / (1 + |r| / c)`` and ``c = |ln slope|``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal, get_args

Tails = Literal["linear", "circular", "none"]
Sizes = Literal["softmax", "softclip"]
DerivativesName = Literal["inner", "periodic", "all"]
FEWEST, MOST = 2, 64


class Derivatives(IntEnum):
    inner = 0  # K - 1: at both ends the slope is 1
    periodic = 1  # K: the last knot's is the first's
    all = 2  # K + 1


# Bits of the raw ops' `form`, beside the two of Derivatives.
SOFTCLIP, IDENTITY_OUTSIDE, HALF_TURN, INVERSE, ELEMENTWISE = 4, 8, 16, 32, 64

_BY_TAILS = {"linear": "inner", "circular": "periodic", "none": "all"}


@dataclass(frozen=True)
class Spline:
    """A monotonic rational-quadratic spline from ``[low, high]`` onto ``[bottom, top]`` (see the module's table).

    Args:
        bins: K, 2 to 64.
        tails: outside of the interval ``"linear"`` and ``"circular"`` are the identity, ``"none"`` goes on straight
            with the slope of the end, so that it too is a bijection of the real line.
        low, high: x's interval; bottom, top: y's, by default the same.
        derivatives: ``"inner"`` (K - 1, the ends have slope 1), ``"periodic"`` (K, first and last slope are one) or
            ``"all"`` (K + 1); by default what the tails need: inner, periodic and all, in their order above.
        sizes: ``"softmax"`` as nflows has it, ``"softclip"`` as zuko.
        min_width, min_height: least share of a bin in the interval; min_derivative: least slope. For softmax.
        slope: for softclip: slopes lie between it and its reciprocal.
        prescale: factor on raw widths and heights (nflows: ``1 / sqrt(hidden)``).
        half_turn: x is moved on by half of the interval, modulo its length, first (zuko's circular splines): inside
            the interval a bijection.

    Raises ``ValueError`` for numbers that make no spline. Reference: Durkan et al. 2019 (Neural Spline Flows), section
    3.1; Rezende et al. 2020 (Normalizing Flows on Tori and Spheres) for the periodic one.
    """

    bins: int = 8
    tails: Tails = "linear"
    low: float = -3.0
    high: float = 3.0
    bottom: float | None = None
    top: float | None = None
    derivatives: DerivativesName | None = None
    sizes: Sizes = "softmax"
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    slope: float = 1e-3
    prescale: float = 1.0
    half_turn: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or not FEWEST <= self.bins <= MOST:
            raise ValueError(f"Spline.bins must be a whole number from {FEWEST} to {MOST}, got {self.bins!r}")
        for name, kinds in (("tails", get_args(Tails)), ("sizes", get_args(Sizes))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"unknown Spline.{name} {getattr(self, name)!r}: expected one of {', '.join(kinds)}")
        derivatives = _BY_TAILS[self.tails] if self.derivatives is None else self.derivatives
        if derivatives not in get_args(DerivativesName):
            names = ", ".join(get_args(DerivativesName))
            raise ValueError(f"unknown Spline.derivatives {derivatives!r}: expected one of {names}")
        bottom = self.low if self.bottom is None else self.bottom
        top = self.high if self.top is None else self.top
        for name, value in (("derivatives", derivatives), ("bottom", bottom), ("top", top)):
            object.__setattr__(self, name, value)
        for low, high in (("low", "high"), ("bottom", "top")):
            a, b = getattr(self, low), getattr(self, high)
            if not (math.isfinite(a) and math.isfinite(b) and a < b):
                raise ValueError(f"Spline needs finite {low} < {high}, got {a} and {b}")
        if (self.tails != "none" or self.half_turn) and (self.low, self.high) != (self.bottom, self.top):
            raise ValueError(
                f"x's interval [{self.low}, {self.high}] and y's [{self.bottom}, {self.top}] must be one where the "
                "tails are the identity or with a half turn: leave bottom and top out, or take tails='none'"
            )
        if self.sizes == "softmax":
            for name in ("min_width", "min_height"):
                value = getattr(self, name)
                if not 0 < value * self.bins < 1:
                    raise ValueError(f"Spline.{name} must lie between 0 and 1 / bins = 1 / {self.bins}, got {value}")
            if not (0 < self.min_derivative < 1):
                raise ValueError(f"Spline.min_derivative must lie between 0 and 1, got {self.min_derivative}")
        if not 0 < self.slope < 1:
            raise ValueError(f"Spline.slope must lie between 0 and 1, got {self.slope}")
        if not (math.isfinite(self.prescale) and self.prescale != 0):
            raise ValueError(f"Spline.prescale must be finite and not 0, got {self.prescale}")
        object.__setattr__(self, "packed", self._pack())
        object.__setattr__(self, "_hash", hash((type(self), self.packed)))

    # Every call of the op looks its form up by it.
    packed: ClassVar[tuple]  # made once for each instance: no field
    _hash: ClassVar[int]

    def __hash__(self) -> int:
        return self._hash

    def _pack(self) -> tuple:
        """What the raw ops take, but for the bits of a call: made once, so that a traced call only reads it."""
        softclip = self.sizes == "softclip"
        form = int(Derivatives[self.derivatives]) | SOFTCLIP * softclip | IDENTITY_OUTSIDE * (self.tails != "none")
        form |= HALF_TURN * self.half_turn
        floors = (0.0, 0.0, 0.0) if softclip else (self.min_width, self.min_height, self.min_derivative)
        numbers = (self.low, self.high, self.bottom, self.top, *floors, -math.log(self.slope), self.prescale)
        return self.bins, form, *map(float, numbers)

    # Presets, named after who computes exactly this.

    @staticmethod
    def nflows(bins: int = 10, bound: float = 1.0, prescale: float = 1.0) -> Spline:
        """nflows and normflows with linear tails on ``[-bound, bound]``."""
        return Spline(bins, low=-bound, high=bound, prescale=prescale)

    @staticmethod
    def zuko(bins: int = 8, bound: float = 5.0, slope: float = 1e-3) -> Spline:
        """zuko's MonotonicRQSTransform."""
        return Spline(bins, low=-bound, high=bound, sizes="softclip", slope=slope)

    @staticmethod
    def zuko_circular(bins: int = 8, bound: float = math.pi, slope: float = 1e-3) -> Spline:
        """zuko's CircularRQSTransform: a half turn, then its spline."""
        return Spline(bins, low=-bound, high=bound, sizes="softclip", slope=slope, half_turn=True)

    @staticmethod
    def circular(bins: int = 8, low: float = -math.pi, high: float = math.pi, prescale: float = 1.0) -> Spline:
        """normflows' circular tails: one slope where the ends of the interval meet."""
        return Spline(bins, "circular", low, high, prescale=prescale)

    @staticmethod
    def unit(bins: int = 8, low: float = 0.0, high: float = 1.0) -> Spline:
        """No tails: the unit interval (or ``[low, high]``) onto itself, with all K + 1 slopes free."""
        return Spline(bins, "none", low, high)

    @staticmethod
    def parse(value: Spline | str) -> Spline:
        """A Spline as it is, or a preset by name: ``"nflows"``, ``"zuko"``, ``"zuko_circular"``, ``"circular"``,
        ``"unit"``; ``"linear"`` is ``Spline()``."""
        if isinstance(value, Spline):
            return value
        if value in PRESETS:
            return PRESETS[value]
        raise ValueError(f"unknown spline {value!r}: expected a Spline or one of {', '.join(PRESETS)}")

    @property
    def params_per_element(self) -> int:
        """Raw values per element: 2 K and the slopes."""
        return 2 * self.bins + {"inner": self.bins - 1, "periodic": self.bins, "all": self.bins + 1}[self.derivatives]


PRESETS = {
    "linear": Spline(),
    "nflows": Spline.nflows(),
    "zuko": Spline.zuko(),
    "zuko_circular": Spline.zuko_circular(),
    "circular": Spline.circular(),
    "unit": Spline.unit(),
}
