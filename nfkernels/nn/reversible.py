"""Reversible training: the forward keeps its output alone, the backward rebuilds every layer's input on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..ops._library import under_transform
from ..reference.lu_compose import no_autocast
from .bijection import Bijection, Chain, Inverse
from .replay import (
    RandomState,
    as_in_forward,
    autocast_state,
    call_with,
    gradients,
    random_state,
    set_random_state,
)

Memory = Literal["stored", "reversible"]
_DIRECTIONS = ("forward", "inverse")
Tensors = Sequence[Tensor | None]
Gradients = list[Tensor | None]


def check_memory(memory: str) -> None:
    if memory not in get_args(Memory):
        raise ValueError(f"unknown memory {memory!r}: expected 'stored' or 'reversible'")


class Body(Protocol):
    """Layers as functions of tensors: everything that wants a gradient comes in as an argument."""

    def forward(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """``(z, logdet)``; records a graph where gradients are wanted."""

    def inverse(self, z: Tensor, tensors: Tensors) -> Tensor:
        """``x``; likewise."""

    def backward(
        self, z: Tensor, dz: Tensor | None, dlogdet: Tensor | None, tensors: Tensors, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        """``(dx, gradients of the tensors that are wanted)`` from the output alone; no graph."""


def keeping_output(body: Body, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """``body.forward``, of which only the output and the tensors are kept for the backward."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    # A compiler plans its own memory, and transforms need the graph.
    if not wanted or torch.compiler.is_compiling() or under_transform():
        return body.forward(x, tensors)
    return _KeepingOutput.apply(body, x, *tensors)


class _KeepingOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: Body, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        z, logdet = body.forward(x, tensors)
        ctx.save_for_backward(z, *tensors)
        ctx.set_materialize_grads(False)
        ctx.body = body
        return z, logdet

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dlogdet: Tensor | None) -> tuple[Any, ...]:
        z, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if dz is None and dlogdet is None:
            return (None,) * (2 + len(tensors))
        run = _differentiable if torch.is_grad_enabled() else type(ctx.body).backward
        with no_autocast(z.device.type):  # the caller's, which need not be the forward's
            dx, grads = run(ctx.body, z, dz, dlogdet, tensors, wanted)
        return None, dx if ctx.needs_input_grad[1] else None, *grads


def _differentiable(
    body: Body, z: Tensor, dz: Tensor | None, dlogdet: Tensor | None, tensors: Tensors, wanted: Sequence[bool]
) -> tuple[Tensor | None, Gradients]:
    """The gradients as functions of output and tensors, for second derivatives: everything is stored here."""
    x = body.inverse(z, tensors)
    # Aliases: x depends on the tensors as well, and what is wanted are the gradients at x held fixed.
    own = [t if t is None or not w else t.view_as(t) for t, w in zip(tensors, wanted, strict=True)]
    out = body.forward(x, own)
    dx, *found = gradients(
        out, [x, *(t for t, w in zip(own, wanted, strict=True) if w)], (dz, dlogdet), create_graph=True
    )
    rest = iter(found)
    return dx, [next(rest) if w else None for w in wanted]


