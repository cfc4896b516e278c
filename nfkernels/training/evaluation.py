"""How good a flow is: its loss on held-out samples with a standard error, and two baselines to see it against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn.graph import captured
from ..nn.modes import evaluating
from .data.image_data import DataError, ImageData
from .distributed import Ranks
from .samples import Data, Samples, as_samples, dequantizes, is_image_flow, unit_of

if TYPE_CHECKING:
    from ..nn import Flow, ImageFlow

# Samples per forward: so many, or images of so many values in all (large ones take much memory).
_CHUNK, _CHUNK_VALUES = 256, 2**22
_CHUNK_ROWS = 4096  # of samples that are a row of numbers each


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A mean loss.

    Args:
        mean: over samples, each with its own mean over draws, in ``unit``.
        standard_error: of that mean, over samples (the draws share them); NaN for a single one.
        samples: how many.
        draws: dequantisation draws per image or row (1 where nothing is drawn).
        unit: ``"bits/dim"`` for image flows (an upper bound), else ``"nats"``.
        importance_samples: dequantisation draws whose densities each draw averages.
    """

    mean: float
    standard_error: float
    samples: int
    draws: int
    unit: str
    importance_samples: int = 1


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What comes back of images that go through a flow and back.

    Args:
        images, values: how many images, and pixel values (of every channel) in them.
        wrong: values that came back as another grey level.
        grey_levels: by how many at most.
        largest: the largest error before rounding, on the unit range: half a grey level is 0.5 / levels.
    """

    images: int
    values: int
    wrong: int
    grey_levels: int
    largest: float


def evaluate(
    flow: Flow, data: Data, *, draws: int = 20, importance_samples: int = 1, seed: int = 0, cuda_graph: bool = True
) -> Evaluation:
    """The loss of ``flow`` on ``data``, in evaluation mode, on the flow's device; the same for the same seed.

    Args:
        flow: any ``Flow``. An image flow's number is bits per dimension, the mean of ``draws`` dequantisation draws.
        data: as in ``fit``.
        draws: at least 1.
        importance_samples: of an image flow, the dequantisation draws whose densities are averaged in every one of the
            ``draws``: the more, the tighter the bound. 1 is the usual one.
        seed: of the draws.
        cuda_graph: as in ``fit``.

    Raises:
        DataError: data that the flow cannot take.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected at least 1")
    if importance_samples < 1:
        raise ValueError(f"importance_samples is {importance_samples}: expected at least 1")
    samples = as_samples(data, flow)
    device = _device(flow)
    draws = draws if is_image_flow(flow) or dequantizes(flow) else 1
    importance_samples = importance_samples if is_image_flow(flow) else 1
    generator = torch.Generator(device).manual_seed(seed)
    with captured(flow, cuda_graph=cuda_graph):
        values = sample_losses(flow, samples, draws=draws, importance_samples=importance_samples, generator=generator)
    mean, error = mean_and_error(values)
    return Evaluation(mean, error, len(samples), draws, unit_of(flow), importance_samples)


def mean_loss(
    flow: Flow, samples: Samples, *, draws: int, generator: torch.Generator, ranks: Ranks | None = None
) -> float:
    return float(sample_losses(flow, samples, draws=draws, generator=generator, ranks=ranks).mean())


def sample_losses(
    flow: Any,
    samples: Samples,
    *,
    draws: int,
    importance_samples: int = 1,
    generator: torch.Generator,
    ranks: Ranks | None = None,
) -> Tensor:
    """`[N]` float64 on the flow's device: every sample's mean loss over the draws.

    The noise is that of the generator's seed. Several ranks take a chunk each in turn, and all of them get all the
    losses, those that a single process gets.
    """
    device, ranks, size = _device(flow), Ranks() if ranks is None else ranks, images_at_once(samples.images.shape[1:])
    dtype = torch.float64 if device.type != "mps" else torch.float32
    losses = torch.zeros(len(samples), dtype=dtype, device=device)
    with evaluating(flow):
        for number in range(ranks.rank, -(-len(samples) // size), ranks.world):
            rows = slice(number * size, (number + 1) * size)
            chunk = samples.images[rows].to(device)
            context = None if samples.labels is None else samples.labels[rows].to(device)
            # A stream for each chunk: its noise does not depend on who drew that of the chunks before it.
            noise = torch.Generator(device).manual_seed((generator.initial_seed() + (number << 40)) % 2**63)
            if is_image_flow(flow):
                how = {"draws": draws, "importance_samples": importance_samples, "generator": noise}
                losses[rows] = flow.bits_per_dim(chunk, context, **how).to(dtype)
            elif dequantizes(flow):
                for _ in range(draws):
                    x = chunk + flow.noise(chunk, generator=noise)
                    losses[rows] -= flow.log_prob(x, context).to(dtype) / draws
            else:
                losses[rows] = -flow.log_prob(chunk, context).to(dtype)
    return ranks.sum_(losses)


def images_at_once(shape: Sequence[int]) -> int:
    """How many samples of this shape go through a flow at once."""
    most = _CHUNK_ROWS if len(shape) == 1 else _CHUNK
    return max(1, min(most, _CHUNK_VALUES // max(1, math.prod(shape))))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def round_trip_error(flow: ImageFlow, data: ImageData, *, images: int = 256, seed: int = 0) -> float:
    """Largest ``|decode(encode(x)) - x|`` over dequantised images on the unit range: 1 / levels is one grey level."""
    generator = torch.Generator(_device(flow)).manual_seed(seed)
    largest = 0.0
    with evaluating(flow):
        for chunk, context in _chunks(flow, data, images):
            x = (chunk + torch.rand(chunk.shape, generator=generator, device=chunk.device)) / flow.grey_levels
            back = flow.decode_continuous(flow.encode(x, context), context)
            largest = _larger(largest, (back - x).abs().max())
    return largest


def reconstruction(flow: ImageFlow, data: ImageData, *, images: int = 64) -> Reconstruction:
    """The first ``images`` of ``data`` to latents and back, in whatever precision the networks compute in here.

    Raises:
        DataError: data that the flow cannot take.
    """
    count = values = wrong = levels = 0
    largest = 0.0
    with evaluating(flow):
        for chunk, context in _chunks(flow, data, images):
            back = flow.decode_continuous(flow.encode(chunk, context), context)
            off = (flow.quantize(back).short() - chunk).abs()
            count, values = count + len(chunk), values + chunk.numel()
            wrong, levels = wrong + int((off > 0).sum()), max(levels, int(off.max()))
            # encode takes the middle of a grey level.
            largest = _larger(largest, (back - (chunk + 0.5) / flow.grey_levels).abs().max())
    return Reconstruction(count, values, wrong, levels, largest)


def _chunks(flow: ImageFlow, data: ImageData, images: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    samples, device = as_samples(data, flow), _device(flow)
    size = images_at_once(samples.images.shape[1:])
    for start in range(0, min(images, len(samples)), size):
        part = slice(start, min(start + size, images))
        context = None if samples.labels is None else samples.labels[part].to(device)
        yield samples.images[part].to(device), context


def _larger(largest: float, value: Tensor) -> float:
    """``max`` that keeps NaN: a flow that gives none back has no small error."""
    return largest if math.isnan(largest) or float(value) <= largest else float(value)


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
    tensor: Tensor | None = next(flow.parameters(), None)
    tensor = next(flow.buffers(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device
