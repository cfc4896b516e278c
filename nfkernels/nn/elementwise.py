"""One-dimensional changes of variables, the same one for every number of a sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.affine_coupling import compute_dtype
from .bijection import Bijection, check_floating, reads_values, valid_mask
from .standardize import fit_to_sample


class Interval(NamedTuple):
    """An open interval of numbers, some number inside it, and words (its ends go in) for those who give others."""

    low: float
    high: float
    inside: float
    words: str = ""
    advice: str = ""


REAL = Interval(-math.inf, math.inf, 0.0)
POSITIVE = Interval(0.0, math.inf, 1.0, "positive data", "shift it, or keep it away from 0")
SYMMETRIC = Interval(-1.0, 1.0, 0.0, "data inside ({low:.3g}, {high:.3g})", "scale it, or keep it away from the ends")

# x -> f(x), log|f'(x)|, both elementwise
Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class Elementwise(Bijection):
    """``y_i = f(x_i)`` on data of any shape ``[B, ...]``; logdet ``sum_i log|f'(x_i)|``. Cost O(d).

    A subclass has f as ``_forward`` and its inverse as ``_inverse``, each of which returns the value and the logarithm
    of its own derivative, and says between which intervals f goes. bfloat16 and float16 data are computed in float32.
    With ``lengths`` padding stays zero and counts nothing. Data outside the interval (its ends are) raise
    ``ValueError`` on the CPU and come out NaN or infinite on CUDA, where nothing waits for them.
    """

    uses_context = False
    _forward: Map
    _inverse: Map

    @property
    def domain(self) -> Interval:
        """Between which numbers data lie."""
        return REAL

    @property
    def range(self) -> Interval:
        """Between which numbers latents lie."""
        return REAL

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._each(x, lengths, self._forward, self.domain, type(self).__name__)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._each(z, lengths, self._inverse, self.range, f"the inverse of {type(self).__name__}")

    def _each(
        self, x: Tensor, lengths: Tensor | None, function: Map, interval: Interval, who: str
    ) -> tuple[Tensor, Tensor]:
        check_floating(x, type(self).__name__)
        if x.dim() < 2:
            raise ValueError(f"{type(self).__name__} takes data [B, ...], got a tensor of shape {tuple(x.shape)}")
        mask = valid_mask(x, lengths)
        data = x.to(compute_dtype(x))
        if mask is not None:  # zero may be outside, and its gradient too
            data = torch.where(mask, data, interval.inside)
        if reads_values(data):
            _check_inside(data.detach(), interval, who)
        y, log_slope = function(data)
        y = y.to(x.dtype)
        if mask is not None:
            y, log_slope = torch.where(mask, y, 0.0), torch.where(mask, log_slope, 0.0)
        return y, log_slope.flatten(1).sum(1)


def _check_inside(x: Tensor, interval: Interval, who: str) -> None:
    """NaN passes, and is seen where it comes out."""
    for outside, what in ((x <= interval.low, "minimum"), (x >= interval.high, "maximum")):
        if interval.words and bool(outside.any()):
            worst = x[outside].min() if what == "minimum" else x[outside].max()
            words = interval.words.format(low=interval.low, high=interval.high)
            raise ValueError(f"{who} needs {words}, got a {what} of {worst:.3g}: {interval.advice}")


# --- the maps: exact in their tails, where f itself may round to a constant -------------------------------------------


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x


def _log(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.log()
    return y, -y


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    # Not F.softplus, which is the identity above a threshold.
    return -F.logsigmoid(-x), F.logsigmoid(x)


def _softplus_inverse(y: Tensor) -> tuple[Tensor, Tensor]:
    rest = torch.log(-torch.expm1(-y))  # log(1 - exp(-y)): log(expm1(y)) would overflow
    return y + rest, -rest


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.tanh(), 2 * (math.log(2) - x + F.logsigmoid(2 * x))


def _arctanh(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.atanh(), -torch.log1p(y) - torch.log1p(-y)


class Exp(Elementwise):
    """``y = exp(x)``, from all numbers to the positive ones; ``log y' = x``."""

    range = POSITIVE
    _forward, _inverse = staticmethod(_exp), staticmethod(_log)


class Log(Elementwise):
    """``y = log(x)``, from the positive numbers to all; ``log y' = -log(x)``. The inverse of :class:`Exp`."""

    domain = POSITIVE
    _forward, _inverse = staticmethod(_log), staticmethod(_exp)


class Softplus(Elementwise):
    """``y = log(1 + exp(x))``, from all numbers to the positive ones; ``log y' = -softplus(-x)``."""

    range = POSITIVE
    _forward, _inverse = staticmethod(_softplus), staticmethod(_softplus_inverse)


class Tanh(Elementwise):
    """``y = tanh(x)``, from all numbers to (-1, 1); ``log y' = 2 (log 2 - x - softplus(-2 x))``."""

    range = SYMMETRIC
    _forward, _inverse = staticmethod(_tanh), staticmethod(_arctanh)


class Arctanh(Elementwise):
    """``y = artanh(x)``, from (-1, 1) to all numbers; ``log y' = -log(1 - x^2)``. The inverse of :class:`Tanh`."""

    domain = SYMMETRIC
    _forward, _inverse = staticmethod(_arctanh), staticmethod(_tanh)


