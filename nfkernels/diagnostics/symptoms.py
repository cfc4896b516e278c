"""What is wrong with a flow that trains badly, and in which layer: one sentence for each thing found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..nn.conditioning import ContextError
from ..nn.layer_calls import leaves
from ..nn.modes import evaluating
from .levels import levels_of
from .scales import Scales, WatchScales

if TYPE_CHECKING:
    from ..nn import Bijection, Flow

Kind = Literal["weights", "data", "raises", "not finite", "exploding", "saturated", "outside", "dead level"]

# Each with a margin: a sound flow is far from all of them, however long it was trained.
_LOG_SCALE = 16.0  # nats: a scale of 2^23 leaves float32 no digit of what was there
_SATURATED = 0.9  # share of a coupling's scales on the flat part of their map
_FAR = 1e3  # of a layer's input, which should be a few
_OUTSIDE = 0.5  # share of what a spline is given that it leaves as it is
_STILL, _WILD = 1e-2, 1e2  # standard deviation of a level's latents, which should be 1
_UNUSED = 1e-4  # change of the samples, relative to the data's spread, when a level's latents are drawn anew
_DECODED = 16  # samples that a level's use is tried on

_LOWER = "try a lower learning rate (--lr) or stronger clipping (--clip)"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; ``str()`` is the sentence.

    Args:
        kind: which of the things that :func:`diagnose` looks for.
        layer: its name, as in ``flow.named_modules()``; of a parameter its own; empty where it is no layer.
        what: what was seen.
        advice: what to try.
    """

    kind: Kind
    layer: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


@dataclass
class LayerLook:
    """What one use of one layer did to a batch.

    Args:
        name, kind: of the layer.
        trained: whether it has parameters that are trained.
        finite: whether output and log-determinant are.
        largest_in, largest_out: the largest absolute values.
        logdet: of its log-determinant per dimension, in nats, the mean over the batch.
        steepest: the same, its largest absolute value.
        scales: of its couplings, in the order that they ran.
    """

    name: str
    kind: str
    trained: bool
    finite: bool = True
    largest_in: float = 0.0
    largest_out: float = 0.0
    logdet: float = 0.0
    steepest: float = 0.0
    scales: list[Scales] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"

    def part(self, number: int) -> str:
        """One of its couplings."""
        return self.title if len(self.scales) < 2 else f"{self.title}, coupling {number + 1}"


@dataclass
class Look:
    """One pass of data: what every layer did, the latents, and what was raised and where."""

    layers: list[LayerLook]
    z: Tensor | None = None
    raised: Exception | None = None
    inside: str = ""

    def note(self, scales: Scales) -> None:
        """Of an op that runs inside the latest layer."""
        if self.layers:
            self.layers[-1].scales.append(scales)


def diagnose(flow: Flow, x: Tensor, context: Tensor | None = None) -> list[Finding]:
    """What is wrong with a flow, on a batch of data: worst first, empty where nothing is.

    It looks for weights, outputs and log-determinants that are not finite; layers that raise; scales beyond what
    float32 resolves (exploding log-determinants); couplings whose scales sit on the flat part of their map; splines
    whose data lies outside of their interval; and levels of a multi-scale flow that are dead: their latents do not
    change with the data, or the samples not with them. A sound flow, trained or new, is far from all of these.

    ``fit`` and ``nfkernels train`` call this whenever they validate, and when a loss goes wrong.

    Args:
        flow: any flow; left as it is, its generators and torch's included.
        x: a batch of data as ``nll`` takes it, ``[B, *event]``: some dozens are enough.
        context: as the flow takes it.

    Raises ``ValueError`` for x and context that the flow does not take. Cost: one forward; of a multi-scale flow also
    ``levels + 1`` inverses of 16 samples. Waits for the device often.
    """
    bad = next((name for name, p in flow.named_parameters() if not bool(torch.isfinite(p).all())), None)
    if bad is not None:
        return [Finding("weights", bad, f"the parameter {bad} is not finite", "go back to an earlier checkpoint")]
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        return [Finding("data", "", "the data is not finite", "leave out what is NaN or infinite")]
    if context is not None and not bool(torch.isfinite(torch.as_tensor(context)).all()):
        return [Finding("data", "", "the context is not finite", "leave out what is NaN or infinite")]
    seen = look(flow, x, context)
    _check_given(flow, x, context, seen.raised, seen.layers)
    found = _broken(seen)
    if found:
        return found
    found = [finding for layer in seen.layers for finding in _of_layer(layer)]
    exploding = [finding for finding in found if finding.kind == "exploding"]
    # Where scales explode, maps saturate and latents run away behind them.
    return exploding or found + _dead_levels(flow, seen.z, x, context)


