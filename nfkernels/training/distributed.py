"""Several processes, one run: what ``torchrun`` says about them, and how they agree.

Every rank (process) holds the whole flow, optimiser and averaged weights, and goes through its share of each batch;
gradients are averaged. Whatever decides how the run goes on (a signal, a callback's wish, a validation, a file that
cannot be written) is decided by all ranks together, so that none waits for one that has left. Rank 0 alone prints and
writes files; a run folder is read by all of them, so it must lie where all see it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TrainingError

# How long a rank waits for the others: rank 0 may be busy with pictures or a large file for a while.
_PATIENCE = datetime.timedelta(minutes=30)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How a broken connection reads: gloo and NCCL raise plain RuntimeErrors.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe", "TCPStore")


class FailedElsewhereError(TrainingError):
    """This rank is well, another one is not and tells why; nothing is left to say here."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that train one flow. ``Ranks()`` is a process of its own.

    Args:
        rank: 0 to ``world - 1``; rank 0 prints and writes.
        world: how many there are.
        local_rank: among those on this machine; the number of its GPU.

    Every method that exchanges something is called by all ranks alike, and does nothing for a single one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's rows of ``count``: contiguous, in the order of ranks, equal where ``world`` divides it."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        self.most([0])

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks; on the host, without waiting for a device's queue."""
        if self.world == 1:
            return list(values)
        import torch.distributed as dist

        both = torch.tensor(values, dtype=torch.int64, device=_exchange_device())
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return both.tolist()

    def any(self, flag: bool) -> bool:
        return bool(self.most([int(flag)])[0])

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` becomes its sum over all ranks, the same bits on each; nothing waits for a CUDA device."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """``tensor`` becomes its mean over all ranks."""
        return self.sum_(tensor) if self.world == 1 else self.sum_(tensor).div_(self.world)

    def from_main(self, value: Any = None) -> Any:
        """Rank 0's ``value`` (anything JSON-able) on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        device = _exchange_device()
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)], device=device)
        dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        data = data.to(device)
        dist.broadcast(data, 0)
        return json.loads(bytes(data.tolist()))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor`` (on the CPU, of one shape and type), in the order of ranks, on every rank."""
        if self.world == 1:
            return [tensor]
        import torch.distributed as dist

        own = tensor.to(_exchange_device())
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return [part.cpu() for part in parts]

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Every rank's tensors become rank 0's. ``TrainingError`` where another rank's differ in number or shape."""
        if self.world == 1:
            return
        import torch.distributed as dist

        tensors = list(tensors)
        own = [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]
        if self.any(own != self.from_main(own)):
            raise TrainingError("the ranks have different flows: build the same one on each")
        with torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                # Not every backend sends booleans: their bytes are sent.
                dist.broadcast(whole.view(torch.uint8) if whole.dtype == torch.bool else whole, 0)
                tensor.copy_(whole)

    def averaging(self, module: torch.nn.Module) -> torch.nn.Module:
        """``module`` such that each backward through it averages the gradients over all ranks (DDP); itself for one.

        Buffers are left alone: those of flows are constants, and :meth:`equalize` is there for the rest.
        """
        if self.world == 1:
            return module
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        # A replica that goes after its group drops the last reference to it and waits for its threads, holding the
        # interpreter's lock, which those may be waiting for. So the object stays: a few idle threads.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # from torch 2.13
        options: dict[str, Any] = {option: False}
        return DistributedDataParallel(module, **options)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Rank 0 does the work inside, or each its own; afterwards all have done it, or all raise.

        Nothing inside may exchange anything. A rank whose own work went well raises ``FailedElsewhereError``.
        """
        failed: BaseException | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if self.any(failed is not None) and failed is None:
            raise FailedElsewhereError("another rank failed")
        if failed is not None:
            raise failed

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, a connection that breaks is a ``TrainingError``: the others' end is mostly all that a rank sees."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, TrainingError) or not any(part in str(error) for part in _BROKEN):
                raise
            raise TrainingError(
                f"rank {self.rank} of {self.world} lost the others: one of them was killed or failed; go on from the "
                "last checkpoint, or let torchrun do it (--max-restarts)"
            ) from error


def launched() -> Ranks:
    """What torchrun's environment says; ``Ranks()`` where there is none. Nothing is started.

    Raises ``TrainingError`` for an environment that is incomplete or makes no sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0" if name == "LOCAL_RANK" and os.environ["WORLD_SIZE"] == "1" else "")
        if not text.isdecimal():
            raise TrainingError(
                f"the environment's {name} is {text!r}: expected a number, as torchrun sets it with "
                f"{', '.join(_VARIABLES)}; unset RANK and WORLD_SIZE for a single process"
            )
        numbers[name] = int(text)
    rank, world = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world:
        raise TrainingError(f"the environment's RANK is {rank} and its WORLD_SIZE {world}: ranks count from 0")
    if world > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise TrainingError(
                f"the environment has a WORLD_SIZE of {world} but no {' and no '.join(missing)}: start the processes "
                "with torchrun"
            )
    return Ranks(rank, world, numbers["LOCAL_RANK"])


def current() -> Ranks:
    """The ranks of the process group that is up; ``Ranks()`` where there is none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    local = os.environ.get("LOCAL_RANK", "")
    return Ranks(dist.get_rank(), dist.get_world_size(), int(local) if local.isdecimal() else 0)


@contextlib.contextmanager
def started(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Inside, the ranks can talk: gloo between CPUs, NCCL between GPUs. A group that is up already is used, and left.

    Args:
        device: where the flow is (to be); CUDA brings NCCL in, and needs a GPU for every rank on this machine.

    Raises ``TrainingError`` where the environment makes no sense, this PyTorch cannot do it, or the others do not come.
    """
    import torch.distributed as dist

    ranks = current()
    if ranks.world > 1 or launched().world == 1:
        with ranks.explained():
            yield ranks
        return
    ranks = launched()
    cuda = device is not None and torch.device(device).type == "cuda"
    if not dist.is_available():
        raise TrainingError(f"this PyTorch, {torch.__version__}, cannot train in {ranks.world} processes")
    if cuda:
        torch.cuda.set_device(device_of(ranks, device))
    global _groups
    _groups += 1
    try:
        # Host-side decisions go through gloo in any case: they wait for no kernel.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            # A group finds what an earlier one left in the store: each has a corner of its own.
            store=dist.PrefixStore(f"nfkernels/{restarts()}/{_groups}", _store(ranks)),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"rank {ranks.rank} of {ranks.world} did not find the others: {reason}") from error
    try:
        with ranks.explained():
            yield ranks
    except BaseException as error:
        # Now, while the others still see this rank: the first one that failed is the one that tells.
        if not isinstance(error, FailedElsewhereError):
            speaks_first()
        raise
    finally:
        dist.destroy_process_group()


def device_of(ranks: Ranks, device: torch.device | str) -> torch.device:
    """``device`` for this rank: of ``"cuda"`` (or cuda:0, what ``auto`` finds) the GPU with its local number.

    Raises ``TrainingError`` for another single GPU, which all ranks would share, and where there are too few.
    """
    device = torch.device(device)
    if ranks.world == 1 or device.type != "cuda":
        return device
    if device.index not in (None, 0, ranks.local_rank):
        raise TrainingError(f"{device} with {ranks.world} processes: ask for cuda, each takes the GPU of its rank")
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise TrainingError(
            f"this machine has {count} GPU{'s' * (count != 1)} and at least {ranks.local_rank + 1} processes: start "
            f"one for each (torchrun --nproc-per-node={count}), or train on the CPU"
        )
    return torch.device("cuda", ranks.local_rank)


# --- what lasts longer than a process -------------------------------------------------------------------------------


def restarts() -> int:
    """How often torchrun has started these processes again (0 at first, and without torchrun)."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def remember(ranks: Ranks, name: str, value: str) -> None:
    """Rank 0 leaves ``value`` with torchrun, for the processes that it starts should these be killed."""
    if ranks.is_main and _agent():
        _store(ranks).set(f"nfkernels/kept/{name}", value)


def remembered(ranks: Ranks, name: str) -> str | None:
    """What :func:`remember` left before the latest restart; None where there was none."""
    if not restarts() or not _agent():
        return None
    key, store = f"nfkernels/kept/{name}", _store(ranks)
    return store.get(key).decode() if store.check([key]) else None


def speaks_first() -> bool:
    """Whether this rank is the first that failed, and so the one that tells; the answer stays."""
    global _speaks
    if _speaks is None:
        try:
            ranks = launched()
            # Without a store that is there already, a rank would wait for one that has ended: all of them tell.
            alone = ranks.world == 1 or (_shared is None and not _agent())
            _speaks = alone or _store(ranks).add(f"nfkernels/{restarts()}/failed", 1) == 1
        except Exception:  # nobody to ask: better twice than never
            _speaks = True
    return _speaks


_groups = 0
_speaks: bool | None = None
_shared: Any = None


def _agent() -> bool:
    """Whether torchrun itself keeps the store: only then does it outlive these processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_ADDR" in os.environ


def _store(ranks: Ranks) -> Any:
    global _shared
    if _shared is None:
        import torch.distributed as dist

        port = os.environ["MASTER_PORT"]
        if not port.isdecimal():
            raise TrainingError(f"the environment's MASTER_PORT is {port!r}: expected a number, as torchrun sets it")
        hosts = ranks.is_main and not _agent()
        _shared = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(port), is_master=hosts, timeout=_PATIENCE, wait_for_workers=False
        )
    return _shared


def _exchange_device() -> torch.device:
    """Where small facts are exchanged: the CPU, unless the group that is up speaks NCCL only."""
    import torch.distributed as dist

    backends = dist.get_backend_config()
    return torch.device("cpu") if "cpu:" in backends else torch.device("cuda", torch.cuda.current_device())
