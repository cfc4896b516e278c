"""Convolutional conditioners, channels-last: bias and ReLU in the convolution's own pass."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ...nn.conv import conv
from ..adapter import Adapter
from ..constants import specialised
from ..registry import changed, qualified
from ..swap import original_of
from .layout import channels_last

_CONV_NETS = "normflows.nets.cnn.ConvNet2d"


class _Network(Adapter):
    """What both kinds share: the convolutions, each with the ReLU after it; other modules are called as they are."""

    kind = "channels-last"

    def chain(self, module: nn.Module) -> nn.Module:
        return module

    def refuse(self, module):
        if not any(relu for _, relu in _plan(self.chain(module))):
            return "a network without a convolution that a ReLU follows"
        return None

    def disturb(self, module, generator):
        super().disturb(module, generator)
        channels_last([module])  # as it will be

    def layer(self, module):
        return specialised(self.Layer, _plan=tuple(_plan(self.chain(module))))

    def parts(self, module):
        layers = list(self.chain(module)._modules.values())
        return [layers[i + j] for i, relu in _plan(self.chain(module)) if relu is not None for j in range(1 + relu)]


class Sequence(_Network):
    """A plain ``nn.Sequential``."""

    class Layer:
        def forward(self, input):
            return super().forward(input) if _low(input) else _run(self, self._plan, input)


class ConvNet(_Network):
    """normflows' ``ConvNet2d``."""

    class Layer:
        def forward(self, x):
            return super().forward(x) if _low(x) else _run(self.net, self._plan, x)

    def chain(self, module):
        return module.net


def _plan(chain: nn.Module) -> list[tuple[int, bool | None]]:
    """The place of each module, and whether a ReLU after it goes with it: None where it is no plain convolution."""
    found: list[tuple[int, bool | None]] = []
    modules = list(chain._modules.values())
    i = 0
    while i < len(modules):
        if not _plain(modules[i]):
            found.append((i, None))
        else:
            relu = i + 1 < len(modules) and _is_relu(modules[i + 1])
            found.append((i, relu))
            i += relu
        i += 1
    return found


def _plain(m: nn.Module) -> bool:
    if type(m) is not nn.Conv2d or m.bias is None or m.padding_mode != "zeros" or isinstance(m.padding, str):
        return False
    side = m.kernel_size[0]
    same = m.kernel_size == (side, side) and side % 2 == 1 and m.padding == (side // 2, side // 2)
    return same and m.stride == (1, 1) and m.dilation == (1, 1) and m.groups == 1


def _is_relu(m: nn.Module) -> bool:
    return type(m) is nn.ReLU or (type(m) is nn.LeakyReLU and m.negative_slope == 0)


def _low(x: Tensor) -> bool:
    """Autocast chooses by the call; a compiler fuses by itself."""
    return x.dim() != 4 or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def _run(chain: nn.Module, plan: tuple, x: Tensor) -> Tensor:
    modules = list(chain._modules.values())
    for i, relu in plan:
        m = modules[i]
        x = m(x) if relu is None else conv(x, m.weight, m.bias, m.padding[0], relu=relu)
    return x


@functools.cache
def _adapters() -> tuple[_Network, _Network]:
    return Sequence(), ConvNet()


def network(module: nn.Module) -> _Network | None:
    """The adapter of a conditioner whose convolutions can be run so, or None."""
    sequence, conv_net = _adapters()
    cls = original_of(type(module))
    if cls is nn.Sequential:
        return sequence
    base = next((b for b in cls.__mro__ if qualified(b) == _CONV_NETS), None)
    return conv_net if base is not None and changed(module, base) is None else None
