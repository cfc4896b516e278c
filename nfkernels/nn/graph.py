"""CUDA graphs: a function's work on the device is recorded once, then played again without Python or launches.

Training, evaluation and sampling use it, and ``Flow.compile_graph``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .flow import Flow

# Calls that run as always before one is recorded: libraries load, allocate and choose their kernels in them. More of
# them under DistributedDataParallel, which rebuilds its buckets at first.
WARM_UPS, _WARM_UPS_OF_RANKS = 3, 11
# Sets of shapes that are recorded; further ones run as always.
_MOST = 8


class Recording(Protocol):
    """What was recorded: ``replay()`` does it again, and ``outputs`` are then the new ones, in the same memory."""

    outputs: Any

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What ``CapturedCall`` records with: ``CudaRecorder``, or anything else that behaves so."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Inside, calls run where recordings are made: the preparation of one."""

    def watched(self) -> contextlib.AbstractContextManager[list[str]]:
        """Gives a list that afterwards holds what happened inside and cannot be recorded, in words."""

    def record(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Recording:
        """Records ``function``, whose work is not done by that; raises where it cannot, with all as it was."""


class CapturedCall:
    """Calls a function of tensors: as always at first, then by playing back what one call did on the device.

    Results are those of plain calls, bit for bit, in new memory. Each set of shapes, dtypes and devices has a recording
    of its own, and so has each autocast setting. Where recording is impossible the reason is told once and every
    further call is a plain one. The function must do all of its work on the device, in the same way every time: what it
    reads beyond its inputs has to stay in the same memory, and what Python does in it is done in plain calls only.

    Args:
        function: of tensors (or None) on one device; returns None, a tensor, or a tuple of these.
        recorder: None for plain calls only.
        what: the function's name, as reasons are told: "the training step".
        generators: the ones that the function draws from, beside torch's own.
        with_ranks: whether the function talks to other ranks, if there are any.
        tell: called with the reason; by default it is a warning.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        recorder: Recorder | None,
        what: str,
        *,
        generators: Sequence[torch.Generator] = (),
        with_ranks: bool = False,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self._function, self._recorder, self._what = function, recorder, what
        self._generators, self._warm_ups = tuple(generators), WARM_UPS
        self._tell = tell if tell is not None else lambda told: warnings.warn(told, stacklevel=4)
        self._seen: dict[Any, int] = {}
        self._recordings: dict[Any, tuple[tuple[Tensor | None, ...], Recording]] = {}
        if recorder is not None and with_ranks and _ranks():
            self._warm_ups = _WARM_UPS_OF_RANKS
            if "nccl" not in _ranks():
                self._give_up(f"its ranks talk through {_ranks()}, which waits for the host; nccl does not")

    @property
    def captured(self) -> bool:
        """Whether there is a recording that calls are played from."""
        return bool(self._recordings)

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self._recorder is None:
            return self._function(*inputs)
        key = _key(inputs)
        if key not in self._recordings:
            seen = self._seen.get(key, 0)
            if seen == 0 and len(self._seen) == _MOST:
                return self._function(*inputs)
            self._seen[key] = seen + 1
            if seen < self._warm_ups:
                return self._warm_up(inputs, last=seen + 1 == self._warm_ups)
            if not self._record(key, inputs):
                return self._function(*inputs)
        own, recording = self._recordings[key]
        for place, given in zip(own, inputs, strict=True):
            if place is not None:
                place.copy_(given, non_blocking=True)
        recording.replay()
        return _copied(recording.outputs)

    def _warm_up(self, inputs: tuple[Tensor | None, ...], *, last: bool) -> Any:
        with self._recorder.aside():
            if not last:
                return self._function(*inputs)
            # Not in the first calls: there, libraries that load may wait for the device once.
            with self._recorder.watched() as found:
                outputs = self._function(*inputs)
        if found:
            self._give_up(found[0])
        return outputs

    def _record(self, key: Any, inputs: tuple[Tensor | None, ...]) -> bool:
        own = tuple(None if given is None else given.detach().clone() for given in inputs)
        try:
            with _without_cached_casts(own):
                recording = self._recorder.record(lambda: self._function(*own), self._generators)
        except Exception as error:  # of any kind: the same call is made again, plainly, and raises what is its own
            self._give_up(_in_a_line(error))
            return False
        self._recordings[key] = own, recording
        return True

    def _give_up(self, reason: str) -> None:
        self._recorder = None
        self._recordings.clear()
        self._tell(f"{self._what} runs without a CUDA graph, so more slowly: {reason}")


class CapturedPasses:
    """Inside ``with``, passes through a flow that need no gradients are played back: evaluation and sampling.

    Both directions of the flow's bijection, in evaluation mode; whatever else a method of the flow does (noise, the
    base) stays as it is. Parameters may change between passes, in place. Can be entered again and again.

    Args:
        flow: any ``Flow``.
        recorder: None changes nothing.
        tell: as in ``CapturedCall``.
    """

    def __init__(self, flow: Flow, recorder: Recorder | None, *, tell: Callable[[str], object] | None = None) -> None:
        self._bijection = flow.bijection
        self._calls = {}
        if recorder is not None:
            for name, what in (("forward", "evaluation"), ("inverse", "sampling")):
                self._calls[name] = CapturedCall(getattr(self._bijection, name), recorder, what, tell=tell)

    def __enter__(self) -> CapturedPasses:
        for name, call in self._calls.items():
            setattr(self._bijection, name, _without_gradients(self._bijection, getattr(self._bijection, name), call))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._calls:
            delattr(self._bijection, name)


def captured(flow: Flow, *, cuda_graph: bool = True) -> CapturedPasses:
    """``CapturedPasses`` of a flow where it is, for one ``with``; ``cuda_graph=False`` changes nothing in it."""
    device = next(flow.parameters(), torch.empty(0)).device
    return CapturedPasses(flow, recorder_on(device) if cuda_graph else None)


def recorder_on(device: torch.device) -> Recorder | None:
    """What records on a device: None where there are no graphs, and nothing that could be said about it."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """Records CUDA graphs, all on one stream and in one pool of memory: results are to be copied before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[str]]:
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            text = str(warning.message)
            if "called a synchronizing" in text:
                file = os.path.join(*warning.filename.split(os.sep)[-2:])
                found.append(f"{file}, line {warning.lineno}, waits for the device")
            elif not text.startswith("Synchronization debug mode"):  # a word on the mode itself
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def record(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Recording:
        # A capture that fails may leave generators believing that it still goes on; their copies do not.
        drawn_from = [torch.cuda.default_generators[self._device.index], *generators]
        before = [generator.clone_state() for generator in drawn_from]
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch find them by themselves, and say so
            for generator in generators:
                graph.register_generator_state(generator)
        gc.collect()  # a graph or an event that is freed while another is recorded breaks that
        # It may also leave its stream the current one. Other threads, such as those that load data, may go on working.
        here = torch.cuda.stream(torch.cuda.current_stream(self._device))
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        cause: Exception | None = None
        try:
            with torch.cuda.device(self._device), here, torch.cuda.graph(graph, **options):
                try:
                    outputs = function()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            for generator, state in zip(drawn_from, before, strict=True):
                generator.graphsafe_set_state(state)
            if cause is None or cause is error:
                raise
            raise cause from error  # the end of a broken capture raises as well, and knows less
        return _Cuda(graph, outputs)


class _Cuda:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.replay, self.outputs = graph.replay, outputs


def _without_gradients(bijection: torch.nn.Module, plain: Callable[..., Any], call: CapturedCall) -> Callable[..., Any]:
    """``call`` where it will do, else ``plain``."""

    def run(x: Tensor, context: Any = None, **options: Any) -> Any:
        tensors = isinstance(context, Tensor) or context is None
        if torch.is_grad_enabled() or bijection.training or options.get("lengths") is not None or not tensors:
            return plain(x, context, **options)
        return call(x, context)

    return run


def _ranks() -> str:
    """What the ranks of this run talk through; empty where there is one only."""
    distributed = torch.distributed
    return distributed.get_backend() if distributed.is_available() and distributed.is_initialized() else ""


def _key(inputs: tuple[Tensor | None, ...]) -> Any:
    kinds = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    devices = {t.device.type for t in inputs if t is not None}
    return kinds, tuple((d, torch.get_autocast_dtype(d)) for d in sorted(devices) if torch.is_autocast_enabled(d))


@contextlib.contextmanager
def _without_cached_casts(inputs: tuple[Tensor | None, ...]) -> Iterator[None]:
    """Inside, weights that the caller's autocast casts are cast anew, not taken from an earlier call: a recording would
    go on reading those copies when the weights have changed, or the copies are gone."""
    if not _key(inputs)[1]:  # an autocast within the function empties its cache by itself
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _copied(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.clone()
    return outputs if outputs is None else tuple(map(_copied, outputs))


def _in_a_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else 'it failed'} ({type(error).__name__})"
