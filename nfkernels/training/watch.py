"""What is told of a training that goes wrong: which layer, and what to try."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnostics.symptoms import Finding, diagnose, look, steepest_layer
from .samples import batch_loss, batch_noise, is_image_flow
from .session import computing

if TYPE_CHECKING:
    from ..nn import Flow

# A loss that lies this far above the lowest so far has exploded, in nats per dimension: a factor of 20 in every scale.
_ROSE = 3.0
_NAMED = 3  # layers beside the first that a warning names

Batch = tuple[Tensor, Tensor | None]


class Watch:
    """Looks at a flow in training when its trainer asks, and warns once of each thing that it finds.

    It is asked when something is wrong already, and at validations: one forward of a few dozen samples. The flow,
    torch's generators and the run's own are left as they are, so that a run is the same, bit for bit, with it.

    Args:
        flow: in training.
        batch: gives the samples and contexts to look at, on the flow's device.
        precision: that the networks are trained in.
    """

    def __init__(self, flow: Flow, batch: Callable[[], Batch], precision: str) -> None:
        self._flow, self._batch, self._precision = flow, batch, precision
        self._told: set[tuple[str, str]] = set()
        self._lowest = math.inf

    def remember(self, history: Iterable[dict[str, Any]], loss_key: str) -> None:
        """What an earlier part of the run has seen and told, from its metrics."""
        for entry in history:
            if "warning" in entry:
                self._told.add((entry.get("fault", ""), entry.get("layer", "")))
            if isinstance(entry.get(loss_key), (int, float)):
                self._lowest = min(self._lowest, entry[loss_key])

    def look(self) -> list[dict[str, str]]:
        """What is wrong now and has not been told yet: warned of here, and returned for the metrics."""
        new: dict[tuple[str, str], Finding] = {}
        for finding in self._found():
            # What raises now but not in training is the look itself, which no run has to hear of.
            if finding.kind != "raises" and (finding.kind, finding.layer) not in self._told:
                new.setdefault((finding.kind, finding.layer), finding)
        for kind in dict.fromkeys(kind for kind, _ in new):
            warnings.warn(_together([finding for finding in new.values() if finding.kind == kind]), stacklevel=2)
        return [self._entry(finding.kind, finding.layer, str(finding)) for finding in new.values()]

    def loss(self, value: float | None) -> list[dict[str, str]]:
        """The mean loss since the last log: where it has exploded, what did it. Costs nothing while it has not."""
        if value is None or not math.isfinite(value):
            return []
        self._lowest = min(self._lowest, value)
        rise = value - self._lowest
        nats = rise * math.log(2) if is_image_flow(self._flow) else rise / max(1, self._flow.base.shape.numel())
        if nats < _ROSE or ("loss", "") in self._told:
            return []
        cause = self.cause() or "no single layer stands out, so look at the data"
        text = f"the loss rose from {self._lowest:.4g} to {value:.4g}: {cause}"
        return self._tell(
            "loss", "", f"{text}; try a lower learning rate (--lr), a longer --warmup or stronger clipping (--clip)"
        )

    def cause(self) -> str:
        """The first thing that is wrong, or the layer where most happens, as a clause; empty where nothing is seen."""
        found = self._found()
        if found:
            return found[0].what
        with contextlib.suppress(Exception):  # no look is worth a run
            return self._bad_gradient() or steepest_layer(self._computing(look)) or ""
        return ""

    def raising_layer(self) -> str:
        """The layer that raises on the way, empty where none does."""
        found = self._found()
        return found[0].layer if found and found[0].kind == "raises" else ""

    def _bad_gradient(self) -> str:
        """The parameter nearest to the loss whose gradient is not finite, as a clause; empty where there is none."""
        samples, context = self._batch()
        noise = batch_noise(self._flow, samples, torch.Generator(samples.device).manual_seed(0))
        named = [(name, p) for name, p in self._flow.named_parameters() if p.requires_grad]
        devices = [samples.device] if samples.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), computing(self._precision, samples.device):
            loss = batch_loss(self._flow, samples, context, noise)
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, _), gradient in reversed(list(zip(named, found, strict=True))):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"the gradient of {name} is not finite"
        return ""

    def _found(self) -> list[Finding]:
        try:
            return self._computing(diagnose)
        except Exception:  # no look is worth a run
            return []

    def _computing(self, function: Callable[..., Any]) -> Any:
        samples, context = self._batch()
        with computing(self._precision, samples.device):
            return function(self._flow, samples, context)

    def _tell(self, fault: str, layer: str, text: str) -> list[dict[str, str]]:
        if (fault, layer) in self._told:
            return []
        warnings.warn(text, stacklevel=2)
        return [self._entry(fault, layer, text)]

    def _entry(self, fault: str, layer: str, text: str) -> dict[str, str]:
        self._told.add((fault, layer))
        return {"fault": fault, "layer": layer, "warning": text}


def _together(found: list[Finding]) -> str:
    """One sentence about findings of one kind, which have one cause as a rule: the first, and the others' layers."""
    first, *others = found
    if not others:
        return str(first)
    names = ", ".join(finding.layer for finding in others[:_NAMED])
    names += f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return f"{first.what}, and so it is in {len(others)} more ({names}); {first.advice}"
