"""Containers whose layers are run as steps: they keep their own code, which is shown fewer, larger layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.hooks import hooked
from ..adapter import Adapter, Call
from ..constants import specialised
from ..registry import changed, qualified
from ..swap import original_of, respecialise
from .chain import Stage, at, flags, is_step, stage_of, stages
from .parts import Elementwise, NotUnderstood
from .run import run

_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class _Plan:
    """What of a container is run as steps: the stages of every list in it, by the list's path."""

    stages: tuple[tuple[tuple[str, ...], tuple[Stage, ...]], ...]
    reversible: bool

    def all(self) -> Iterator[tuple[tuple[str, ...], Stage]]:
        return ((path, stage) for path, found in self.stages for stage in found)


class Steps(Adapter):
    """What containers share. A subclass says where a container's layers are and which of its methods run them."""

    kind = "steps"

    def __init__(self, reversible: bool = False) -> None:
        self.reversible = reversible

    @property
    def name(self) -> str:
        return f"steps.{type(self).__name__}{', reversible' if self.reversible else ''}"

    def find(self, module: nn.Module) -> _Plan:
        """The plan of a container; raises NotUnderstood."""
        raise NotImplementedError

    def plan(self, module: nn.Module) -> _Plan:
        found = self.find(module)
        if self.reversible:
            for network in _networks(found, module):
                if any(isinstance(m, _NORMS) for m in network.modules()):
                    raise NotUnderstood("batch norm in a conditioner, which a reversible backward would run twice")
        return found

    def refuse(self, module):
        try:
            self.plan(module)
        except NotUnderstood as why:
            return f"no steps: {why}"
        return None

    def layer(self, module):
        plan = self.plan(module)
        kind = self.Layer if self.ready(module) else _waiting(self.Layer, self)
        return specialised(kind, _plan=plan, _original=original_of(type(module)))

    def ready(self, module):
        return all(bool(getattr(layer, flag)) for layer, flag in _flags(self.plan(module), module))

    def conditioners(self, module):
        return _networks(self.plan(module), module)

    def parts(self, module):
        """Each layer whose call is left out, and the list that it stands in: none once one of them has a hook."""
        try:
            return [at(at(module, path), p) for path, stage in self.plan(module).all() for p, _ in stage.layers]
        except NotUnderstood:
            return []

    def disturb(self, module, generator):
        """So little that tens of steps one after the other stay as well-conditioned as they are: a matrix moves by a
        tenth of a rotation's size, whatever its width."""
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad and p.is_floating_point() and p.numel():
                    flat = p.numel() == max(p.shape, default=1)
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
                    p.add_(noise, alpha=0.05 if flat else 0.1 / p[0].numel() ** 0.5)

    def remarks(self, module):
        numbers = [str(sum(len(r.places) for r in stage.runs)) for _, stage in self.plan(module).all()]
        kept = ", activations rebuilt in the backward" if self.reversible else ""
        return [f"{' + '.join(numbers)} of them{kept}"]


def _networks(plan: _Plan, module: nn.Module) -> list[nn.Module]:
    return [
        at(at(module, path), places[-1] + one.coupling.network)
        for path, stage in plan.all()
        for one in stage.runs
        for places in one.places
    ]


