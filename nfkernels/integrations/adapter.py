"""What an adapter is: how one layer of another library, or of somebody's own code, is recognised and what replaces it.

An adapter names the classes it serves (``register("nflows.transforms.lu.LULinear")``) or recognises modules by their
structure (``register()`` and :meth:`Adapter.recognise`). Its ``Layer`` holds only the methods that take over; the
module's class becomes ``(Layer, <the original class>)``, so ``super()`` inside a method is the original one and every
parameter, buffer, key and hook stays where it was. A ``Layer`` keeps no state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True)
class Call:
    """One call of a method: what was watched, and what the proof repeats on the original and on the fused layer.

    ``then(out, *more)`` turns what the method returned into tensors, where that is not a structure of tensors already
    (zuko's layers return transforms, and ``more`` is what these are called with). ``constants`` names keyword arguments
    that the proof asks no gradients of: masks. Shapes are the module's own; what it raises goes through.
    """

    method: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    then: Callable[..., Any] | None = None
    more: tuple = ()
    constants: tuple[str, ...] = ()

    def on(self, module: nn.Module) -> Any:
        """Makes the call on ``module``."""
        out = getattr(module, self.method)(*self.args, **self.kwargs)
        return out if self.then is None else self.then(out, *self.more)

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``function`` of every tensor among its arguments."""
        given = (self.args, dict(self.kwargs), self.more)
        args, kwargs, more = tree_map(lambda v: function(v) if isinstance(v, Tensor) else v, given)
        return replace(self, args=tuple(args), kwargs=kwargs, more=tuple(more))


class Adapter:
    """How one kind of layer is recognised, refused, proved and replaced. Subclass it and :func:`register` it.

    ``Layer`` is the class of the methods that replace the original's: public methods only, with the original's
    signatures; ``super().forward(...)`` in one of them is the original. ``bypassed`` names submodules that the fused
    methods read but do not call: where one of them carries a hook, the layer is kept.
    """

    Layer: type
    bypassed: tuple[str, ...] = ()
    spread: float = 4.0  # how far the proof spreads the conditioners' outputs, to either side of zero
    structural: bool = False  # known by its structure alone: swapped only after a proof
    by_numbers: bool = False  # what it computes cannot be told from the module's settings, only proved
    kind: str = ""  # what the report says beside "fused", where it is not a layer
    unknown: str = "computes none of the forms that are known"  # the reason where there is no candidate

    @property
    def name(self) -> str:
        """What errors call this adapter: its module and class."""
        cls = type(self)
        return f"{cls.__module__.rpartition('nfkernels.integrations.')[2]}.{cls.__qualname__}"

    def recognise(self, module: nn.Module) -> bool:
        """Whether a module of unknown class looks like this layer (structural adapters only). It is then proved."""
        return False

    def refuse(self, module: nn.Module) -> str | None:
        """Why this module cannot be fused (an unsupported option, a custom callable), or None."""
        return None

    def layer(self, module: nn.Module) -> type:
        """The class of methods that this module gets: ``Layer``, or a subclass made for the module's state (its
        mask, its flag), which :func:`functools.cache` makes once. It is asked again after ``load_state_dict``."""
        return self.Layer

    def methods(self) -> tuple[str, ...]:
        """The methods that are watched and replaced."""
        return tuple(n for n, v in vars(self.Layer).items() if callable(v) and not n.startswith("_"))

    def pays_from(self, module: nn.Module) -> float:
        """How many numbers of a table on a CPU the swap pays from, as was measured; below, the original is as fast."""
        return 0

    def waits(self, module: nn.Module) -> str:
        """What the report says of a layer that no call has shown the size of yet."""
        least = self.pays_from(module)
        if not least:
            return ""
        return f"tables on a CPU from {least:,} numbers on" if math.isfinite(least) else "not for tables on a CPU"

    def too_small(self, module: nn.Module, call: Call) -> str | None:
        """Why a swap would not make such a call faster, or None. Where it does not pay it is not made."""
        x = next((v for v in tree_flatten((call.args, call.kwargs))[0] if isinstance(v, Tensor)), None)
        if x is None or x.dim() != 2 or x.device.type != "cpu" or x.numel() >= (least := self.pays_from(module)):
            return None
        most = f" below {least:,} numbers" if math.isfinite(least) else ""
        return f"a table {tuple(x.shape)} on a CPU: the original is as fast{most}"

    def ready(self, module: nn.Module) -> bool:
        """Whether the module can be proved now; a layer that its first batch initialises is not before that."""
        return True

    def partner(self, module: nn.Module, call: Call, out: Any) -> Call | None:
        """The call that undoes ``call``, given what it returned: by default ``inverse`` for ``forward`` and back, the
        first argument replaced by the first thing returned."""
        other = {"forward": "inverse", "inverse": "forward"}.get(call.method)
        if other is None or not hasattr(module, other):
            return None
        first = out[0] if isinstance(out, tuple) else out
        return replace(call, method=other, args=(first, *call.args[1:]))

    def trials(self, module: nn.Module, call: Call) -> list[Call]:
        """The calls that the proof makes, from one that was seen: itself. The partner of each is added by the proof."""
        return [call]

    def candidates(self, module: nn.Module, call: Call) -> Iterable[Adapter]:
        """The adapters that may serve this module, the likeliest first: the proof takes the first that agrees. By
        default this one; one for a family of look-alikes tells them apart here, by the numbers of ``call``, a trial.
        ``module`` is a disturbed float64 copy, to be run and hooked at will."""
        return (self,)

    def remarks(self, module: nn.Module) -> list[str]:
        """What the report says of a module that is fused: where the fused layer does better than the original."""
        return []

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """The submodules whose work the fused methods do themselves (not the networks that they call): they share
        this layer's fate in the report and are not swapped on their own; a hook on one keeps the layer."""
        return []

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        """The networks whose outputs the proof spreads over [-4, 4], so that no clamp or scale map hides behind a
        network that starts at zero."""
        return []

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        """Moves a copy's trained parameters off their starting values, where different formulas may agree."""
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad and p.is_floating_point():
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
                    p.add_(noise, alpha=0.05 + 0.05 * float(p.abs().mean()) if p.numel() else 0.0)
