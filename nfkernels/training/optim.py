"""One optimiser step that never waits for the device: AdamW, clipping, averaged weights, and steps that are skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .recipe import Recipe

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Optimizer:
    """AdamW over a flow's parameters, with the averaged (EMA) weights beside it.

    A step whose loss or gradient is not finite changes nothing. That is decided on the device (the fused AdamW reads a
    flag there), so nothing waits for it; ``skipped`` and ``longest_streak`` are counted there as well. Devices without
    a fused AdamW read the flag on the host.

    Args:
        flow: its parameters with ``requires_grad`` are trained, in the order of ``named_parameters``.
        recipe: the rest.
    """

    def __init__(self, flow: nn.Module, recipe: Recipe) -> None:
        named = {name: p for name, p in flow.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.parameters = list(named.values())
        self.recipe = recipe
        decayed = _decayed(flow)
        groups = [
            {"params": [p for p in self.parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        device = self.parameters[0].device
        self.fused = device.type in _FUSED_DEVICES
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.lr, betas=recipe.betas, fused=self.fused
        )
        self.averages = [p.detach().clone() for p in self.parameters]
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)

    def step(self, loss: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Applies the gradients of ``loss`` (already backpropagated) as step ``step``, counted from 0.

        Returns the gradient's norm before clipping and whether the step was skipped (0. or 1.), both on the device.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.recipe.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, norm, foreach=True)
        bad = (~torch.isfinite(loss.detach() + norm)).to(self.streak.dtype)
        self.skipped += bad
        self.streak = (self.streak + bad) * bad
        self.longest_streak = torch.maximum(self.longest_streak, self.streak)

        rate = self.recipe.lr_at(step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if self.fused:
            self.adam.grad_scale, self.adam.found_inf = None, bad
            self.adam.step()
        elif not bad:
            self.adam.step()
        if self.recipe.ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.parameters, 1 - self.recipe.ema_at(step))
        self.adam.zero_grad(set_to_none=True)
        return norm, bad

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
        """Averages, Adam's moments and step counts, and the counters, by name."""
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
            # Adam's step counts live on the CPU unless it is fused or capturable; exact copies, in any case.
            where = {"step": p.device if self.fused else torch.device("cpu")}
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
