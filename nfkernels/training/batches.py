"""Shuffled batches of an image set, on the device, in an order that can be taken up again."""

from __future__ import annotations

from typing import Any

import torch

from .data import DataError, ImageData


class Batches:
    """Endless shuffled batches of an ImageData on a device.

    Every epoch has its own permutation, drawn on the CPU from a generator that nothing else uses: the order depends on
    the seed alone, not on the device, and a saved state continues it bit for bit. The whole set lives on the device (as
    uint8, a byte per value), so that a batch costs one gather there and no copy from the host.

    Every image appears at most once per epoch. With drop_last, what is left at an epoch's end is smaller than a batch
    and is dropped, other images each time; without, it comes as a smaller batch. A batch_size above the number of
    images gives the whole set as every batch.

    Among several ranks each batch is shared out: rank r gets the rows ``r B / world`` to ``(r + 1) B / world`` of the
    batch of B images that a single process would get. Every rank draws the same permutations, and so all have the same
    state, which any number of ranks can take up.

    Args:
        data: `[N]` images, N at least 1.
        batch_size: images per batch, over all ranks.
        seed: of the generator, the same on every rank.
        device: where the images live and the batches appear.
        drop_last: see above.
        rank, world: which of how many processes this is.

    Raises:
        DataError: no images, fewer than ranks, a batch size below 1, or one that the ranks cannot share evenly.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}: expected at least 1")
        if batch_size % world:
            near = -(-batch_size // world) * world
            raise DataError(f"batch size {batch_size}: {world} processes cannot share it evenly, try {near}")
        if not len(data):
            raise DataError(f"{data.name}: there are no images to make batches of")
        if len(data) < world:
            raise DataError(f"{data.name}: {len(data)} images are too few for {world} processes")
        self._images = data.images.to(device)
        self._labels = None if data.labels is None else data.labels.to(device)
        # Of a set smaller than a batch some images are left out, others each time, where ranks could not share it.
        self._batch_size = min(batch_size, len(data) // world * world)
        self._rank, self._world = rank, world
        self._drop_last = drop_last
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._start_epoch()

    def next(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next batch, this rank's share: uint8 `[B, C, H, W]`, its labels int64 `[B]` or None, on the device."""
        return self.gather(self.next_index())

    def next_index(self) -> torch.Tensor:
        """Which images this rank's share of the next batch is made of, int64 `[B]` on the device: for ``gather``."""
        left = len(self._images) - self._position
        if left < (self._batch_size if self._drop_last else 1):
            self._epoch += 1
            self._start_epoch()
        index = self._order[self._position : self._position + self._batch_size]
        self._position += len(index)
        return index[self._rank * len(index) // self._world : (self._rank + 1) * len(index) // self._world]

    def gather(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images and labels of an index; work of the device alone, so that it can be captured in a graph."""
        images = self._images.index_select(0, index)
        return images, None if self._labels is None else self._labels.index_select(0, index)

    @property
    def epoch(self) -> int:
        """The epoch of the latest batch, counted from 0 (0 before the first batch)."""
        return self._epoch

    @property
    def epochs(self) -> float:
        """How often the set has been gone through: whole epochs and the part of the present one."""
        return self._epoch + self._position / len(self._images)

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Where the order stands: the generator's state at the start of the epoch (uint8), and ints."""
        return {
            "generator": self._generator_at_start.clone(),
            "epoch": self._epoch,
            "position": self._position,
            "images": len(self._images),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a `state_dict` was taken, in batches of this object's own size.

        Raises:
            DataError: the state is of a set with another number of images, or is incomplete.
        """
        missing = {"generator", "epoch", "position", "images"} - state.keys()
        if missing:
            raise DataError(f"the saved data order lacks {', '.join(sorted(missing))}: resume from another checkpoint")
        if int(state["images"]) != len(self._images):
            raise DataError(
                f"the saved data order is of {int(state['images'])} images but there are {len(self._images)}: "
                "resume with the data and split that the run began with"
            )
        self._generator.set_state(state["generator"].cpu())
        self._epoch = int(state["epoch"])
        self._start_epoch()
        self._position = int(state["position"])

    def _start_epoch(self) -> None:
        self._generator_at_start = self._generator.get_state()
        self._order = torch.randperm(len(self._images), generator=self._generator).to(self._images.device)
        self._position = 0