def look(flow: Flow, x: Tensor, context: Tensor | None = None) -> Look:
    """Sends a batch through the flow in evaluation mode, with dequantisation noise where it takes some, and notes what
    every layer does. An error on the way is kept rather than raised."""
    names = {module: list(given) for module, given in leaves(flow).items()}
    turns = dict.fromkeys(names, 0)
    seen = Look([])

    def before(module: Bijection, args: tuple, kwargs: dict) -> None:
        given = names[module]
        name = given[min(turns[module], len(given) - 1)]
        turns[module] += 1
        trained = any(p.requires_grad for p in module.parameters())
        now = LayerLook(name, type(module).__name__, trained)
        now.largest_in = _largest(args[0] if args else kwargs["x"])
        seen.layers.append(now)
        seen.inside = now.title

    def after(module: Bijection, args: tuple, kwargs: dict, out: tuple[Tensor, Tensor]) -> None:
        now, (y, logdet) = seen.layers[-1], out
        now.finite = bool(torch.isfinite(y).all()) and bool(torch.isfinite(logdet).all())
        now.largest_out = _largest(y)
        each = logdet.detach() / max(1, y[0].numel() if len(y) else 1)
        now.logdet, now.steepest = float(each.mean()), _largest(each)
        seen.inside = ""

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in names]
    try:
        with evaluating(flow), WatchScales(seen.note):
            seen.z = flow(_noisy(flow, x), flow._matched(context, x))[0]
    except Exception as error:
        seen.raised = error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def steepest_layer(seen: Look) -> str | None:
    """Where values or volumes grow or shrink most, as a clause; None where nothing much happens anywhere."""
    trained = [layer for layer in seen.layers if layer.trained and layer.finite]
    if not trained:
        return None

    def force(layer: LayerLook) -> float:
        grown = layer.largest_out / max(layer.largest_in, 1.0)
        return max(layer.steepest, math.log(max(grown, 1e-30)))

    worst = max(trained, key=force)
    if force(worst) < 1.0:
        return None
    values = f"values up to {worst.largest_in:.2g} leave it as up to {worst.largest_out:.2g}"
    return f"most happens in {worst.title}: {values}, log-determinant {worst.logdet:+.2g} nats per dimension"


def _check_given(
    flow: Flow, x: Tensor, context: Tensor | None, error: Exception | None, layers: list[LayerLook]
) -> None:
    """``ValueError`` where an error came of what the flow was given, and not of a layer."""
    if error is None:
        return
    event = tuple(getattr(flow, "event_shape", flow.base.shape))
    wanted = f"expected x [B, {', '.join(map(str, event))}]" if x.shape[1:].numel() != math.prod(event) else ""
    if wanted or not layers or isinstance(error, ContextError):
        given = "no context" if context is None else f"a context {list(torch.as_tensor(context).shape)}"
        raise ValueError(f"x {list(x.shape)} and {given} do not fit this flow: {wanted or error}") from error


# --- the findings -----------------------------------------------------------------------------------------------------


def _broken(seen: Look) -> list[Finding]:
    """What keeps the rest from being looked at: the first layer without finite results, or the one that raised."""
    for at, layer in enumerate(seen.layers):
        if not layer.finite:
            parts = [number for number, scales in enumerate(layer.scales) if not scales.finite]
            where = layer.part(parts[0]) if parts else layer.title
            came = f" (its input is, up to {layer.largest_in:.2g})"
            grew = steepest_layer(Look(seen.layers[:at])) if layer.largest_in > _FAR else None  # who made it so large
            what = f"the output of {where} is not finite{came}" + (f"; {grew}" if grew else "")
            return [Finding("not finite", layer.name, what, _LOWER)]
    if seen.raised is None:
        return []
    name = seen.layers[-1].name if seen.layers and seen.inside else ""
    text = (str(seen.raised).splitlines() or [type(seen.raised).__name__])[0]
    return [Finding("raises", name, f"{seen.inside or 'the flow'} raises: {text}", _LOWER)]


