"""FrEIA's i-RevNet downsampling: ``FrEIA.modules.reshapes``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register
from .layer import FreiaAdapter


def _squeeze(x: Tensor, up: bool) -> tuple[tuple[Tensor], float]:
    return (F.pixel_shuffle(x, 2) if up else F.pixel_unshuffle(x, 2),), 0.0


@register("FrEIA.modules.reshapes.IRevNetDownsampling")
class Downsampling(FreiaAdapter):
    """2 x 2 pixels become four channels: a copy in place of a convolution with a kernel of zeros and ones."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.legacy_backend:
            return "legacy_backend=True"
        kernel = module.downsample_kernel
        one = torch.eye(4).reshape(4, 1, 2, 2).repeat(module.channels, 1, 1, 1).to(kernel)
        if kernel.requires_grad or not torch.equal(kernel, one):
            return "a downsample_kernel of the user's own"
        return None

    class Layer:
        def forward(self, x, c=None, jac=True, rev=False):
            if x[0].dim() != 4 or (not rev and (x[0].shape[2] % 2 or x[0].shape[3] % 2)):
                return super().forward(x, c, jac, rev)
            return _squeeze(x[0], rev)


@register("FrEIA.modules.reshapes.IRevNetUpsampling")
class Upsampling(Downsampling):
    """The other way round."""

    class Layer:
        def forward(self, x, c=None, jac=True, rev=False):
            if x[0].dim() != 4 or (rev and (x[0].shape[2] % 2 or x[0].shape[3] % 2)):
                return super().forward(x, c, jac, rev)
            return _squeeze(x[0], not rev)
