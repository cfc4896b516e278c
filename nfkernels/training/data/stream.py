"""`ImageStream`: a set of pictures that is too large for memory, decoded while it is trained on."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from typing import Any

import torch
from torch import Tensor

from .conform import fit, in_chunks, to_tensor
from .image_data import DataError, ImageData, check_bits, part_size
from .listing import Listing
from .picture import decode, decoding
from .shards import ParquetListing
from .stream_batches import StreamBatches

# The most pictures that are taken into memory, unless asked for, to validate and to test on.
_VALIDATION, _TEST = 2000, 10_000
# Random pictures of row groups come from at least this many of them, and are at most this share of their rows.
_GROUPS, _SHARE = 16, 4


@dataclasses.dataclass(frozen=True, eq=False)
class ImageStream:
    """Pictures that are listed but not read: what `load_images` gives of a set too large for memory.

    Like an ImageData, it can be given to `split` (which takes the validation and test parts into memory) and to `fit`.

    Args:
        listing: all pictures of the source.
        rows: int64, ascending: which of them this set has; None for all.
        image_shape: (C, H, W) of every image, C 1 or 3.
        fitted: whether pictures of another size are cropped and resampled; if not, they are an error.
        classes: the class names; None for a set whose labels are not there or not wanted.
        class_of: int64, the index in `classes` of each class of the listing; None where they are the same.
        grey_levels: how many values a channel can take, 256 or what ``in_bits`` left.
        name: what reports call the set.
        validation, test: the set's own parts, of the same shape and classes, where the source has them.
        workers: processes that decode, 0 to do it in the training process; None for as many as there are cores.

    Raises :class:`DataError` when a picture is read that is damaged, gone or of another shape.
    """

    listing: Listing
    rows: Tensor | None
    image_shape: tuple[int, int, int]
    fitted: bool
    classes: tuple[str, ...] | None
    class_of: Tensor | None
    grey_levels: int
    name: str
    validation: ImageStream | None = None
    test: ImageStream | None = None
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.listing) if self.rows is None else len(self.rows)

    def alone(self) -> ImageStream:
        """The same without its validation and test parts."""
        return dataclasses.replace(self, validation=None, test=None)

    def without_labels(self) -> ImageStream:
        """The same pictures, alone, without their classes."""
        return dataclasses.replace(self.alone(), classes=None)

    def in_bits(self, bits: int) -> ImageStream:
        """As of an ImageData: the upper ``bits`` (1 to 8) of every value, in all parts."""
        check_bits(bits)
        parts: dict[str, Any] = {
            part: held and held.in_bits(bits) for part, held in (("validation", self.validation), ("test", self.test))
        }
        return dataclasses.replace(self, grey_levels=2**bits, **parts)

    # --- what a trainer asks for ---

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
    ) -> StreamBatches:
        """Endless shuffled batches, decoded ahead by workers. See ``StreamBatches``."""
        return StreamBatches(self, batch_size, seed=seed, device=device, rank=rank, world=world, drop_last=drop_last)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """``count`` random images (all, where there are fewer) and their labels, as ``read`` gives them."""
        return self.read(self._choose(count, generator), threads=True)

    def fingerprint(self) -> str:
        """A checksum of what is listed: enough to notice that a resumed run was given other pictures or labels.

        It does not look into the pictures, and does not depend on where the set lies.
        """
        crc = 0
        tensors = self.listing.tensors()
        if self.rows is not None:
            tensors["rows"] = self.rows
        if self.classes is None:
            tensors.pop("labels", None)
        for name in sorted(name for name in tensors if tensors[name].numel()):
            held: Any = tensors[name].contiguous().numpy()
            crc = zlib.crc32(memoryview(held).cast("B"), zlib.crc32(name.encode(), crc))
        facts = self.listing.facts(), self.image_shape, self.classes, self.grey_levels
        return f"{len(self)}-{zlib.crc32(json.dumps(facts, sort_keys=True).encode(), crc):08x}"

    # --- reading ---

    def read(self, index: Tensor, *, threads: bool = False) -> tuple[Tensor, Tensor | None]:
        """The images at int64 `[M]` indices, uint8 `[M, C, H, W]`, and their labels, int64 `[M]` or None.

        Raises:
            DataError: a picture that cannot be read, or of another size where pictures are not fitted.
        """
        rows = index if self.rows is None else self.rows[index]
        images = torch.empty(len(rows), *self.image_shape, dtype=torch.uint8)
        # In the order of the source: neighbours share what is read.
        in_order = rows.argsort().tolist()
        wanted = rows.tolist()

        def work(part: range) -> None:
            for place in in_order[part.start : part.stop]:
                self._read_one(wanted[place], images[place])

        with decoding():
            if threads:
                in_chunks(work, len(rows))
            else:
                work(range(len(rows)))
        return images, self._labels(rows)

    def take(self, index: Tensor) -> ImageData:
        """The images (and labels) at int64 `[M]` indices, in memory."""
        images, labels = self.read(index, threads=True)
        return ImageData(images, labels, self.grey_levels, self.classes, self.name)

    def load(self) -> ImageData:
        """The whole set in memory, with its parts."""
        own = {"validation": self.validation, "test": self.test}
        parts: dict[str, Any] = {part: held and held.load() for part, held in own.items()}
        return dataclasses.replace(self.take(torch.arange(len(self))), **parts)

    def _read_one(self, row: int, out: Tensor) -> None:
        listing, (channels, height, width) = self.listing, self.image_shape
        image = decode(listing.open(row), listing.name(row), channels)
        if not self.fitted and image.size != (width, height):
            first = 0 if self.rows is None else int(self.rows[0])
            one, other = (listing.name(at).replace(f"{listing.root}{os.sep}", "") for at in (first, row))
            raise DataError(
                f"{listing.root}: sizes differ ({width} x {height} of {one}, {image.width} x {image.height} of "
                f"{other}): pass --size to bring all pictures to one size"
            )
        values = to_tensor(fit(image, (height, width)))
        out.copy_(values if self.grey_levels == 256 else values >> (9 - self.grey_levels.bit_length()))

    def _labels(self, rows: Tensor) -> Tensor | None:
        if self.classes is None:
            return None
        labels = self.listing.labels[rows].long()
        return labels if self.class_of is None else self.class_of[labels]

    # --- order ---

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """An epoch's order, a permutation of 0 .. N - 1. Rows of Parquet files stay near others of their row group."""
        count = len(self)
        if not isinstance(self.listing, ParquetListing):
            return torch.randperm(count, generator=generator)
        starts = self.listing.group_starts
        sizes = starts.diff()
        groups = torch.randperm(len(sizes), generator=generator)
        # Row groups in a random order, cut into stretches where one has passed another multiple of the window; then
        # all rows in a random order, sorted by stretch.
        stretch = torch.empty_like(groups)
        stretch[groups] = (sizes[groups].cumsum(0) - sizes[groups]) // self.listing.window
        order = torch.randperm(count, generator=generator)
        return order[stretch[self._groups_of(order)].argsort(stable=True)]

    def _groups_of(self, index: Tensor) -> Tensor:
        rows = index if self.rows is None else self.rows[index]
        assert isinstance(self.listing, ParquetListing)
        return torch.searchsorted(self.listing.group_starts, rows, right=True) - 1

    def _choose(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` random indices. Of Parquet files not from all row groups, each of which is read as a whole."""
        if not isinstance(self.listing, ParquetListing):
            return torch.randperm(len(self), generator=generator)[:count]
        group_of = self._groups_of(torch.arange(len(self)))
        held = group_of.bincount(minlength=len(self.listing.group_starts) - 1)
        groups = torch.randperm(len(held), generator=generator)
        groups = groups[held[groups] > 0]
        enough = int(torch.searchsorted(held[groups].cumsum(0), _SHARE * count)) + 1
        candidates = torch.isin(group_of, groups[: max(enough, _GROUPS)]).nonzero().flatten()
        return candidates[torch.randperm(len(candidates), generator=generator)[:count]]

    def split(
        self, *, seed: int, validation: int | float | None = None, test: int | float | None = None
    ) -> tuple[ImageStream, ImageData, ImageData]:
        """What `split` does for a stream: the training part stays one, the others are taken into memory.

        A part that the source has is taken from there, else from the training pictures. An int is a number of images, a
        float a fraction. Left out, they are at most 2000 images to validate and 10,000 to test on, and at most a tenth
        of the training pictures each where they are cut from those.
        """
        total = len(self)
        own = {"validation": self.validation, "test": self.test}
        wishes = {"validation": (validation, _VALIDATION), "test": (test, _TEST)}
        counts = {}
        for part, (wish, most) in wishes.items():
            available = total if own[part] is None else len(own[part])
            tenth = available if own[part] is not None else max(1, available // 10)
            counts[part] = min(most, tenth) if wish is None else part_size(wish, available, part)
        generator = torch.Generator().manual_seed(seed)
        cut = [part for part in counts if own[part] is None]
        chosen = self._choose(sum(counts[part] for part in cut), generator)
        if sum(counts[part] for part in cut) >= total:
            raise DataError(
                f"{self.name} has {total} images, so {' and '.join(f'{counts[part]} for {part}' for part in cut)} "
                "leave none to train on: ask for fewer"
            )
        held = {}
        for part, index in zip(cut, chosen.split([counts[part] for part in cut]), strict=True):
            held[part] = self.take(index)
        for part in counts.keys() - held.keys():
            held[part] = own[part].take(own[part]._choose(counts[part], generator))
        kept = torch.ones(total, dtype=torch.bool)
        kept[chosen] = False
        index = kept.nonzero().flatten()
        rows = index if self.rows is None else self.rows[index]
        train = dataclasses.replace(self.alone(), rows=rows if cut else self.rows)
        return train, held["validation"], held["test"]
