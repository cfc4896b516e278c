"""The defaults of training, in one place: how a flow is optimised, and how big the command line's Glow is."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a flow is trained. Every field can be given to ``fit`` by name.

    The defaults are those that train a Glow on the 1,350 digits of ``nfkernels train`` in a few minutes on two cores:
    little data, so they lean on weight decay, averaging and dropout in the flow.

    Args:
        steps: optimiser steps in all; the learning rate's decay ends there.
        batch_size: samples per step.
        lr: largest learning rate, reached after ``warmup`` steps.
        schedule: what it does then: ``"linear"`` or ``"cosine"`` down to zero at the last step, or ``"constant"``.
        warmup: steps over which the learning rate rises from zero.
        betas: of Adam.
        weight_decay: decoupled (AdamW), on the weights of convolutions and linear layers only: the flow's own
            matrices, scales and biases are not pulled to zero.
        clip: largest norm of the whole gradient; 0 for no limit.
        ema: share of the old value that the averaged weights keep at each step (less in the first steps); the averaged
            weights are what is validated and kept. 0 turns averaging off.
        validate_every: steps between validations; a checkpoint is written at each.
        validation_draws: dequantisation draws per validation image, the same noise every time.
        patience: validations in a row without a new best after which training stops early.
        log_every: steps per line of the log: only then are losses read from the device.
        seed: of the data order, the dequantisation noise and dropout.
    """

    steps: int = 1500
    batch_size: int = 64
    lr: float = 8e-3
    schedule: Schedule = "linear"
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1.0
    clip: float = 100.0
    ema: float = 0.99
    validate_every: int = 100
    validation_draws: int = 4
    patience: int = 5
    log_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "validation_draws", "patience", "log_every"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a whole number, at least 1")
        for name in ("warmup", "seed"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a whole number, at least 0")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: expected a whole number below 2**32")
        if not _is_real(self.lr) or self.lr <= 0:
            raise ValueError(f"lr is {self.lr!r}: expected a learning rate above 0, such as 0.001")
        for name in ("weight_decay", "clip"):
            if not _is_real(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a number, at least 0")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}: expected two numbers from 0 to below 1")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema", self.ema)):
            if not _is_real(value) or not 0 <= value < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected numbers from 0 to below 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = 1 - step / self.steps
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "linear": left, "constant": 1.0}[self.schedule]
        return self.lr * rise * fall

    def ema_at(self, step: int) -> float:
        """The share of the old averaged weights that step ``step``, counted from 0, keeps."""
        return min(self.ema, (1 + step) / (10 + step))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True)
class GlowShape:
    """How big a Glow ``nfkernels train`` builds: the arguments of ``nfkernels.models.Glow`` by their short names.

    Args:
        levels: of the multi-scale architecture; None for as many as the images allow (``auto_levels``).
        depth: Glow steps per level, or a number for each level.
        width: hidden channels of the coupling networks.
        dropout, dropout_of: in the coupling networks; of whole channels it costs next to nothing.
    """

    levels: int | None = None
    depth: int | tuple[int, ...] = 8
    width: int = 64
    dropout: float = 0.2
    dropout_of: Literal["element", "channel"] = "channel"


def auto_levels(height: int, width: int) -> int:
    """Levels for images of this size: a squeeze while both sides are even and at least 4, three at most.

    8 x 8 gives 2, 28 x 28 gives 2, 32 x 32 gives 3; 0 where even one squeeze is impossible.
    """
    levels = 0
    while levels < 3 and height % 2 == width % 2 == 0 and min(height, width) >= 4:
        levels, height, width = levels + 1, height // 2, width // 2
    return levels


def most_threads() -> int:
    """The largest number of CPU threads that is taken at its word: many more crash OpenMP."""
    return max(1024, 4 * (os.cpu_count() or 1))


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
