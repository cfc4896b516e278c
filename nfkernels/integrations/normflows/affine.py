"""normflows' constant affine maps and its ActNorms: ``z -> z exp(s) + t``, and ``inverse`` back."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ...ops import channel_affine
from ...ops._library import under_transform
from ...reference.lu_compose import no_autocast
from ..adapter import Adapter
from ..registry import class_of, register
from ..swap import respecialise

_AFFINE = "normflows.flows.affine.coupling"
_ACTNORM = "normflows.flows.normalization.ActNorm"


def moved(z: Tensor, s: Tensor, t: Tensor, inverse: bool = False) -> Tensor:
    """``z exp(s) + t`` or ``(z - t) exp(-s)``: of images in one pass, with all gradients in another."""
    if z.dim() == s.dim() > 2 and s.numel() == s.shape[1] == z.shape[1]:
        s, t = s.flatten(), t.flatten()
        scale = torch.exp(-s if inverse else s)
        return channel_affine(z, scale, -t * scale if inverse else t)
    if not inverse:
        return torch.addcmul(t, z, torch.exp(s))
    scale = torch.exp(-s)
    return (z - t) * scale if z.dim() < 3 else torch.addcmul(-t * scale, z, scale)


def _positions(self: nn.Module, z: Tensor) -> int:
    """How many elements share an entry of s. The first of its axes of size 1 is the batch's."""
    count = 1
    for axis in self.batch_dims[1:]:
        count *= z.shape[axis]
    return count


def _on_tables(module: nn.Module) -> str | None:
    return None if module.s.dim() > 2 else "a few operations on small rows: nothing to gain"


@register(f"{_AFFINE}.AffineConstFlow")
class AffineConst(Adapter):
    """A learned scale and shift, of images one for each channel; the log-determinant is 0-dimensional."""

    def refuse(self, module: nn.Module) -> str | None:
        return _on_tables(module)

    class Layer:
        def forward(self, z):
            return moved(z, self.s, self.t), torch.sum(self.s) * _positions(self, z)

        def inverse(self, z):
            return moved(z, self.s, self.t, inverse=True), torch.sum(self.s) * -_positions(self, z)


@register(f"{_AFFINE}.CCAffineConst")
class ClassConditionalAffineConst(Adapter):
    """The same with a scale and shift for each class, given as weights ``y [B, classes]``."""

    def refuse(self, module: nn.Module) -> str | None:
        return _on_tables(module)

    class Layer:
        def forward(self, z, y):
            s, t = _of_class(self, y)
            return moved(z, s, t), torch.sum(s, dim=list(range(1, self.n_dim))) * _positions(self, z)

        def inverse(self, z, y):
            s, t = _of_class(self, y)
            log_det = torch.sum(s, dim=list(range(1, self.n_dim))) * -_positions(self, z)
            return moved(z, s, t, inverse=True), log_det


def _of_class(self: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    with exact(y):
        s = self.s + (y @ self.s_cc).view(-1, *self.shape)
        return s, self.t + (y @ self.t_cc).view(-1, *self.shape)


def exact(x: Tensor) -> contextlib.AbstractContextManager:
    """Products of parameters are no network: autocast does not round them."""
    kind = x.device.type
    return no_autocast(kind) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


# --- started by the first batch ---------------------------------------------------------------------------------------


class _Started(Adapter):
    """Until the first batch the layer is the original, which starts it and replaces its flag; then no call looks."""

    Waiting: type

    def layer(self, module: nn.Module) -> type:
        return self.Layer if self.ready(module) else self.Waiting


@register(_ACTNORM)
class ActNorm(_Started):
    """An affine map of channels that starts from the statistics of one batch, in either direction."""

    Layer = AffineConst.Layer

    def ready(self, module: nn.Module) -> bool:
        return bool(module.data_dep_init_done > 0)

    class Waiting:
        def forward(self, z):
            out = super().forward(z)
            _look(self)
            return out

        def inverse(self, z):
            out = super().inverse(z)
            _look(self)
            return out


@register("normflows.utils.nn.ActNorm")
class NetworkActNorm(_Started):
    """The ActNorm between the convolutions of a network, which needs no log-determinant."""

    def refuse(self, module: nn.Module) -> str | None:
        return None if class_of(module.actNorm) == _ACTNORM else f"a {type(module.actNorm).__name__} inside"

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.actNorm]

    def ready(self, module: nn.Module) -> bool:
        return bool(module.actNorm.data_dep_init_done > 0)

    class Layer:
        def forward(self, input):
            return moved(input, self.actNorm.s, self.actNorm.t)

    class Waiting:
        def forward(self, input):
            out = super().forward(input)
            _look(self)
            return out


def _look(self: nn.Module) -> None:
    if not torch.compiler.is_compiling() and not under_transform():
        respecialise(self)
