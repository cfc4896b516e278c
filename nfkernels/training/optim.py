"""One optimiser step that never waits for the device: clipping, averaged weights, and steps that are skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# Where a step can be captured in a graph: whatever changes from step to step is read from the device there.
_CAPTURING_DEVICES = ("cuda",)
_CLASSES = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax}


class Optimizer:
    """Adam, AdamW or Adamax over a flow's parameters, with the averaged (EMA) weights beside it.

    A step whose loss or gradient is not finite leaves parameters, moments and step counts as they are; the averaged
    weights move on towards those unchanged parameters, which costs them nothing. It is decided on the device, so
    nothing waits for it: the fused Adam and AdamW read a flag there, Adamax (torch has no fused one) takes its step
    and gets its former state back. ``skipped`` and ``longest_streak`` are counted on the device as well. Devices
    with neither read the flag on the host.

    Args:
        flow: its parameters with ``requires_grad`` are trained, in the order of ``named_parameters``.
        recipe: the rest.
    """

    def __init__(self, flow: nn.Module, recipe: Recipe) -> None:
        named = {name: p for name, p in flow.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.parameters: list[Tensor] = list(named.values())
        self.recipe = recipe
        decayed = _decayed(flow)
        groups = [
            {"params": [p for p in self.parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        device = self.parameters[0].device
        self.capturable = device.type in _CAPTURING_DEVICES
        self.fused = recipe.optimizer != "adamax" and device.type in _FUSED_DEVICES
        self.undoes = not self.fused and (self.capturable or device.type == "cpu")
        options = {"lr": recipe.lr, "betas": recipe.betas, "capturable": self.capturable}
        if recipe.optimizer != "adamax":
            options["fused"] = self.fused
        self.adam = _CLASSES[recipe.optimizer]([group for group in groups if group["params"]], **options)
        # What torch warns of, a capturable optimiser outside a graph, is what warming up for one is.
        self.adam._warned_capturable_if_run_uncaptured = True
        self.averages = [p.detach().clone() for p in self.parameters]
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self._average_weight: Any = 1.0  # a tensor where steps are captured
        if self.capturable:
            self._rate, self._average_weight = (torch.zeros((), device=device) for _ in range(2))
            for group in self.adam.param_groups:
                group["lr"] = self._rate

    def step(self, loss: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Applies the gradients of ``loss`` (already backpropagated) as step ``step``, counted from 0.

        Returns the gradient's norm before clipping and whether the step was skipped (0. or 1.), both on the device.
        """
        self.prepare(step)
        return self.apply(loss)

    def prepare(self, step: int) -> None:
        """What step ``step``, counted from 0, is to use: its learning rate, and how far averages move.

        All that :meth:`apply` does not read from the device, so that a captured one can be played again.
        """
        rate, weight = self.recipe.lr_at(step), 1 - self.recipe.ema_at(step)
        if self.capturable:
            self._rate.fill_(rate)
            self._average_weight.fill_(weight)
            return
        self._average_weight = weight
        for group in self.adam.param_groups:
            group["lr"] = rate

    def apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`step` as it was prepared for."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.recipe.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, norm, foreach=True)
        bad = (~torch.isfinite(loss.detach() + norm)).to(self.streak.dtype)
        self.skipped += bad
        self.streak.add_(bad).mul_(bad)
        torch.maximum(self.longest_streak, self.streak, out=self.longest_streak)

        if self.fused:
            self.adam.grad_scale, self.adam.found_inf = None, bad
            self.adam.step()
        elif self.undoes:
            self._step_or_not(bad)
        elif not bad:
            self.adam.step()
        if self.recipe.ema:
            self._average()
        self.adam.zero_grad(set_to_none=True)
        return norm, bad

    @torch.no_grad()
    def _step_or_not(self, bad: Tensor) -> None:
        """A step of an optimiser that knows no flag; where it was bad, everything gets its former value."""
        trained = [p for p in self.parameters if p.grad is not None]
        for p in trained:
            if not self.adam.state[p]:  # as torch makes it in the first step, which may be a bad one
                count = torch.zeros((), device=p.device if self.capturable else "cpu")
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_inf")}
                self.adam.state[p].update({"step": count, **moments})
        touched = [*trained, *(value for p in trained for value in self.adam.state[p].values())]
        former = [tensor.clone() for tensor in touched]
        self.adam.step()
        for tensor, old in zip(touched, former, strict=True):
            torch.where(bad > 0, old, tensor, out=tensor)

    @torch.no_grad()
    def _average(self) -> None:
        weight = self._average_weight
        if not isinstance(weight, Tensor):
            torch._foreach_lerp_(self.averages, self.parameters, weight)
            return
        # The lists' lerp takes no weight from the device.
        way = torch._foreach_sub(self.parameters, self.averages)
        torch._foreach_mul_(way, weight)
        torch._foreach_add_(self.averages, way)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the flow holds the averaged weights; afterwards, bit for bit, those being trained."""
        if not self.recipe.ema:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages, moments and step counts, and the counters, by name."""
        state = {f"average.{name}": average for name, average in zip(self.names, self.averages, strict=True)}
        for name, p in zip(self.names, self.parameters, strict=True):
            for key, value in self.adam.state.get(p, {}).items():
                state[f"adam.{key}.{name}"] = value
        for name in ("skipped", "streak", "longest_streak"):
            state[name] = getattr(self, name)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a ``state_dict`` of the same flow. ``KeyError`` or ``RuntimeError`` where it does not fit."""
        with torch.no_grad():
            for name, average in zip(self.names, self.averages, strict=True):
                average.copy_(state[f"average.{name}"])
        keys = {key.split(".", 2)[1] for key in state if key.startswith("adam.")}
        for name, p in zip(self.names, self.parameters, strict=True):
            own = {key: state[f"adam.{key}.{name}"] for key in keys if f"adam.{key}.{name}" in state}
            # Step counts live on the CPU unless the optimiser is fused or capturable; exact copies, in any case.
            where = {"step": p.device if self.fused or self.capturable else torch.device("cpu")}
            self.adam.state[p] = {key: value.to(where.get(key, p.device), copy=True) for key, value in own.items()}
        for name in ("skipped", "streak", "longest_streak"):
            getattr(self, name).copy_(state[name])


def _decayed(flow: nn.Module) -> set[int]:
    """The weights that decay: of the conditioners' convolutions (``GlowSteps`` stacks them, on four axes) and linear
    layers. Not the flow's own matrices, and not the priors, which have a few parameters and all of the data."""
    from ..nn.split_prior import ZeroConv

    decayed = set()
    for module in flow.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            decayed.add(id(module.weight))
        elif not isinstance(module, ZeroConv):
            decayed |= {id(p) for p in module.parameters(recurse=False) if p.dim() == 4}
    return decayed