def _flags(plan: _Plan, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The first batch also sets what is of the same kind within the networks."""
    found = [(at(at(module, path), p), flag) for path, s in plan.all() for one in s.runs for p, flag in flags(one)]
    names = {flag for _, flag in found}
    inner = [(m, n) for net in _networks(plan, module) for m in net.modules() for n in names if n in m._buffers]
    return found + inner


@functools.cache
def _waiting(layer: type, adapter: Steps) -> type:
    """The container's own code, until its actnorms have seen their first batch."""

    def waits(name: str) -> Callable:
        def method(self, *args: Any, **kwargs: Any) -> Any:
            out = getattr(self._original, name)(self, *args, **kwargs)
            if not torch.compiler.is_compiling() and adapter.ready(self):
                respecialise(self)
            return out

        return method

    names = [n for n, v in vars(layer).items() if callable(v) and not n.startswith("_")]
    return type(layer.__name__, (), {name: waits(name) for name in names})


# --- the lists of a container -----------------------------------------------------------------------------------------


class _Stage:
    """A stage as one layer of the list that it stands in. Layers that have gone, or got a hook, are called as they
    were."""

    def __init__(self, stage: Stage, elements: nn.Module, reversible: bool) -> None:
        self.stage, self.elements, self.reversible = stage, elements, reversible

    def fits(self, x: Any) -> bool:
        channels = self.stage.runs[0].coupling.channels
        return (
            isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == channels and x.is_floating_point() and len(x) > 0
        )

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fits(x):
            return _in_turn([m.inverse for m in reversed(self._modules())], x)
        return run(self.stage.runs, self.elements, x, False, self.reversible)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fits(z):
            return _in_turn(self._modules(), z)
        return run(self.stage.runs, self.elements, z, True, self.reversible)

    def _modules(self) -> list[nn.Module]:
        return [self.elements._modules[str(i)] for i in range(self.stage.start, self.stage.stop)]


def _in_turn(calls: Sequence[Callable], x: Tensor) -> tuple[Tensor, Tensor]:
    total = 0
    for call in calls:
        x, logdet = call(x)
        total = total + logdet
    return x, total


class _Shown:
    """A container as its own methods see it: all as it is but the lists that hold stages."""

    def __init__(self, module: nn.Module, **lists: Any) -> None:
        vars(self).update(lists, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _shown(elements: nn.Module, found: Sequence[Stage], reversible: bool) -> list:
    """The list with each stage in place of its elements."""
    layers = list(elements._modules.values())
    for stage in sorted(found, key=lambda s: -s.start):
        layers[stage.start : stage.stop] = [_Stage(stage, elements, reversible)]
    return layers


def _untouched(module: nn.Module, plan: _Plan) -> bool:
    """Whether every layer whose call is left out is still there, with nobody listening to it."""
    try:
        for path, stage in plan.all():
            elements = at(module, path)
            for inner, cls in stage.layers:
                layer = at(elements, inner)
                if not isinstance(layer, cls) or hooked(layer):
                    return False
    except KeyError:
        return False
    return True


class _Lists(Steps):
    """Containers of normflows: ``flows`` is a list of layers from the latent to the data, or a list of such lists."""

    def find(self, module):
        paths = [("flows", name) for name in module.flows._modules] if self.levels else [("flows",)]
        found, reasons = [], []
        for path in paths:
            of_list, why = stages(list(at(module, path)._modules.values()), reverse=True)
            if why is not None:
                reasons.append(why)
            found.append((path, tuple(of_list)))
        hook = next((r for r in reasons if r.startswith("a hook")), None)
        if hook or not any(of_list for _, of_list in found):
            raise NotUnderstood(hook or next(iter(reasons), "it has no layers"))
        return _Plan(tuple(found), self.reversible)

    levels = False
    spread = 0.5  # tens of couplings one after the other: what a wide spread does to one, they would do as a power

    def partner(self, module, call, out):
        """Directions are paired in the trials."""
        back = {"inverse_and_log_det": "forward_and_log_det", "inverse": "forward"}.get(call.method)
        if back is None:
            return None
        return Call(back, (out[0] if isinstance(out, tuple) else out,))


def _through(name: str) -> Callable:
    def method(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self._original, name)
        return own(self._as_steps(), *args, **kwargs)

    method.__name__ = name
    return method


class MultiscaleFlow(_Lists):
    """normflows' multiscale flow: a list of layers for every level, between splits and merges that stay."""

    levels = True

    class Layer:
        log_prob = _through("log_prob")
        sample = _through("sample")
        forward_and_log_det = _through("forward_and_log_det")
        inverse_and_log_det = _through("inverse_and_log_det")

        def _as_steps(self):
            plan = self._plan
            if not _untouched(self, plan):
                return self
            lists = self._modules["flows"]
            return _Shown(self, flows=[_shown(at(lists, path[1:]), s, plan.reversible) for path, s in plan.stages])

    def trials(self, module, call):
        x = _data(module, call)
        both = [Call("inverse_and_log_det", (x,)), Call("sample", (x.shape[0],))]
        return [call, *both] if call.method == "log_prob" else [*both, call] if call.method == "sample" else both


class NormalizingFlow(_Lists):
    """normflows' flow with one list of layers."""

    class Layer:
        forward = _through("forward")
        inverse = _through("inverse")
        forward_and_log_det = _through("forward_and_log_det")
        inverse_and_log_det = _through("inverse_and_log_det")
        forward_kld = _through("forward_kld")
        reverse_kld = _through("reverse_kld")
        reverse_alpha_div = _through("reverse_alpha_div")
        sample = _through("sample")
        log_prob = _through("log_prob")

        def _as_steps(self):
            plan = self._plan
            if not _untouched(self, plan):
                return self
            return _Shown(self, flows=_shown(self._modules["flows"], plan.stages[0][1], plan.reversible))

    def trials(self, module, call):
        """Not by the methods that add log-determinants up in float32 whatever the data."""
        x = _data(module, call)
        return [Call("log_prob", (x,)), Call("inverse", (x,)), Call("sample", (x.shape[0],))]


def _arguments(call: Call, names: Sequence[str]) -> list:
    return [*call.args, *(call.kwargs[n] for n in names[len(call.args) :] if n in call.kwargs)]


def _data(module: nn.Module, call: Call) -> Tensor:
    """Data of the kind that a container takes: what its call was given, else what it makes of latents."""
    if call.method in ("log_prob", "inverse", "inverse_and_log_det", "forward_kld"):
        return _arguments(call, ("x",))[0]
    with torch.no_grad():
        twin = copy.deepcopy(module).double()
        out = call.on(twin) if call.method in ("sample", "forward", "forward_and_log_det") else twin.sample(2)
    return (out[0] if isinstance(out, tuple) else out).detach()


# --- one step by itself -----------------------------------------------------------------------------------------------


class _Alone(Steps):
    """A module that is a chain of parts itself: one step, or a few."""

    def find(self, module):
        return _Plan((((), (stage_of(module),)),), self.reversible)


class _AsSteps:
    def _as_steps(self, x: Any) -> _Stage | None:
        plan = self._plan
        stage = _Stage(plan.stages[0][1][0], self, plan.reversible)
        return stage if stage.fits(x) and _untouched(self, plan) else None


class GlowBlock(_Alone):
    """normflows' step, where it is not in a list that is understood."""

    class Layer(_AsSteps):
        def forward(self, z):
            steps = self._as_steps(z)
            return super().forward(z) if steps is None else steps(z)

        def inverse(self, z):
            steps = self._as_steps(z)
            return super().inverse(z) if steps is None else steps.inverse(z)


class _OtherMode(Call):
    """The call in training mode where the module is in evaluation mode, and the other way round."""

    def on(self, module):
        modes = [(m, m.training) for m in module.modules()]
        try:
            for m, training in modes:
                m.training = not training
            return super().on(module)
        finally:
            for m, training in modes:
                m.training = training


class Port(_Alone):
    """A step of a Glow port: ``forward(x) -> (z, logdet)`` and ``reverse(z) -> x``, its layers known by structure."""

    structural = True

    class Layer(_AsSteps):
        def forward(self, input):
            steps = self._as_steps(input)
            if steps is None:
                return super().forward(input)
            z, logdet = steps.inverse(input)
            # Without a scale there is one number for all samples, and so the original returns it.
            return z, logdet if steps.stage.runs[-1].coupling.scale_map.has_scale else logdet[0]

        def reverse(self, output):
            steps = self._as_steps(output)
            return super().reverse(output) if steps is None else steps(output)[0]

    def trials(self, module, call):
        """Also in the other mode and far out, where a step of somebody's may do otherwise."""
        far = call.map(lambda t: 20 * t if t.is_floating_point() else t)
        return [call, _OtherMode(call.method, call.args, call.kwargs), far]

    def disturb(self, module, generator):
        """And scales so far that a clamp on them would be seen."""
        super().disturb(module, generator)
        for path, stage in self.plan(module).all():
            for one in stage.runs:
                for part, place in zip(one.linear, one.places[0]):
                    if isinstance(part, Elementwise) and "scale" in part.names:
                        scale = at(at(module, path), place).scale
                        with torch.no_grad():
                            scale.mul_((5 * torch.rand(scale.shape, generator=generator) - 2.5).exp().to(scale))

    def partner(self, module, call, out):
        if call.method == "forward":
            return Call("reverse", (out[0],))
        return Call("forward", (out,))


_BY_NAME: dict[str, type[Steps]] = {
    "normflows.core.MultiscaleFlow": MultiscaleFlow,
    "normflows.core.NormalizingFlow": NormalizingFlow,
    "normflows.flows.affine.glow.GlowBlock": GlowBlock,
}


@functools.cache
def _adapter(kind: type[Steps], reversible: bool) -> Steps:
    return kind(reversible)


def container(module: nn.Module, reversible: bool) -> tuple[Steps | None, str | None]:
    """The adapter that runs this module's layers as steps, and why it must be kept all the same."""
    for base in type(module).__mro__:
        kind = _BY_NAME.get(qualified(base))
        if kind is not None:
            return _adapter(kind, reversible), changed(module, base)
    if is_step(module):
        return _adapter(Port, reversible), None
    return None, None