class ReversibleSequential(Chain):
    """A :class:`Chain` whose training keeps only its last output: memory does not grow with the number of layers.

    ``ReversibleSequential(a, b)`` computes what ``Chain(a, b)`` does, with the same gradients up to rounding. The
    backward goes through the layers from the last to the first (into chains among them too, and inverted ones) and
    asks each for its input and its gradients by :meth:`Bijection.from_output`. Affine couplings, 1x1 convolutions and
    Glow steps rebuild their input in the pass that makes the gradients and run their network once more; any other
    layer that has an ``inverse`` is inverted and run again.

    The random numbers that a layer drew in the forward (dropout) are drawn again, and its autocast state comes back.
    A layer must be a function of its input, context, parameters and those: what its forward writes into buffers it
    writes again. One that is made of several (:class:`MultiScale`) must draw the same numbers in its inverse as in its
    forward. Rebuilt inputs carry the rounding errors of the inverses, which grow with depth and with the layers'
    condition numbers (:func:`drift` measures them); a scale map with a floor bounds them.

    Shapes are those of the layers. Raises what the layers raise, and ``NotImplementedError`` in a backward that meets a
    layer without an inverse. Cost: one more forward in each backward. Kept are the output, the context and the
    parameters. Under ``torch.compile`` and ``torch.func`` it is a Chain. Reference: Gomez et al. 2017 (RevNet),
    section 3.
    """

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not len(self) or torch.compiler.is_compiling() or under_transform():
            return super().forward(x, context, lengths=lengths)
        # Frozen parameters and lengths, too: what is written into them before the backward is told.
        parameters = list(self.parameters())
        body = _Layers(self._flat(), lengths, parameters, x.device)
        return keeping_output(body, x, [context, *parameters, lengths])

    @torch.no_grad()
    def drift(self, x: Tensor, context: Tensor | None = None) -> list[float]:
        """Errors of the layers' inputs rebuilt from the output, first layer first; see :func:`drift`."""
        layers, true, errors = self._flat(), [x], []
        for layer in layers:
            true.append(layer(true[-1], context)[0])
        rebuilt = true[-1]
        for layer, x in zip(reversed(layers), reversed(true[:-1]), strict=True):
            rebuilt, _ = layer.inverse(rebuilt, context)
            errors.append(relative_drift(x, rebuilt))
        return errors[::-1]

    def _flat(self) -> list[Bijection]:
        return [part for layer in self for part in _parts(layer)]


@torch.no_grad()
def drift(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> dict[str, list[float]]:
    """How far the inputs that a reversible backward would rebuild are from the true ones, over depth.

    Args:
        flow: a Bijection or Flow with ``GlowSteps`` or ``ReversibleSequential`` inside; run once, in eval mode.
        x, context: what its forward takes, ``[B, ...]`` each.

    Returns:
        For each such module, by its name: the error at the input of each step or layer, first to last: the largest
        ``|rebuilt - true|`` over the root mean square of the true input. An error of 1e-3 or more is one that
        gradients will show. Cost: a forward and an inverse, with every input kept.

    Raises ``ValueError`` where the flow does for such data.
    """
    found: dict[str, list[float]] = {}

    def before(module: Any, args: tuple, options: dict) -> None:
        given = args[1] if len(args) > 1 else options.get("context")
        found[names[module]] = module.drift(args[0], given)

    names: dict[nn.Module, str] = {
        m: n for n, m in flow.named_modules() if isinstance(m, Bijection) and hasattr(m, "drift")
    }
    for outer in list(names):  # a module within another one is that one's part
        for inner in [m for m in outer.modules() if m is not outer]:
            names.pop(inner, None)
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in names]
    training = {m for m in flow.modules() if m.training}
    try:
        flow.eval()
        flow(x) if context is None else flow(x, context)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return found


def relative_drift(true: Tensor, rebuilt: Tensor) -> float:
    size = true.double().square().mean().sqrt()
    return float((rebuilt.double() - true.double()).abs().max() / size) if true.numel() and size > 0 else 0.0


def _parts(layer: Bijection) -> list[Bijection]:
    """What chains are made of, inverted ones too: each part draws its random numbers again by itself, since a chain's
    inverse would draw them in another order."""
    if type(layer) is Inverse and type(layer.bijection) in (Chain, ReversibleSequential):
        return [part.inv for part in reversed(_parts(layer.bijection))]
    if isinstance(layer, Chain) and type(layer) in (Chain, ReversibleSequential):
        return [part for inner in layer for part in _parts(inner)]
    return [layer]