def _of_layer(layer: LayerLook) -> list[Finding]:
    found = []
    couplings = layer.scales
    sizes = [max(scales.largest, scales.grown) for scales in couplings]
    alone = math.log(max(layer.largest_out, 1e-30) / max(layer.largest_in, 1.0))
    size = max([*sizes, layer.steepest / max(1, len(couplings)), alone])
    if layer.trained and size > _LOG_SCALE:
        where = layer.part(sizes.index(size)) if size in sizes else layer.title
        what = f"the scales of {where} explode: a factor of e^{size:.3g} is beyond float32's digits"
        advice = f"{_LOWER}, standardise the data, or take a bounded map (--scale-map)"
        found.append(Finding("exploding", layer.name, what, advice))
    stuck = [number for number, scales in enumerate(couplings) if scales.saturated > _SATURATED]
    if stuck:
        scales = couplings[stuck[0]]
        what = (
            f"{scales.saturated:.0%} of the scales of {layer.part(stuck[0])} are saturated: they sit on the flat part "
            f"of its {scales.where} map and learn no more"
        )
        far = f"its input is up to {layer.largest_in:.2g}: standardise the data, or "
        advice = f"{far if layer.largest_in > _FAR else ''}{_LOWER}, or take a wider map (--scale-map)"
        found.append(Finding("saturated", layer.name, what, advice))
    out = [number for number, scales in enumerate(couplings) if scales.outside > _OUTSIDE]
    if out:
        scales = couplings[out[0]]
        what = (
            f"{scales.outside:.0%} of what the spline of {layer.part(out[0])} is given lies outside of its interval, "
            "where it does nothing"
        )
        found.append(Finding("outside", layer.name, what, "standardise the data, or take a wider interval (--bound)"))
    return found


def _dead_levels(flow: Flow, z: Tensor | None, x: Tensor, context: Tensor | None) -> list[Finding]:
    levels = levels_of(flow)
    if levels is None or z is None or len(z) < 2:
        return []
    names = {module: name for name, module in flow.named_modules()}
    fewer = "try fewer levels (--levels), or a lower learning rate (--lr)"
    found, spreads = [], [_spread(part) for part in levels.split(z)]
    for number, (level, spread) in enumerate(zip(levels.levels, spreads, strict=True), 1):
        name = names[level]
        if not _STILL < spread < _WILD:
            how = "do not change with the data" if spread < 1 else "are far wider than their prior"
            what = f"level {number} is dead: the latents of {name} {how} (standard deviation {spread:.1e}, expected 1)"
            found.append(Finding("dead level", name, what, fewer))
    if found:
        return found
    for number, (level, change) in enumerate(
        zip(levels.levels, _uses(flow, levels.sizes, z, x, context), strict=True), 1
    ):
        if change < _UNUSED:
            name = names[level]
            what = (
                f"level {number} is dead: samples do not change with the latents of {name} "
                f"(by {change:.1e} of the data's spread)"
            )
            found.append(Finding("dead level", name, what, fewer))
    return found


@torch.no_grad()
def _uses(flow: Any, sizes: list[int], z: Tensor, x: Tensor, context: Tensor | None) -> list[float]:
    """How far samples move, of the data's own spread, when one level's latents are drawn anew and the others kept;
    ``sizes``: how many latents the levels have."""
    z, generator = z[:_DECODED], torch.Generator().manual_seed(0)
    context = flow._matched(context, x)
    context = context if context is None or len(context) == 1 else context[:_DECODED]
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    decode = getattr(flow, "decode_continuous", flow.decode)
    moved, first = [], 0
    with evaluating(flow):
        before = decode(z, context)
        scale = _spread(before)
        for size in sizes:
            other = z.clone()
            other[:, first : first + size] = noise[:, first : first + size]
            change = (decode(other, context) - before).cpu().double().square().mean().sqrt()
            moved.append(float(change) / max(scale, 1e-30))
            first += size
    return moved


def _noisy(flow: Any, x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    if not x.is_floating_point() and hasattr(flow, "dequantize"):
        return flow.dequantize(x, generator=generator)
    return x + flow.noise(x, generator=generator) if getattr(flow, "dequantizes", False) else x


def _spread(v: Tensor) -> float:
    """The standard deviation over the batch, of all elements together."""
    return float(v.detach().cpu().double().var(0).mean().sqrt())


def _largest(v: Tensor) -> float:
    return float(v.detach().abs().max()) if v.numel() else 0.0
