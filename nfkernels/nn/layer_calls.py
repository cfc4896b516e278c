"""The layers of a flow that are made of no others, by name, and what each was given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .bijection import Bijection, Inverse

if TYPE_CHECKING:
    from .flow import Flow

WHOLE = "bijection"


class LayerCall(NamedTuple):
    """One use of one layer, and what it was given; ``name`` is that of ``flow.get_submodule``."""

    name: str
    layer: Bijection
    x: Tensor
    context: Tensor | None
    lengths: Tensor | None


@dataclass
class Calls:
    """What happened when data went through a flow's layers.

    Args:
        layers: in the order that data met them.
        whole: the bijection's own call; None where data did not come so far.
        unreached: names of the layers that met no data.
        failure: what was raised on the way.
    """

    layers: list[LayerCall] = field(default_factory=list)
    whole: LayerCall | None = None
    unreached: list[str] = field(default_factory=list)
    failure: Exception | None = None


def is_leaf(module: Bijection) -> bool:
    """Whether it is a layer made of no others (an ``Inverse`` counts as the layer inside)."""
    return isinstance(module, Inverse) or not any(isinstance(m, Bijection) for m in list(module.modules())[1:])


def leaves(flow: nn.Module) -> dict[Bijection, list[str]]:
    """The leaves among ``flow``'s layers with their names, as in ``flow.named_modules()``: of one that stands in two
    places both."""
    names: dict[Bijection, list[str]] = {}
    inside: list[str] = []
    for name, module in flow.named_modules(remove_duplicate=False):
        if (
            isinstance(module, Bijection)
            and is_leaf(module)
            and not any(name.startswith(f"{outer}.") for outer in inside)
        ):
            names.setdefault(module, []).append(name)
            inside.append(name)
    return names


@torch.no_grad()
def layer_calls(flow: Flow, x: Tensor, context: Tensor | None = None) -> Calls:
    """Sends ``x`` (data as the flow takes it; of images the middle of each grey level) through ``flow`` as it is, and
    notes what each layer was given. What a layer raises is kept; what is wrong with ``x`` itself is raised."""
    calls = Calls()
    names = {module: found for module, found in leaves(flow).items() if found[0].split(".")[0] == WHOLE}
    waiting = {module: list(given) for module, given in names.items()}

    def remember(module: Bijection, args: tuple, kwargs: dict) -> None:
        data = args[0] if args else kwargs["x"]
        given = args[1] if len(args) > 1 else kwargs.get("context")
        given = given.detach() if isinstance(given, Tensor) else given
        call = LayerCall(WHOLE, module, data.detach(), given, kwargs.get("lengths"))
        if module is flow.bijection and calls.whole is None:
            calls.whole = call
        if module in waiting:
            left = waiting[module]
            calls.layers.append(call._replace(name=left.pop(0) if left else names[module][-1]))

    hooked = dict.fromkeys([flow.bijection, *names])
    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in hooked]
    try:
        flow.encode(x, context)
    except Exception as error:
        if calls.whole is None:  # no layer is to blame: the data or the context is not what this flow takes
            raise
        calls.failure = error
        calls.unreached = [name for left in waiting.values() for name in left]
    finally:
        for handle in handles:
            handle.remove()
    return calls
