"""How a coupling calls its conditioner: where the context goes, and the mask of valid positions."""

from __future__ import annotations

import inspect
from typing import Literal

from torch import Tensor, nn

Way = Literal["positional", "keyword"] | None


class ContextError(ValueError):
    """A context that is missing, of another shape, or not taken: what was given is at fault, and no layer."""


def takes_context(conditioner: nn.Module) -> Way:
    """How a conditioner takes the context: an ``nn.Sequential`` does not, nor one built with ``context_channels=0``.

    Whatever else has a default (``scale=2.0``) is not the context's place.
    """
    if getattr(conditioner, "context_channels", None) == 0:
        return None
    inner = getattr(conditioner, "_orig_mod", conditioner)  # torch.compile wraps it in a forward of (*args, **kwargs)
    parameters = inspect.signature(inner.forward).parameters.values()
    by_position = [p for p in parameters if p.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(by_position) > 1 and (by_position[1].name == "context" or by_position[1].default is inspect.Parameter.empty):
        return "positional"
    named = [p for p in parameters if p.name == "context" and p.kind != inspect.Parameter.POSITIONAL_ONLY]
    return "keyword" if named else None


def call_conditioner(
    conditioner: nn.Module, x: Tensor, context: Tensor | None, mask: Tensor | None, how: Way
) -> Tensor:
    args = (x, context) if how == "positional" else (x,)
    options = {"context": context} if how == "keyword" else {}
    if mask is not None and getattr(conditioner, "takes_mask", False):
        options["mask"] = mask
    return conditioner(*args, **options)
