"""The defaults of training, in one place: how a flow is optimised, and how big the command line's Glow is."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

Schedule = Literal["cosine", "linear", "exponential", "constant"]
SCHEDULES = ("cosine", "linear", "exponential", "constant")
OPTIMIZERS = ("adamw", "adam", "adamax")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a flow is trained. Every field can be given to ``fit`` by name.

    The defaults are those that train a Glow on the 1,350 digits of ``nfkernels train`` in a few minutes on two cores:
    little data, so they lean on weight decay, averaging and dropout in the flow.

    Args:
        steps: optimiser steps in all; the learning rate's decay ends there.
        batch_size: samples per step, over all ranks and all parts.
        optimizer: ``"adamw"``, ``"adam"`` or ``"adamax"``, torch's own.
        lr: largest learning rate, reached after ``warmup`` steps.
        schedule: what it does then, down to ``lr_end`` where the steps end: ``"linear"``, ``"cosine"`` or
            ``"exponential"`` (by the same factor at every step); or ``"constant"``.
        lr_end: the share of ``lr`` that is left at the end. None is 0 for ``"linear"`` and ``"cosine"``, 0.01 for
            ``"exponential"``; a ``"constant"`` rate has no end and takes None only.
        warmup: steps over which the learning rate rises from zero.
        betas: of the optimiser.
        weight_decay: on the weights of convolutions and linear layers only: the flow's own matrices, scales and biases
            are not pulled to zero. AdamW takes ``lr * weight_decay`` of a weight off it; Adam and Adamax add
            ``weight_decay`` times the weight to its gradient, so that much smaller values are in place there.
        clip: largest norm of the whole gradient; 0 for no limit.
        ema: share of the old value that the averaged weights keep at each step (less in the first steps); the averaged
            weights are what is validated and kept. 0 turns averaging off.
        accumulate: parts in which a step's batch is gone through, one after the other: so many times less memory, the
            same step but for rounding and for the noise drawn.
        precision: of the conditioners: ``"float32"``, or ``"bfloat16"`` (autocast around the loss; data,
            log-determinants and weights stay float32).
        flip: mirror each training image left-right with probability one half, on the device.
        validate_every: steps between validations; a checkpoint is written at each.
        validation_draws: dequantisation draws per validation image, the same noise every time.
        patience: validations in a row without a new best after which training stops early.
        log_every: steps per line of the log: only then are losses read from the device.
        seed: of the data order, the dequantisation noise and dropout.
    """

    steps: int = 1500
    batch_size: int = 64
    optimizer: Literal["adamw", "adam", "adamax"] = "adamw"
    lr: float = 8e-3
    schedule: Schedule = "linear"
    lr_end: float | None = None
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1.0
    clip: float = 100.0
    ema: float = 0.99
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    flip: bool = False
    validate_every: int = 100
    validation_draws: int = 4
    patience: int = 5
    log_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "validate_every",
            "validation_draws",
            "patience",
            "log_every",
        ):
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
        choices = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "precision": PRECISIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip is {self.flip!r}: expected True or False")
        if self.lr_end is not None:
            if self.schedule == "constant":
                raise ValueError(f"lr_end is {self.lr_end!r}: a constant learning rate has no end, leave lr_end out")
            if not _is_real(self.lr_end) or not 0 <= self.lr_end <= 1:
                raise ValueError(f"lr_end is {self.lr_end!r}: expected a share of lr, from 0 to 1")
            if self.schedule == "exponential" and not self.lr_end:
                raise ValueError("lr_end is 0: an exponential decay never gets there, give a share such as 0.01")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}: a batch_size of {self.batch_size} does not split into that many "
                "equal parts, choose one that divides it"
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * self._left_at(step / self.steps)

    def ema_at(self, step: int) -> float:
        """The share of the old averaged weights that step ``step``, counted from 0, keeps."""
        return min(self.ema, (1 + step) / (10 + step))

    def _left_at(self, done: float) -> float:
        """The share of ``lr`` that the schedule leaves after this share of the steps."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "exponential":
            return (0.01 if self.lr_end is None else self.lr_end) ** done
        left = 1 - done
        fall = left if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
        end = self.lr_end or 0.0
        return end + (1 - end) * fall

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(field.name for field in fields(cls))


class RecipeChanges(TypedDict, total=False):
    """The fields of ``Recipe`` as ``fit`` takes them by name: for type checkers, and held to ``Recipe`` by a test."""

    steps: int
    batch_size: int
    optimizer: Literal["adamw", "adam", "adamax"]
    lr: float
    schedule: Schedule
    lr_end: float | None
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema: float
    accumulate: int
    precision: Literal["float32", "bfloat16"]
    flip: bool
    validate_every: int
    validation_draws: int
    patience: int
    log_every: int
    seed: int


@dataclass(frozen=True)
class GlowShape:
    """How big a Glow ``nfkernels train`` builds: the arguments of ``nfkernels.models.Glow`` by their short names.

    Args:
        levels: of the multi-scale architecture; None for as many as the images allow (``auto_levels``).
        depth: Glow steps per level, or a number for each level.
        width: hidden channels of the coupling networks.
        dropout, dropout_of: in the coupling networks; of whole channels it costs next to nothing.
        kernel, last_kernel: sides of the coupling networks' first and last convolution; None for the same.
        class_width: numbers that a class becomes.
        scale_map, order: of the couplings.
        memory: what training keeps: ``"stored"`` all activations, ``"reversible"`` each level's output.
        dequantization: ``"uniform"`` or ``"variational"``.
    """

    levels: int | None = None
    depth: int | tuple[int, ...] = 8
    width: int = 64
    dropout: float = 0.2
    dropout_of: Literal["element", "channel"] = "channel"
    kernel: int = 3
    last_kernel: int | None = None
    class_width: int = 32
    scale_map: str = "glow"
    order: Literal["scale_first", "shift_first"] = "shift_first"
    memory: Literal["stored", "reversible"] = "stored"
    dequantization: Literal["uniform", "variational"] = "uniform"


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
