"""A contender ready to run: its loss, its whole training step, its samples and its inverse, whoever made the model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn

from nfkernels.models import Glow
from nfkernels.nn.graph import captured
from nfkernels.training import Batches, Recipe
from nfkernels.training.samples import Samples
from nfkernels.training.trainer import Trainer

from ..models import normflows_glow, plain_glow
from .setups import Contender, Setup

CAPTURED_AFTER = 5  # steps of ours, the first of which run as always
RECIPE = Recipe(steps=10**9, lr=1e-4, warmup=0, schedule="constant")


class Unavailable(Exception):
    """A contender that cannot take part here, and why."""


class Ready:
    """What all contenders have. ``model`` is on the device and holds the weights of ``glow``."""

    model: nn.Module

    def __init__(self, contender: Contender, setup: Setup, device: torch.device) -> None:
        self.contender, self.setup, self.device = contender, setup, device

    def loss(self, x: Tensor) -> Tensor:
        """Mean bits per dimension of dequantised x in [0, 1), as the training step computes them."""
        raise NotImplementedError

    def dequantized(self, images: Tensor) -> Tensor:
        return (images + torch.rand(images.shape, device=images.device)) / self.setup.grey_levels

    def from_images(self, images: Tensor) -> Tensor:
        return self.loss(self.dequantized(images))

    def stepper(self, images: Tensor, recipe: Recipe) -> Callable[[], Any]:
        """The whole step: draw a batch, dequantise, forward, backward, clip, AdamW, average the weights."""
        raise NotImplementedError

    def sample(self, count: int) -> Tensor:
        raise NotImplementedError

    def rebuilt(self, x: Tensor) -> Tensor:
        """x through the flow and back."""
        raise NotImplementedError

    def named_gradients(self) -> dict[str, Tensor]:
        """Gradients by the names of ``plain_glow.pairs``, in its shapes."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)


class Ours(Ready):
    def __init__(self, contender: Contender, setup: Setup, glow: Glow, device: torch.device) -> None:
        super().__init__(contender, setup, device)
        self.model = build(setup, contender.memory)
        self.model.load_state_dict(glow.state_dict())
        self.model.to(device)
        self.passes = captured(self.model, cuda_graph=contender.graph)
        self.like = plain_glow.PlainGlow(setup.shape, **options(setup)).to("meta")

    def precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.contender.precision is not None)

    def dequantized(self, images):
        return self.model.dequantize(images)

    def loss(self, x):
        with self.precision():
            return self.model.nll(x)

    def stepper(self, images, recipe):
        return self.trainer(images, recipe).step

    def trainer(self, images: Tensor, recipe: Recipe) -> Trainer:
        precision = "float32" if self.contender.precision is None else "bfloat16"
        recipe = dataclasses.replace(recipe, precision=precision)
        samples = Samples(images, None, "images")
        trainer = Trainer(self.model, samples, None, recipe, None, cuda_graph=self.contender.graph)
        trainer.begin()
        if self.contender.graph:
            for _ in range(CAPTURED_AFTER):
                trainer.step()
            if not trainer._step.captured:
                raise RuntimeError("the training step was not captured in a graph")
        return trainer

    def sample(self, count):
        with self.precision(), self.passes:
            return self.model.sample(count)

    @torch.no_grad()
    def rebuilt(self, x):
        with self.precision():
            return self.model.decode_continuous(self.model.encode(x))

    def named_gradients(self):
        pairs = plain_glow.pairs(self.like, self.model)
        return {name: view(ours.grad) for name, _, ours, view in pairs if ours.grad is not None}


