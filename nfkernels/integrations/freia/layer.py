"""What FrEIA's layers share: how they are called, and what is left as it is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Call


class FreiaAdapter(Adapter):
    """The way back of a call is the same call with ``rev`` the other way round."""

    def partner(self, module: nn.Module, call: Call, out: Any) -> Call | None:
        bound = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs)
        first = list(bound.signature.parameters)[1]
        bound.arguments[first] = out[0]
        bound.arguments["rev"] = not bound.arguments.get("rev", False)
        return Call(call.method, bound.args[1:], bound.kwargs)


def as_original(logdet: Tensor, x: Tensor) -> Tensor:
    """The op's log-determinant in the type that the layer returns: that of low-precision data, outside autocast."""
    if x.dtype.itemsize >= 4 or torch.is_autocast_enabled(x.device.type):
        return logdet
    return logdet.to(x.dtype)