class _WithAlpha(Elementwise):
    """A logit and its inverse that keep away from the ends of the unit interval."""

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"{type(self).__name__} needs an alpha of at least 0 and below 0.5, got {alpha}")
        self.alpha = alpha

    @property
    def _unit(self) -> Interval:
        ends = (0.0 - self.alpha) / (1 - 2 * self.alpha), (1 - self.alpha) / (1 - 2 * self.alpha)
        return Interval(*ends, 0.5, SYMMETRIC.words, "keep it away from the ends, or give a larger alpha")

    def _logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = 1 - 2 * self.alpha
        # 1 - x is exact where it is small: 1 - p would not be.
        log_p, log_q = torch.log(self.alpha + width * x), torch.log(self.alpha + width * (1 - x))
        return log_p - log_q, math.log(width) - log_p - log_q

    def _sigmoid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = 1 - 2 * self.alpha
        log_slope = F.logsigmoid(x) + F.logsigmoid(-x) - math.log(width)
        return (torch.sigmoid(x) - self.alpha) / width, log_slope

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Sigmoid(_WithAlpha):
    """``y = sigmoid(x)``, from all numbers to (0, 1); ``log y' = -softplus(x) - softplus(-x)``.

    With ``alpha`` the inverse of ``Logit(alpha)``: ``y = (sigmoid(x) - alpha) / (1 - 2 alpha)``.
    """

    @property
    def range(self) -> Interval:
        return self._unit

    _forward, _inverse = _WithAlpha._sigmoid, _WithAlpha._logit


class Logit(_WithAlpha):
    """``y = log(p / (1 - p))``, ``p = alpha + (1 - 2 alpha) x``; ``log y' = log(1 - 2 alpha) - log(p) - log(1 - p)``.

    From ``-alpha < (1 - 2 alpha) x < 1 - alpha`` to all numbers: without alpha from (0, 1), with one also from 0 and 1.
    """

    @property
    def domain(self) -> Interval:
        return self._unit

    _forward, _inverse = _WithAlpha._logit, _WithAlpha._sigmoid


class LeakyReLU(Elementwise):
    """``y = x`` where x >= 0, else ``negative_slope * x``, from all numbers to all.

    Raises ``ValueError`` for a slope that is not positive and finite: it would have no inverse.
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        if not 0 < negative_slope < math.inf:
            raise ValueError(f"LeakyReLU has an inverse for positive finite slopes only, got {negative_slope}")
        self.negative_slope = negative_slope

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._bent(x, self.negative_slope)

    def _inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._bent(y, 1 / self.negative_slope)

    def _bent(self, x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
        negative = x < 0
        return torch.where(negative, slope * x, x), negative.to(x.dtype) * math.log(slope)

    def extra_repr(self) -> str:
        return f"{self.negative_slope}"


class Affine(Elementwise):
    """``y = scale * x + shift``, from all numbers to all; ``log|y'| = log|scale|``.

    ``shift`` and ``scale`` are numbers, tensors ``[C]`` (one value per channel) or any shape that broadcasts to one
    sample ``[C, ...]``: fixed, as float32 buffers, or ``learned``, as parameters ``shift`` and ``log_scale`` with the
    scale's sign kept. Raises ``ValueError`` if a scale is zero or not finite, on the CPU also if a learned one gets so
    in float32.
    """

    sign: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0, learned: bool = False) -> None:
        super().__init__()
        shift, scale = (torch.as_tensor(v, dtype=torch.float32).clone() for v in (shift, scale))
        if not scale.is_meta and not bool((torch.isfinite(scale) & (scale != 0)).all()):
            raise ValueError("Affine needs scales that are finite and not zero")
        self.learned = learned
        if learned:
            self.shift, self.log_scale = nn.Parameter(shift), nn.Parameter(scale.abs().log())
            self.register_buffer("sign", scale.sign())
        else:
            self.register_buffer("shift", shift)
            self.register_buffer("scale", scale)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, log_scale = self._fit(x)
        return x * scale + shift, log_scale.expand_as(x)

    def _inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, log_scale = self._fit(y)
        return (y - shift) / scale, -log_scale.expand_as(y)

    def condition_number(self, shape: tuple[int, ...] | None = None) -> float:
        """The largest over the smallest ``|scale|``."""
        scale = self.log_scale.detach().exp() if self.learned else self.scale.abs()
        return (scale.max() / scale.min()).item()

    def _checked_log_scale(self) -> Tensor:
        if reads_values(self.log_scale) and self.log_scale.numel():
            largest = torch.linalg.vector_norm(self.log_scale.detach(), math.inf).item()
            if not largest < 80:  # nor for NaN
                raise ValueError(f"a scale of this Affine is zero or infinite: |log_scale| reached {largest:.3g}")
        return self.log_scale

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift = fit_to_sample(self.shift, x, "Affine", "shift")
        if not self.learned:
            scale = fit_to_sample(self.scale, x, "Affine", "scale")
            return shift, scale, scale.abs().log()
        log_scale = fit_to_sample(self._checked_log_scale(), x, "Affine", "log_scale")
        return shift, fit_to_sample(self.sign, x, "Affine", "sign") * log_scale.exp(), log_scale

    def extra_repr(self) -> str:
        return f"shift={tuple(self.shift.shape)}, learned={self.learned}"
