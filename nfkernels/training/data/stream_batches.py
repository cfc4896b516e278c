"""Shuffled batches of a set that is decoded while it is trained on, in an order that can be taken up again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .image_data import DataError

if TYPE_CHECKING:
    from .stream import ImageStream

_MOST_WORKERS = 8


def default_workers() -> int:
    """Processes that decode for one rank: its share of the cores that may be used, less one for itself; 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(_MOST_WORKERS, share - 1))


class StreamBatches:
    """Endless shuffled batches of an ImageStream on a device; for a trainer, the same as ``Batches``.

    Every epoch has its own order, drawn from a generator that nothing else uses: it depends on the seed alone, not on
    the number of workers, and a saved state continues it bit for bit, with any number of ranks. Pictures in folders and
    tar files are permuted as a whole, exactly as ``Batches`` would; of Parquet files the row groups are permuted, and
    then their rows within stretches of some thousand.

    Every picture appears at most once per epoch, over all ranks. With drop_last, what is left at an epoch's end is
    smaller than a batch and is dropped; without, it comes as a smaller batch. A batch_size above the number of
    pictures gives the whole set as every batch.

    Args:
        stream: `[N]` pictures, N at least 1.
        batch_size: pictures per batch, over all ranks; a multiple of world.
        seed: of the generator.
        device: where the batches appear. To a CUDA device they are copied from pinned memory, without waiting.
        rank, world: of every batch, rank r gets the r-th of world equal parts.
        drop_last: see above.

    Raises:
        DataError: no pictures, a batch size below 1 or that world does not divide. From ``next``: a picture that
            cannot be read.
    """

    def __init__(
        self,
        stream: ImageStream,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}: expected at least 1")
        if batch_size % world:
            raise DataError(f"batch size {batch_size} cannot be shared equally by {world} processes")
        if not len(stream):
            raise DataError(f"{stream.name}: there are no images to make batches of")
        self._stream = stream
        self._device = torch.device(device)
        self._batch_size = min(batch_size, len(stream))
        self._rank, self._world, self._drop_last = rank, world, drop_last
        # Where the batch that was given last stands; the loader is ahead of it.
        self._epoch = self._position = 0
        self._starts = {0: torch.Generator().manual_seed(seed).get_state()}
        self._loaded: Iterator[Any] | None = None

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: uint8 `[B, C, H, W]` and its labels, int64 `[B]` or None, on the device."""
        if self._loaded is None:
            self._loaded = iter(self._loader())
        images, labels, self._epoch, self._position, error = next(self._loaded)
        if error is not None:
            self.close()
            raise DataError(error)
        for epoch in [epoch for epoch in self._starts if epoch < self._epoch]:
            del self._starts[epoch]
        images = images.to(self._device, non_blocking=True)
        return images, None if labels is None else labels.to(self._device, non_blocking=True)

    @property
    def epoch(self) -> int:
        """The epoch of the latest batch, counted from 0 (0 before the first batch)."""
        return self._epoch

    @property
    def epochs(self) -> float:
        """How often the set has been gone through: whole epochs and the part of the present one."""
        return self._epoch + self._position / len(self._stream)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Where the order stands: the generator's state at the start of the epoch (uint8), and ints."""
        return {
            "generator": self._starts[self._epoch].clone(),
            "epoch": self._epoch,
            "position": self._position,
            "images": len(self._stream),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a `state_dict` was taken, in batches of this object's own size and with its own ranks.

        Raises:
            DataError: the state is of a set with another number of images, or is incomplete.
        """
        missing = {"generator", "epoch", "position", "images"} - state.keys()
        if missing:
            raise DataError(f"the saved data order lacks {', '.join(sorted(missing))}: resume from another checkpoint")
        if int(state["images"]) != len(self._stream):
            raise DataError(
                f"the saved data order is of {int(state['images'])} images but there are {len(self._stream)}: "
                "resume with the data and split that the run began with"
            )
        self.close()
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._starts = {self._epoch: state["generator"].cpu().clone()}

    def close(self) -> None:
        """Ends the worker processes; the next batch, if one is asked for, starts new ones."""
        self._loaded = None  # the loader's iterator ends them when it goes

    def _loader(self) -> DataLoader:
        stream = self._stream.alone()
        workers = default_workers() if stream.workers is None else stream.workers
        at = self._epoch, self._position
        jobs = _Jobs(stream, self._batch_size, self._drop_last, self._rank, self._world, at, self._starts)
        return DataLoader(
            _Decoder(stream),
            batch_size=None,  # the sampler gives whole batches
            sampler=jobs,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of seeds that nothing uses; the global one is the run's
        )


class _Jobs:
    """A sampler for DataLoader: one rank's rows of every batch from a place on, with its epoch and where in it it ends.

    It knows nothing of the batches that it is made for, so that they go, and their workers with them, when they are no
    longer needed. ``starts`` is theirs, and gets the generator's state at the start of every epoch.
    """

    def __init__(
        self,
        stream: ImageStream,
        size: int,
        drop_last: bool,
        rank: int,
        world: int,
        at: tuple[int, int],
        starts: dict[int, Tensor],
    ) -> None:
        self._stream, self._size, self._least = stream, size, size if drop_last else 1
        self._rank, self._world, self._at, self._starts = rank, world, at, starts

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        epoch, position = self._at
        generator = torch.Generator()
        generator.set_state(self._starts[epoch])
        order = self._stream.shuffled(generator)
        while True:
            if len(order) - position < self._least:
                epoch, position = epoch + 1, 0
                self._starts[epoch] = generator.get_state()
                order = self._stream.shuffled(generator)
            batch = order[position : position + self._size]
            position += len(batch)
            first, end = (len(batch) * rank // self._world for rank in (self._rank, self._rank + 1))
            yield batch[first:end].clone(), epoch, position


class _Decoder(Dataset):
    """In the workers: from rows to pictures. Errors are results, because DataLoader would wrap them in a traceback."""

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream

    def __getitem__(self, job: tuple[Tensor, int, int]) -> tuple[Tensor | None, Tensor | None, int, int, str | None]:
        index, epoch, position = job
        try:
            return *self._stream.read(index), epoch, position, None
        except DataError as error:
            return None, None, epoch, position, str(error)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole group; the trainer decides what it means, and ends its workers. (A worker whose trainer
    # was killed notices that by itself.) SIGTERM ends a worker, whatever handler the trainer has for itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
