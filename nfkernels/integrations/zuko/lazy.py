"""What the adapters of zuko's lazy layers share: how they are proved."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Call

ROWS = 64
# Of the raw params. A wider one proves no more of maps that clip softly, and makes inverses that amplify roundings a
# thousandfold, whose largest error is anybody's.
SPREAD = 2.0


class Lazy(Adapter):
    """A layer whose ``forward(context)`` returns a transform: proved on made-up data, both ways."""

    def width(self, module: nn.Module) -> int:
        """How many features the data has."""
        raise NotImplementedError

    def trials(self, module: nn.Module, call: Call) -> list[Call]:
        x = self._data(module, call)
        with torch.no_grad():
            y = replace(call, then=_there, more=(x,)).on(copy.deepcopy(module).double())[0].float().double()
        return [replace(call, then=_there, more=(x,)), replace(call, then=_back, more=(y,))]

    def _data(self, module: nn.Module, call: Call) -> Tensor:
        """Float64, for one sample of the context each, inside and outside of every spline's interval."""
        context = call.args[0] if call.args else call.kwargs.get("c")
        with_rows = isinstance(context, Tensor) and context.dim() > 1
        shape = (*(context.shape[:-1] if with_rows else (ROWS,)), self.width(module))
        place = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        draw = torch.Generator().manual_seed(4)
        # Numbers that float32 has: what is measured is the layer's error, not that of its inputs.
        return (3 * torch.randn(shape, generator=draw)).double().to(place)

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        super().disturb(module, generator)
        # By the last bias, not by a hook on the network: an inverse that reads the weights is to be proved as well.
        network = getattr(module, "hyper", None)
        last = list(network)[-1] if isinstance(network, nn.Sequential) and len(network) else None
        for p in (getattr(last, "bias", None), *getattr(module, "phi", ())):
            if isinstance(p, Tensor):
                draw = torch.rand(p.shape, generator=generator, dtype=torch.float32)
                with torch.no_grad():
                    p.add_(((2 * draw - 1) * SPREAD).to(p))


def _there(transform, x):
    return transform.call_and_ladj(x)


def _back(transform, y):
    return transform.inv.call_and_ladj(y)
