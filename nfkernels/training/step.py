"""One training step, from a batch on the device to new weights, with nothing in it that waits for the device."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .optim import Optimizer
from .recipe import Recipe
from .samples import batch_loss, batch_noise, is_image_flow

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

    def forward(self, samples: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The loss, a scalar: bits per dimension of uint8 images with ``noise`` (of ``batch_noise``), else nats."""
        if self.precision == "float32":
            return batch_loss(self.flow, samples, context, noise)
        with torch.autocast(samples.device.type, dtype=getattr(torch, self.precision)):
            return batch_loss(self.flow, samples, context, noise)


class TrainStep:
    """A batch in, the next weights out: flips, loss, backward, clipping, optimiser, averages and counters.

    Nothing in it reads a value on the host, and whatever changes from step to step lies in tensors or in ``generator``,
    so that the whole can be captured in a graph; ``optimizer.prepare`` comes before it.

    Args:
        loss: a ``LossModule``, or one wrapped in DistributedDataParallel.
        optimizer: of the same flow.
        sums: ``[3]``, to which every good step adds its loss, its gradient's norm and one.
        generator: of flips and dequantisation noise, on the device; in the same state on every rank.
        ranks: which share of the batch this process has. The flips and the noise are drawn for the whole batch, once,
            and are the same however many ranks and parts it is shared out to; and all ranks skip a step or none.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: Optimizer,
        sums: Tensor,
        generator: torch.Generator | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        self.loss: Any = loss  # the module, or DistributedDataParallel around it
        self.optimizer, self.sums, self.generator = optimizer, sums, generator
        self.parts, self.flip = optimizer.recipe.accumulate, optimizer.recipe.flip
        self._ranks = Ranks() if ranks is None else ranks
        self._flow = getattr(loss, "module", loss).flow

    def run(self, samples: Tensor, context: Tensor | None = None) -> None:
        """One step on samples `[B, ...]` and, where the flow has one, their context `[B, ...]`.

        Raises ``ValueError`` where B is no multiple of the recipe's ``accumulate``, and whatever the flow raises.
        """
        if samples.shape[0] % self.parts:
            raise ValueError(
                f"a batch of {samples.shape[0]} samples does not split into accumulate = {self.parts} equal parts"
            )
        try:
            self._run(samples, context)
        except BaseException:
            # Half a step's gradients would be added to those of the next.
            self.optimizer.adam.zero_grad(set_to_none=True)
            raise

    def _run(self, samples: Tensor, context: Tensor | None) -> None:
        rank, world = self._ranks.rank, self._ranks.world
        place = (rank * samples.shape[0], world * samples.shape[0])
        if self.flip:
            samples = mirrored(samples, self.generator, place)
        noise = batch_noise(self._flow, samples, self.generator, place)
        size = samples.shape[0] // self.parts
        losses = []
        for part in range(self.parts):
            rows = slice(part * size, (part + 1) * size)
            # Ranks need each other's gradients only once they are complete.
            last = part == self.parts - 1
            apart = contextlib.nullcontext() if last or not hasattr(self.loss, "no_sync") else self.loss.no_sync()
            with apart:
                loss = self.loss(
                    samples[rows], None if context is None else context[rows], None if noise is None else noise[rows]
                )
                if self.parts > 1:
                    loss = loss / self.parts
                loss.backward()
            losses.append(loss.detach())
        loss = losses[0] if self.parts == 1 else torch.stack(losses).sum()
        self._ranks.mean_(loss)
        norm, bad = self.optimizer.apply(loss)
        seen = torch.stack((loss, norm, torch.ones_like(norm))).to(self.sums.dtype)
        self.sums += torch.where(bad > 0, 0.0, seen)


def mirrored(images: Tensor, generator: torch.Generator | None, rows: tuple[int, int] | None = None) -> Tensor:
    """Images `[B, C, H, W]`, each mirrored left-right with probability one half, decided on their device.

    With ``rows = (first, of)`` they are the rows from ``first`` on of a batch of ``of``, as in ``ImageFlow.noise``.
    """
    first, of = (0, images.shape[0]) if rows is None else rows
    chosen = torch.rand(of, generator=generator, device=images.device)[first : first + images.shape[0]] < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def check_recipe(recipe: Recipe, flow: Flow, count: int, *, ranks: int = 1) -> None:
    """Whether a flow can be trained so on ``count`` samples; ``ValueError`` in one sentence where it cannot."""
    if recipe.flip and not is_image_flow(flow):
        raise ValueError("flip mirrors images, and this flow is none over images: leave it out")
    shares = recipe.accumulate * ranks
    batch = min(recipe.batch_size, count)
    if batch % shares:
        parts = f"into {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        among = f"{'on each of' if parts else 'among'} {ranks} ranks" if ranks > 1 else ""
        of = " ".join(filter(None, (parts, among)))
        few = f" (there are no more samples; batch_size is {recipe.batch_size})" if batch < recipe.batch_size else ""
        raise ValueError(f"a batch of {batch} samples{few} does not split evenly {of}: change one of them")
