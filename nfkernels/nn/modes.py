"""The mode that a flow is looked at in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(flow: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode that every module had, afterwards."""
    modes = {module: module.training for module in flow.modules()}
    flow.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
