"""The state of a run, and the four things done with it: step, log, validate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn.graph import CapturedCall, CapturedPasses, recorder_on
from ..nn.serialize import with_index_permutations
from .batches import Batches
from .checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from .data.image_data import DataError
from .distributed import Ranks
from .errors import TrainingError
from .evaluation import mean_loss
from .optim import Optimizer
from .recipe import Recipe
from .run_folder import RunFolder
from .samples import Samples, batch_loss, batch_noise, unit_of
from .session import computing
from .step import LossModule, TrainStep, check_recipe
from .watch import Watch

if TYPE_CHECKING:
    from ..nn import Flow
    from .data import ImageStream

# A run ends after this many steps in a row without a finite loss and gradient.
MAX_BAD_STEPS = 10
# Samples that data-dependent layers (ActNorm) see before the first step: more than a batch, for steadier statistics,
# unless the samples are large.
_START_SAMPLES, _START_VALUES = 512, 2**22
# Samples that are looked at for what goes wrong; fewer of large ones, but two.
_LOOK_SAMPLES, _LOOK_VALUES = 64, 2**20
# What each random stream is for; the seeds of two streams never meet.
_ORDER, _NOISE, _DROPOUT, _START, _VALIDATION, _LOOK = range(6)


@dataclasses.dataclass
class Best:
    """The best validation so far, and how many there have been since."""

    loss: float | None = None
    step: int = 0
    stale: int = 0
    latest: float | None = None


class Trainer:
    """One run of one flow. ``fit`` drives it; everything that a resumed run needs is in here.

    Among several ranks all of them call the same methods in the same order. Rank 0 writes; the rest is alike.
    """

    def __init__(
        self,
        flow: Flow,
        data: Samples | ImageStream,
        validation: Samples | None,
        recipe: Recipe,
        folder: RunFolder | None,
        ranks: Ranks | None = None,
        *,
        cuda_graph: bool = True,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        check_recipe(recipe, flow, len(data), ranks=self.ranks.world)
        self.flow, self.recipe, self.folder = flow, recipe, folder
        self.writes = folder is not None and self.ranks.is_main
        self.device = next(flow.parameters()).device
        self.config: dict[str, Any] = {}
        self.at = 0
        self.best = Best()
        self.best_weights: dict[str, Tensor] | None = None
        self.history: list[dict[str, Any]] = []
        self.saved_at: int | None = None
        self.loss_key = "bpd" if unit_of(flow) == "bits/dim" else "nll"
        self._identity = {"train": data.fingerprint(), "validation": validation.fingerprint() if validation else None}
        self.validation = validation and Samples(
            validation.images.to(self.device),
            None if validation.labels is None else validation.labels.to(self.device),
            validation.name,
        )
        self._batches = data.batches(
            recipe.batch_size,
            seed=self._seed(_ORDER),
            device=self.device,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        self.batch_size = min(recipe.batch_size, len(data))
        self._noise = self._generator(_NOISE)
        self._data = data
        self._optimizer: Optimizer | None = None
        self._recorder = recorder_on(self.device) if cuda_graph else None
        self._passes = CapturedPasses(flow, self._recorder)
        self._watch = Watch(flow, self._looked_at, recipe.precision)
        self._skipped = 0.0  # steps, at the last log
        self._window = torch.zeros(3, device=self.device)  # sums since the last log: loss, gradient norm, good steps
        # Dropout draws from torch's own generators: a stream for each rank, far from all other seeds.
        torch.manual_seed(self._seed(_DROPOUT) + (self.ranks.rank << 40))
        # A program builds the same flow in every process only if it seeds them alike: nobody has to think of that.
        self.ranks.equalize([*flow.parameters(), *flow.buffers()])

    def begin(self) -> None:
        """The start of a new run: data-dependent layers see data, and the folder is seen to be writable."""
        generator = torch.Generator().manual_seed(self._seed(_START))
        affordable = max(self.batch_size, _START_VALUES // max(math.prod(self._data.image_shape), 1))
        samples, context = self._data.sample(min(_START_SAMPLES, affordable), generator)
        # Each rank takes its share of them; the layers put the statistics together.
        share, of = self.ranks.share(len(samples)), len(samples)
        samples = samples[share].to(self.device)
        context = None if context is None else context[share].to(self.device)
        noise = batch_noise(self.flow, samples, self._generator(_START), (share.start, of))
        self.flow.train()
        with torch.no_grad():
            batch_loss(self.flow, samples, context, noise)
        self._prepare()
        if self.folder is not None:
            with self.ranks.together():
                if self.writes:
                    self.folder.begin()
                    self.folder.write_config(self.config)
            # First of all the checkpoint: a run that is killed before its first validation can be resumed, too.
            self.save()
            with self.ranks.together():
                if self.writes:
                    try:
                        self.flow.save(self.folder.model)
                    except Exception:  # a flow that cannot be described: the folder is to be free for the next attempt
                        self.folder.checkpoint.unlink(missing_ok=True)
                        raise

    def _prepare(self) -> None:
        """What a step needs, once the flow has the weights that it starts from."""
        self._optimizer = Optimizer(self.flow, self.recipe)
        # DistributedDataParallel keeps the nodes that add gradients up, and these work on the stream they were made on.
        with contextlib.nullcontext() if self._recorder is None else self._recorder.aside():
            loss = self.ranks.averaging(LossModule(self.flow, self.recipe.precision))
        step = TrainStep(loss, self._optimizer, self._window, self._noise, ranks=self.ranks)
        batches: Any = self._batches
        # What lies on the device is gathered in the captured step, from an index; what is streamed comes as batches.
        resident = isinstance(batches, Batches)
        self._next = batches.next_index if resident else batches.next
        self._step = CapturedCall(
            (lambda index: step.run(*batches.gather(index))) if resident else step.run,
            self._recorder,
            "the training step",
            generators=[self._noise],
            with_ranks=True,
        )

    def step(self) -> None:
        """One optimiser step. Nothing in here waits for the device."""
        batch = self._next()
        self._optimizer.prepare(self.at)
        try:
            self._step(*((batch,) if isinstance(batch, Tensor) else batch))
        except ValueError as error:  # a layer that has become singular says so
            if self.at == 0:
                raise
            layer = self._watch.raising_layer()
            where = f" in {layer}" if layer else ""
            raise TrainingError(
                f"the flow broke at step {self.at + 1}{where}: {error}{self._kept()}; try a lower learning rate (--lr)"
            ) from error
        self.at += 1

    def log(self) -> dict[str, Any]:
        """Reads what was summed since the last log (the only wait for the device) and writes a line of metrics."""
        optimizer = self._optimizer
        numbers = torch.cat((self._window, torch.stack((optimizer.skipped, optimizer.longest_streak)))).tolist()
        loss, norm, good, skipped, streak = numbers
        self._window.zero_()
        if streak >= MAX_BAD_STEPS:
            cause = self._watch.cause()
            raise TrainingError(
                f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row before step {self.at}"
                f"{cause and f' ({cause})'}, so the run was stopped{self._kept()}; try a lower learning rate (--lr) or "
                "a lower --clip"
            )
        entry: dict[str, Any] = {"step": self.at, self.loss_key: loss / good if good else None}
        entry |= {"lr": self.recipe.lr_at(self.at - 1), "gradient_norm": norm / good if good else None}
        if skipped:
            entry["skipped"] = int(skipped)
        self._record(entry)
        if self.ranks.is_main:
            self._tell(self._watch.loss(entry[self.loss_key]))
            if skipped > self._skipped:
                self.look()
        self._skipped = skipped
        return entry

    def look(self) -> None:
        """Looks for what goes wrong, and warns of it: a forward of some dozen samples, on rank 0."""
        if self.ranks.is_main:
            self._tell(self._watch.look())

    def _tell(self, faults: list[dict[str, str]]) -> None:
        for fault in faults:
            self._record({"step": self.at, **fault})

    def _looked_at(self) -> tuple[Tensor, Tensor | None]:
        """Samples held out from training where there are some, the same every time."""
        count = max(2, min(_LOOK_SAMPLES, _LOOK_VALUES // max(math.prod(self._data.image_shape), 1)))
        held = self.validation
        if held is not None:
            return held.images[:count], None if held.labels is None else held.labels[:count]
        samples, context = self._data.sample(count, torch.Generator().manual_seed(self._seed(_LOOK)))
        return samples.to(self.device), None if context is None else context.to(self.device)

    def validate(self) -> dict[str, Any]:
        """The averaged weights on the validation samples, with the same noise every time; keeps them if best. In the
        precision that they are trained in, which is the one that they will be used in."""
        self._settle()
        with self._optimizer.averaged(), self._passes, computing(self.recipe.precision, self.device):
            loss = mean_loss(
                self.flow,
                self.validation,
                draws=self.recipe.validation_draws,
                generator=self._generator(_VALIDATION),
                ranks=self.ranks,
            )
            best = self.best
            best.latest = loss
            if math.isfinite(loss) and (best.loss is None or loss < best.loss):
                best.loss, best.step, best.stale = loss, self.at, 0
                self._keep()
            else:
                best.stale += 1
        self.flow.train()
        return self._record({"step": self.at, f"validation_{self.loss_key}": loss if math.isfinite(loss) else None})

    def keep_averaged(self) -> None:
        """The averaged weights as they are become those that are kept: for runs that have no best yet."""
        self._settle()
        with self._optimizer.averaged():
            self._keep()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, a file of the run that cannot be written is a ``TrainingError`` that says what survives."""
        try:
            yield
        except OSError as error:
            if self.folder is None or error.filename is None:
                raise
            written = Path(os.fspath(error.filename))
            if written != self.folder.path and self.folder.path not in written.parents:
                raise
            where = f" at step {self.at}{self._kept()}" if self.at else ""
            raise TrainingError(f"{written} cannot be written ({error.strerror}); the run stopped{where}") from error

    def restore_best(self) -> None:
        """The flow gets the weights that were kept, for use."""
        if self.best_weights is not None:
            self.flow.load_state_dict(self.best_weights)
        self.flow.eval()

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all. Every rank returns when it is on the disk."""
        if self.folder is None:
            return
        self._settle()
        order = self._batches.state_dict()
        tensors = {
            "flow": self.flow.state_dict(),
            "best": self.best_weights or {},
            "optimizer": self._optimizer.state_dict(),
            "random": {
                **rng_state(self.device, self.ranks),
                "noise": self._noise.get_state(),
                "order": order.pop("generator"),
            },
            "window": {"sums": self._window},
        }
        facts = {
            "step": self.at,
            "recipe": dataclasses.asdict(self.recipe),
            "best": dataclasses.asdict(self.best),
            "order": order,
            "data": self._identity,
            "config": self.config,
            "ranks": self.ranks.world,
        }
        with self.ranks.together():
            if self.writes:
                # The checkpoint vouches for these lines: they are on the disk before it is.
                facts["metrics_size"] = self.folder.flush_metrics()
                save_checkpoint(self.folder.checkpoint, tensors, facts)
        self.saved_at = self.at

    def load(self) -> None:
        """Takes up the folder's checkpoint, bit for bit if it was made by as many ranks.

        Raises ``TrainingError`` where it does not fit flow or data.
        """
        with self.ranks.together():
            self._load()
        # Only now: another rank may not have read the checkpoint that the next one replaces, or these lines, before.
        with self.ranks.together():
            self.history = self.folder.history()
        self._watch.remember(self.history, self.loss_key)
        self.flow.train()

    def _load(self) -> None:
        path = self.folder.checkpoint
        tensors, facts = load_checkpoint(path)
        for part, given in self._identity.items():
            if facts["data"].get(part) != given:
                raise TrainingError(
                    f"the {part} data is not what {path} was trained with: resume with the same data, split and seed"
                )
        try:
            now = self.flow.state_dict()
            self.flow.load_state_dict(with_index_permutations(tensors["flow"], now))
            self._prepare()
            self._optimizer.load_state_dict(tensors["optimizer"])
            self._skipped = float(self._optimizer.skipped)
            self._batches.load_state_dict({**facts["order"], "generator": tensors["random"]["order"]})
            self._noise.set_state(tensors["random"]["noise"])
            set_rng_state(tensors["random"], self.device, self.ranks)
            self._window.copy_(tensors["window"]["sums"])
            best = with_index_permutations(tensors.get("best", {}), now)
            best = {name: tensor.to(self.device) for name, tensor in best.items()}
            own = {name: tensor.shape for name, tensor in self.flow.state_dict().items()}
            if best and {name: tensor.shape for name, tensor in best.items()} != own:
                raise DataError("its best weights are not those of the flow")
            self.best, self.best_weights = Best(**facts["best"]), best or None
            self.at = self.saved_at = facts["step"]
            if self.writes:
                self.folder.resume(facts["metrics_size"])
        except (KeyError, TypeError, DataError) as error:
            raise TrainingError(f"{path} is not a checkpoint of this run ({error})") from error
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise TrainingError(f"{path} is of another flow: {reason}") from error

    def _settle(self) -> None:
        """Buffers that a step changes (a batch normalisation's) become equal on all ranks, as parameters always are."""
        self.ranks.equalize(self.flow.buffers())

    def _keep(self) -> None:
        self.best_weights = {name: tensor.detach().clone() for name, tensor in self.flow.state_dict().items()}
        if self.folder is not None:
            with self.ranks.together():
                if self.writes:
                    self.flow.save(self.folder.model)

    def _record(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.history.append(entry)
        if self.writes:  # an error here stops this rank; the others hear of it when next they meet
            self.folder.log(entry)
        return entry

    def _kept(self) -> str:
        if self.folder is None:
            return ""
        if self.saved_at is None:
            return " (there was no checkpoint yet)"
        return f"; the checkpoint of step {self.saved_at} is kept in {self.folder.path}"

    def _seed(self, stream: int) -> int:
        return self.recipe.seed * 8 + stream

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._seed(stream))
