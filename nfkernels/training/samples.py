"""What ``fit`` and ``evaluate`` accept as data, as one thing: samples and, where there is one, a context for each."""

from __future__ import annotations

import ctypes
import dataclasses
import zlib
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .batches import Batches
from .data.image_data import DataError, ImageData
from .data.stream import ImageStream

if TYPE_CHECKING:
    from ..nn import Flow

Data = ImageData | ImageStream | Tensor | tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """``images`` (any samples, `[N, ...]`) and ``labels`` (any context, `[N, ...]`, or None), named as in ImageData."""

    images: Tensor
    labels: Tensor | None
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.images.shape[1:])

    # What a trainer asks for; an ImageStream has the same.

    def batches(self, batch_size: int, **options: Any) -> Batches:
        """Endless shuffled batches. See ``Batches``."""
        return Batches(self, batch_size, **options)  # type: ignore[arg-type]  # it has what Batches asks an ImageData for

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """``count`` random samples (all, where there are fewer) and their contexts."""
        index = torch.randperm(len(self), generator=generator)[:count]
        return self.images[index], None if self.labels is None else self.labels[index]

    def fingerprint(self) -> str:
        """A checksum of the samples and contexts: enough to notice that a resumed run was given other data."""
        crc = 0
        for tensor in (self.images, self.labels):
            if tensor is not None and tensor.numel():
                tensor = tensor.detach().cpu().contiguous()
                # A view of the memory itself: torch works without numpy, and so does this.
                size = tensor.numel() * tensor.element_size()
                crc = zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr()), crc)
        return f"{len(self)}-{crc:08x}"


@overload
def as_samples(data: Data, flow: Flow, what: str = "data", *, streams: Literal[False] = False) -> Samples: ...


@overload
def as_samples(data: Data, flow: Flow, what: str = "data", *, streams: Literal[True]) -> Samples | ImageStream: ...


def as_samples(data: Data, flow: Flow, what: str = "data", *, streams: bool = False) -> Samples | ImageStream:
    """The samples that ``flow`` is to see; labels of an ImageData only where the flow is conditioned on classes.

    With ``streams`` an ImageStream remains one; without, it is refused.

    Raises:
        DataError: no samples, contexts that are missing or of another number, non-finite samples (counted), another
            number of grey levels or image shape, more classes than the flow has, a stream where none can be.
    """
    if isinstance(data, ImageStream) and not streams:
        raise DataError(f"{data.name} is streamed and so can only be trained on: take parts of it with split()")
    if isinstance(data, (ImageData, ImageStream)):
        conditional = bool(getattr(flow, "classes", None))
        if conditional and data.classes is None:
            raise DataError(f"{data.name} has no labels, and the flow is conditioned on classes")
        levels = getattr(flow, "grey_levels", data.grey_levels)
        if levels != data.grey_levels:
            raise DataError(f"{data.name} has {data.grey_levels} grey levels, the flow was built for {levels}")
        if conditional and isinstance(flow.classes, int) and len(data.classes) > flow.classes:
            raise DataError(f"{data.name} has {len(data.classes)} classes, the flow was built for {flow.classes}")
        shape, wanted = data.image_shape, getattr(flow, "event_shape", None)
        if is_image_flow(flow) and wanted is not None and shape != tuple(wanted):
            raise DataError(f"{data.name} has images {list(shape)}, the flow was built for {list(wanted)} [C, H, W]")
        if isinstance(data, ImageStream):
            return data.alone() if conditional else data.without_labels()
        samples = Samples(data.images, data.labels if conditional else None, data.name)
    elif isinstance(data, Tensor):
        samples = Samples(data, None, what)
    elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        samples = Samples(*data, what)
    else:
        raise DataError(
            f"{what} is a {type(data).__name__}: expected an ImageData, a tensor [N, ...], or a pair (samples, context)"
        )
    if not len(samples):
        raise DataError(f"{samples.name}: there are no samples")
    if samples.labels is not None and len(samples.labels) != len(samples):
        raise DataError(f"{samples.name}: {len(samples)} samples but {len(samples.labels)} contexts")
    if samples.images.is_floating_point():
        bad = int((~torch.isfinite(samples.images)).sum())
        if bad:
            raise DataError(f"{samples.name}: {bad} of {samples.images.numel()} values are not finite")
    return samples


def batch_loss(flow: Any, samples: Tensor, context: Tensor | None, noise: Tensor | None) -> Tensor:
    """The training loss, a scalar: bits per dimension of images with ``batch_noise``, nats of anything else."""
    if is_image_flow(flow) or dequantizes(flow):
        return flow.nll(samples, context, noise=noise)
    return flow.nll(samples, context)


def batch_noise(
    flow: Any, samples: Tensor, generator: torch.Generator | None, rows: tuple[int, int] | None = None
) -> Tensor | None:
    """The dequantisation noise of images (see ``ImageFlow.noise``) or of whole numbers in the columns of a table (see
    ``TableFlow.noise``), one draw per batch; None for anything else."""
    if (is_image_flow(flow) and not samples.is_floating_point()) or dequantizes(flow):
        return flow.noise(samples, generator=generator, rows=rows)
    return None


def is_image_flow(flow: Any) -> bool:
    return hasattr(flow, "bits_per_dim")


def dequantizes(flow: Any) -> bool:
    """Whether it is over a table with columns of whole numbers."""
    return getattr(flow, "dequantizes", False)


def unit_of(flow: Any) -> str:
    return "bits/dim" if is_image_flow(flow) else "nats"
