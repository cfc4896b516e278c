"""One training step, from a batch on the device to new weights, with nothing in it that waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .optim import Optimizer
from .recipe import Recipe
from .samples import batch_loss, is_image_flow

if TYPE_CHECKING:
    from ..nn import Flow


class LossModule(nn.Module):
    """The training loss of a flow as a module's forward: what DistributedDataParallel wraps.

    Args:
        flow: any ``Flow``; the module's parameters are its parameters.
        precision: of its networks, as in ``Recipe``.
    """

    def __init__(self, flow: Flow, precision: str = "float32") -> None:
        super().__init__()
        self.flow = flow
        self.precision = precision

    def forward(
        self, samples: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar: bits per dimension of uint8 images (noise drawn from ``generator``), else nats."""
        if self.precision == "float32":
            return batch_loss(self.flow, samples, context, generator)
        with torch.autocast(samples.device.type, dtype=getattr(torch, self.precision)):
            return batch_loss(self.flow, samples, context, generator)


class TrainStep:
    """A batch in, the next weights out: flips, loss, backward, clipping, optimiser, averages and counters.

    Nothing in it reads a value on the host, and whatever changes from step to step lies in tensors or in ``generator``,
    so that the whole can be captured in a graph; ``optimizer.prepare`` comes before it.

    Args:
        loss: a ``LossModule``, or one wrapped in DistributedDataParallel.
        optimizer: of the same flow.
        sums: ``[3]``, to which every good step adds its loss, its gradient's norm and one.
        generator: of flips and dequantisation noise, on the device.
        over_ranks: makes the mean over all ranks of a scalar, in place; needed where there are several, so that all of
            them skip a step or none.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: Optimizer,
        sums: Tensor,
        generator: torch.Generator | None = None,
        *,
        over_ranks: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.loss, self.optimizer, self.sums, self.generator = loss, optimizer, sums, generator
        self.parts, self.flip = optimizer.recipe.accumulate, optimizer.recipe.flip
        self._over_ranks = over_ranks

    def run(self, samples: Tensor, context: Tensor | None = None) -> None:
        """One step on samples `[B, ...]` and, where the flow has one, their context `[B, ...]`.

        Raises ``ValueError`` where B is no multiple of the recipe's ``accumulate``, and whatever the flow raises.
        """
        if samples.shape[0] % self.parts:
            raise ValueError(
                f"a batch of {samples.shape[0]} samples does not split into accumulate = {self.parts} equal parts"
            )
        if self.flip:
            samples = mirrored(samples, self.generator)
        size = samples.shape[0] // self.parts
        losses = []
        for part in range(self.parts):
            rows = slice(part * size, (part + 1) * size)
            # Ranks need each other's gradients only once they are complete.
            last = part == self.parts - 1
            apart = contextlib.nullcontext() if last or not hasattr(self.loss, "no_sync") else self.loss.no_sync()
            with apart:
                loss = self.loss(samples[rows], None if context is None else context[rows], self.generator)
                if self.parts > 1:
                    loss = loss / self.parts
                loss.backward()
            losses.append(loss.detach())
        loss = losses[0] if self.parts == 1 else torch.stack(losses).sum()
        if self._over_ranks is not None:
            self._over_ranks(loss)
        norm, bad = self.optimizer.apply(loss)
        seen = torch.stack((loss, norm, torch.ones_like(norm))).to(self.sums.dtype)
        self.sums += torch.where(bad > 0, 0.0, seen)


def mirrored(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images `[B, C, H, W]`, each mirrored left-right with probability one half, decided on their device."""
    chosen = torch.rand(images.shape[0], generator=generator, device=images.device) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def check_recipe(recipe: Recipe, flow: Flow, count: int, *, ranks: int = 1) -> None:
    """Whether a flow can be trained so on ``count`` samples; ``ValueError`` in one sentence where it cannot."""
    if recipe.flip and not is_image_flow(flow):
        raise ValueError("flip mirrors images, and this flow is none over images: leave it out")
    shares = recipe.accumulate * ranks
    batch = min(recipe.batch_size, count)
    if batch % shares:
        of = f"{recipe.accumulate} parts" + (f" on each of {ranks} ranks" if ranks > 1 else "")
        few = f" (there are no more samples; batch_size is {recipe.batch_size})" if batch < recipe.batch_size else ""
        raise ValueError(f"a batch of {batch} samples{few} does not split evenly into {of}: change one of them")
