"""Whether calling a module does more than its forward."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether a forward or backward hook is on the module itself; from its dictionary, which is the quickest."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