class _Layers:
    """Layers of any kind. Their parameters come as tensors, too, so that autograd knows about them; layers that hold
    other ones by then (``torch.func.functional_call`` has returned, say) are called with those."""

    def __init__(
        self, layers: list[Bijection], lengths: Tensor | None, parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        self.layers, self.parameters, self.device = layers, parameters, device
        # Of every layer: the name of a parameter, and its place among the tensors, the context's being 0.
        places = {id(p): i for i, p in enumerate(parameters, 1)}
        self.places = [
            {name: places[id(p)] for name, p in layer.named_parameters() if id(p) in places} for layer in layers
        ]
        self.lengths = [lengths]  # before each layer and after the last, once the forward has gone through
        self.autocast = autocast_state(device)
        self.random: list[RandomState] = []

    def forward(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        if self.random:  # a second time, for second derivatives
            with as_in_forward(self.device, self.autocast):
                return self._forward(x, tensors, again=True)
        return self._forward(x, tensors, again=False)

    def _forward(self, x: Tensor, tensors: Tensors, again: bool) -> tuple[Tensor, Tensor]:
        total = None
        for index, layer in enumerate(self.layers):
            lengths = self.lengths[index]
            if again:
                set_random_state(self.random[index], self.device)
            else:
                self.random.append(random_state(self.device))
            x, logdet = self._call(index, "forward", tensors, x, tensors[0], lengths=lengths)
            total = logdet if total is None else total + logdet
            if len(self.lengths) == index + 1:
                self.lengths.append(layer.lengths_after(lengths))
        return x, total

    def inverse(self, z: Tensor, tensors: Tensors) -> Tensor:
        with as_in_forward(self.device, self.autocast):
            for index in reversed(range(len(self.layers))):
                set_random_state(self.random[index], self.device)
                z, _ = self._call(index, "inverse", tensors, z, tensors[0], lengths=self.lengths[index + 1])
        return z

    def backward(
        self, z: Tensor, dz: Tensor | None, dlogdet: Tensor | None, tensors: Tensors, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        leaves = [t.detach().requires_grad_() if w else t for t, w in zip(tensors, wanted, strict=True)]
        grads: Gradients = [None] * len(wanted)
        with as_in_forward(self.device, self.autocast):
            for index in reversed(range(len(self.layers))):
                own = {name: place for name, place in self.places[index].items() if wanted[place]}
                if self._holds(index, self.parameters):
                    into = {place: self.parameters[place - 1] for place in own.values()}
                else:
                    into = {place: leaves[place] for place in own.values()}
                if wanted[0]:
                    into[0] = leaves[0]
                set_random_state(self.random[index], self.device)
                z, dz, found = self._call(
                    index, "from_output", leaves, z, dz, dlogdet, list(into.values()), leaves[0],
                    lengths=self.lengths[index],
                )  # fmt: skip
                for place, grad in zip(into, found, strict=True):
                    if grad is not None:
                        grads[place] = grad if grads[place] is None else grads[place] + grad
        return dz, grads

    def _holds(self, index: int, parameters: Sequence[Tensor | None]) -> bool:
        now = dict(self.layers[index].named_parameters())
        return all(now[name] is parameters[place - 1] for name, place in self.places[index].items())

    def _call(self, index: int, method: str, tensors: Tensors, *args: Any, **options: Any) -> Any:
        layer = self.layers[index]
        # Aliases of the parameters (for second derivatives) are asked for; leaves stand in only for what is gone.
        aliased = any(tensors[place] is not self.parameters[place - 1] for place in self.places[index].values())
        if self._holds(index, self.parameters) and (method == "from_output" or not aliased):
            return _method(layer, method)(*args, **options)
        named = {f"layer.{name}": tensors[place] for name, place in self.places[index].items()}
        return call_with(_Method(layer, method), named, args, options)


class _Method(nn.Module):
    """Any method of a layer as a module's forward, which is all that ``functional_call`` calls."""

    def __init__(self, layer: Bijection, method: str) -> None:
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *args: Any, **options: Any) -> Any:
        return _method(self.layer, self.method)(*args, **options)


def _method(layer: Bijection, name: str) -> Callable[..., Any]:
    """What a layer is to be called by: hooks see its forward, and its own ``from_output`` counts only as long as no
    subclass or hook makes of the forward something else."""
    if name == "forward":
        return layer
    if name == "from_output":
        classes = type(layer).__mro__
        defined = {n: next(i for i, c in enumerate(classes) if n in vars(c)) for n in ("from_output", *_DIRECTIONS)}
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if hooked or any(defined[n] < defined["from_output"] for n in _DIRECTIONS):
            return partial(Bijection.from_output, layer)
    return getattr(layer, name)
