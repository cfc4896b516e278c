"""How good a flow is: its loss on held-out samples with a standard error, and two baselines to see it against."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .data.image_data import DataError, ImageData
from .samples import Data, Samples, as_samples, is_image_flow, unit_of

if TYPE_CHECKING:
    from ..nn import Flow, ImageFlow

_CHUNK = 256  # samples per forward


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A mean loss.

    Args:
        mean: over samples, each with its own mean over draws, in ``unit``.
        standard_error: of that mean, over samples (the draws share them); 0 for a single sample.
        samples: how many.
        draws: dequantisation draws per image (1 where nothing is drawn).
        unit: ``"bits/dim"`` for image flows (an upper bound), else ``"nats"``.
    """

    mean: float
    standard_error: float
    samples: int
    draws: int
    unit: str


def evaluate(flow: Flow, data: Data, *, draws: int = 20, seed: int = 0) -> Evaluation:
    """The loss of ``flow`` on ``data``, in evaluation mode, on the flow's device; the same for the same seed.

    Args:
        flow: any ``Flow``. An image flow's number is bits per dimension, the mean of ``draws`` dequantisation draws.
        data: as in ``fit``.
        draws: at least 1.
        seed: of the draws.

    Raises:
        DataError: data that the flow cannot take.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected at least 1")
    samples = as_samples(data, flow)
    device = _device(flow)
    draws = draws if is_image_flow(flow) else 1
    values = sample_losses(flow, samples, draws=draws, generator=torch.Generator(device).manual_seed(seed))
    mean, error = mean_and_error(values)
    return Evaluation(mean, error, len(samples), draws, unit_of(flow))


def mean_loss(flow: Flow, samples: Samples, *, draws: int, generator: torch.Generator) -> float:
    return float(sample_losses(flow, samples, draws=draws, generator=generator).mean())


def sample_losses(flow: Flow, samples: Samples, *, draws: int, generator: torch.Generator) -> Tensor:
    """`[N]` float64 on the flow's device: every sample's mean loss over the draws."""
    device, parts = _device(flow), []
    with evaluating(flow):
        for start in range(0, len(samples), _CHUNK):
            chunk = samples.images[start : start + _CHUNK].to(device)
            context = None if samples.labels is None else samples.labels[start : start + _CHUNK].to(device)
            if is_image_flow(flow):
                part = flow.bits_per_dim(chunk, context, draws=draws, generator=generator)
            else:
                part = -flow.log_prob(chunk, context)
            parts.append(part)
    losses = torch.cat(parts)
    return losses.to(torch.float64 if device.type != "mps" else losses.dtype)


@contextlib.contextmanager
def evaluating(flow: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode that was there afterwards."""
    training = flow.training
    flow.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        flow.train(training)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error


def round_trip_error(flow: ImageFlow, data: ImageData, *, images: int = 256, seed: int = 0) -> float:
    """Largest ``|decode(encode(x)) - x|`` over dequantised images on the unit range: 1 / levels is one grey level."""
    samples = as_samples(data, flow)
    device = _device(flow)
    generator = torch.Generator(device).manual_seed(seed)
    chunk = samples.images[:images].to(device)
    context = None if samples.labels is None else samples.labels[:images].to(device)
    with evaluating(flow):
        x = (chunk + torch.rand(chunk.shape, generator=generator, device=device)) / flow.grey_levels
        back = flow.decode_continuous(flow.encode(x, context), context)
        return float((back - x).abs().max())


# --- baselines ------------------------------------------------------------------------------------------------------


def uniform_bits(grey_levels: int) -> float:
    """Bits per dimension of a model to which every grey level is equally likely."""
    return math.log2(grey_levels)


def independent_pixel_bits(train: ImageData, validation: ImageData, test: ImageData) -> Evaluation:
    """Bits per dimension on ``test`` of one categorical distribution per pixel and channel, counted on ``train``.

    Counts get a constant added; which, of 1 to 0.001, is chosen on ``validation`` (1 where that is empty).

    Raises:
        DataError: parts of different shapes or grey levels, or empty.
    """
    levels = train.grey_levels
    for part in (validation, test):
        if len(part) and (part.grey_levels != levels or part.images.shape[1:] != train.images.shape[1:]):
            raise DataError(f"{part.name}: another image shape or number of grey levels than {train.name}")
    if not len(train) or not len(test):
        raise DataError(f"{train.name}: no images to count or to test on")
    pixels = train.images[0].numel()
    offsets = torch.arange(pixels) * levels
    counts = torch.zeros(pixels * levels, dtype=torch.float64)
    for chunk in train.images.flatten(1).split(4096):
        counts += torch.bincount((chunk + offsets).flatten(), minlength=pixels * levels)
    counts = counts.view(pixels, levels)

    def bits(part: ImageData, added: float) -> Tensor:
        table = torch.log2((counts + added) / (len(train) + added * levels)).flatten()
        chunks = [table[chunk + offsets].mean(1) for chunk in part.images.flatten(1).split(4096)]
        return -torch.cat(chunks)

    choices = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    added = min(choices, key=lambda choice: float(bits(validation, choice).mean())) if len(validation) else 1.0
    mean, error = mean_and_error(bits(test, added))
    return Evaluation(mean, error, len(test), 1, "bits/dim")


def _device(flow: nn.Module) -> torch.device:
    tensor = next(flow.parameters(), None)
    tensor = next(flow.buffers(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device