class Theirs(Ready):
    """A plain model, or normflows'."""

    def __init__(self, contender: Contender, setup: Setup, glow: Glow, device: torch.device) -> None:
        super().__init__(contender, setup, device)
        if contender.maker == "normflows":
            self.home, more = normflows_glow, {}
            try:
                self.model = normflows_glow.NormflowsGlow(setup.shape, **options(setup))
            except ModuleNotFoundError as error:
                raise Unavailable("normflows is not installed") from error
            except ValueError as error:
                raise Unavailable(str(error)) from error
        else:
            self.home, more = plain_glow, {"autocast": contender.precision}
            self.model = plain_glow.PlainGlow(setup.shape, **options(setup), **more)
        self.home.copy_weights(self.model, glow.to("cpu"))
        self.pairs = [(name, theirs) for name, theirs, _, _ in self.home.pairs(self.model, glow)]
        self.model.to(device)
        self.bits = self.model.bits_per_dim
        if contender.compiled is not None:
            # A step of flow is compiled for every level, width and mode of autograd; past the limit PyTorch would go on
            # uncompiled without a word.
            dynamo.config.recompile_limit, dynamo.config.fail_on_recompile_limit_hit = 64, True
        if contender.compiled == "steps":
            for step in (step for level in self.model.levels for step in level):
                step.compile(dynamic=False)
        elif contender.compiled is not None:
            self.bits = torch.compile(self.bits, mode=contender.compiled, dynamic=False)

    def loss(self, x):
        return self.bits(x).float().mean()

    def stepper(self, images, recipe):
        return PlainLoop(self, images, recipe).step

    def sample(self, count):
        return self.model.sample(count)

    @torch.no_grad()
    def rebuilt(self, x):
        return self.model.rebuild(self.model.latents(x)).to(x.dtype)

    def named_gradients(self):
        return {name: theirs.grad for name, theirs in self.pairs if theirs.grad is not None}


class PlainLoop:
    """The loop that everybody writes, with the same work in a step as ours: PyTorch's fused AdamW, gradient clipping
    and averaging over all tensors at once."""

    def __init__(self, ready: Ready, images: Tensor, recipe: Recipe) -> None:
        self.ready, self.recipe, self.at = ready, recipe, 0
        samples = Samples(images, None, "images")
        self.batches = Batches(samples, recipe.batch_size, seed=recipe.seed * 8, device=ready.device)  # as Trainer's
        self.parameters = [p for p in ready.model.parameters() if p.requires_grad]
        decayed = {id(m.weight) for m in ready.model.modules() if isinstance(m, nn.Conv2d)}
        decayed -= {id(m.conv.weight) for m in getattr(ready.model, "priors", ())}
        groups = [
            {"params": [p for p in self.parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        self.averages = [p.detach().clone() for p in self.parameters]
        ready.model.train()

    def step(self) -> None:
        loss = self.ready.from_images(self.batches.next()[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.lr_at(self.at)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.recipe.ema_at(self.at))
        self.adam.zero_grad()
        self.at += 1

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model holds the averaged weights."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)


def make(contender: Contender, setup: Setup, glow: Glow, device: torch.device) -> Ready:
    """``Unavailable`` where the contender cannot take part. ``glow`` is on the CPU."""
    if contender.maker == "normflows":
        glow = without_split_priors(setup, glow)
    return (Ours if contender.ours else Theirs)(contender, setup, glow, device)


def options(setup: Setup) -> dict[str, Any]:
    names = ("levels", "steps", "hidden", "grey_levels", "dropout")
    return {name: getattr(setup, name) for name in names}


def build(setup: Setup, memory: str = "stored") -> Glow:
    return Glow(setup.shape, **options(setup), dropout_of="channel", memory=memory)


def seeded_images(setup: Setup, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, setup.grey_levels, (count, *setup.shape), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def start(setup: Setup) -> Glow:
    """A Glow on the CPU whose every layer does something: networks, priors and scales that are not zero, ActNorm from
    data. The same for everyone, at every call."""
    torch.manual_seed(0)
    glow = build(setup)
    for part in glow.bijection[1].levels:
        flow, prior = part[1], part[2]
        for weight, size in ((flow.weight3, 0.1), (flow.log_scale3, 0.05), (flow.bias3, 0.05)):
            weight.normal_(0, size / math.sqrt(weight[0].numel()) if weight.dim() == 4 else size)
        own = prior.conditioner if hasattr(prior, "conditioner") else prior
        for weight in own.parameters():
            weight.normal_(0, 0.02)
    glow.initialize(seeded_images(setup, min(16, setup.checked)))
    for flow in (part[1] for part in glow.bijection[1].levels):  # the state after some training, not the first one
        flow.log_scale.add_(torch.randn_like(flow.log_scale), alpha=0.02)
        flow.bias.add_(torch.randn_like(flow.bias), alpha=0.02)
    return glow


@torch.no_grad()
def without_split_priors(setup: Setup, glow: Glow) -> Glow:
    """The same with split priors that do not look at their input, which is all that normflows has."""
    copy = build(setup)
    copy.load_state_dict(glow.state_dict())
    for part in copy.bijection[1].levels:
        if hasattr(part[2], "conditioner"):
            part[2].conditioner.weight.zero_()
    return copy
