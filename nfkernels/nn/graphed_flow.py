"""A flow whose calls are played back from CUDA graphs: what small flows, whose time goes into launches, need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .graph import WARM_UPS, CapturedCall, CapturedPasses, Recorder, recorder_on

if TYPE_CHECKING:
    from .flow import Flow

_UNSET: Any = object()


class GraphedFlow:
    """``Flow.compile_graph``: log_prob, sample and a training step, each recorded once and then replayed.

    Results are those of the flow's own calls, bit for bit, and always in new memory. Every batch size has a recording
    of its own (8 at most, further ones run plainly), and so have the steps of either mode. ``log_prob`` and ``sample``
    are recorded in evaluation mode, in training mode they are plain calls. Parameters are read in place: train the
    flow, load a state into it, and the recordings follow; moved to another device or dtype it needs a new
    ``compile_graph``. Where there are no graphs (on a CPU) all calls are plain; where recording is impossible too, and
    a warning tells the reason once.

    Args:
        flow: any ``Flow``.
        optimizer: of the flow's parameters, for :meth:`step`; on CUDA one that offers ``capturable`` is made so.
        loss: ``(x, context) -> scalar`` that a step minimises; by default ``flow.nll``. All of its work must be the
            device's, random numbers from torch's own generator.
        recorder: what records; by default what the flow's device has.
        tell: called with the reason why something is not recorded; by default it is a warning.

    Raises ``ValueError`` where the flow's own calls do; a batch that is replayed is not looked at.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Callable[..., Tensor] | None = None,
        recorder: Recorder | None = _UNSET,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        device = next(flow.parameters(), torch.empty(0)).device
        recorder = recorder_on(device) if recorder is _UNSET else recorder
        self.flow, self.optimizer = flow, optimizer
        self._loss = flow.nll if loss is None else loss
        self._records = recorder is not None
        self._density = CapturedCall(flow._log_prob, recorder, "log_prob", tell=tell)
        self._passes = CapturedPasses(flow, recorder, tell=tell)
        # Dropout and the like: what one mode recorded is not what the other does.
        self._steps = {
            mode: CapturedCall(self._one_step, recorder, "the training step", tell=tell) for mode in (True, False)
        }
        if optimizer is not None and device.type == "cuda":
            _make_capturable(optimizer, device)

    @torch.no_grad()
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log p(x | context) [B]``, without gradients. Values are not looked at: NaN in, NaN out."""
        context = self.flow._matched(context, x)
        return (self.flow._log_prob if self.flow.training else self._density)(x, context)

    def sample(self, n: int = 1, context: Tensor | None = None, **options: Any) -> Tensor:
        """Samples ``[n, *event]``, or ``[n, B, *event]`` with a context ``[B, ...]``: as ``Flow.sample``."""
        with self._passes:
            return self.flow.sample(n, context, **options)

    def step(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """One step of the optimiser on a batch: gradients to zero, loss, backward, update. Returns the loss, a scalar.

        Raises ``ValueError`` without an optimiser.
        """
        if self.optimizer is None:
            raise ValueError("a training step needs an optimiser: flow.compile_graph(batch, optimizer=...)")
        return self._steps[self.flow.training](x, context)

    def _one_step(self, x: Tensor, context: Tensor | None) -> Tensor:
        with torch.enable_grad():
            # Gradients keep their memory: a recording writes where it wrote before.
            self.optimizer.zero_grad(set_to_none=not self._records)
            loss = self._loss(x, context)
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def prepare(self, x: Tensor, context: Tensor | None = None) -> GraphedFlow:
        """Records log_prob and sample for batches like this one, now. A step changes the weights: its first calls do.

        The random state stays as it was, so does the flow.
        """
        if not self._records or self.flow.training:
            return self
        z = self.flow.encode(x, context)
        for _ in range(WARM_UPS + 1):
            self.log_prob(x, context)
            with self._passes:
                self.flow.decode(z, context)
        return self


def _make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Adam and its like count their steps on the host unless told otherwise: a recording would never see it move."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
