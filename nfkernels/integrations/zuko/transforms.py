"""What a fused lazy layer returns: the transform that zuko's would, with one op for a call and its log-determinant."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform, _InverseTransform

from ..constants import specialised

_FUSED_TYPES = (torch.float32, torch.float64)


class Step:
    """What a chain of transforms can be made of.

    ``_flat(x [N, D], context [N, E] or None, logdet [N] or None, inverse)`` gives ``(y, logdet)``, the running
    log-determinant added. ``_context`` is what x is broadcast with, ``_features`` is D.
    """

    _context: Tensor | None = None
    _features: int

    def _flat(self, x: Tensor, context: Tensor | None, logdet: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _fits(self, x: Tensor) -> bool:
        return x.dtype in _FUSED_TYPES and x.dim() > 0 and x.shape[-1] == self._features

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The map or its inverse of ``x [*, D]``, and its log-determinant ``[*]``: one pass for both."""
        if not self._fits(x):
            return self._unfused(x, inverse)
        context, batch = self._context, x.shape[:-1]
        if context is not None and context.shape[:-1] != batch:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            x, context = (t.expand(*batch, t.shape[-1]) for t in (x, context))
        if len(batch) == 1:
            return self._flat(x, context, None, inverse)
        context = None if context is None else context.reshape(-1, context.shape[-1])
        y, logdet = self._flat(x.reshape(-1, x.shape[-1]), context, None, inverse)
        return y.reshape(*batch, y.shape[-1]), logdet.reshape(batch)

    def _unfused(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Fused(Step):
    """Goes in front of the class of transforms that the original layer returns, which then is the fallback."""

    __nfkernels_original__: type

    def _call(self, x):
        return self._run(x, False)[0]

    def _inverse(self, y):
        return self._run(y, True)[0]

    def call_and_ladj(self, x):
        return self._run(x, False)

    def log_abs_det_jacobian(self, x, y):
        return self._run(x, False)[1]

    @property
    def inv(self):
        if self._inv is None:
            self._inv = Inverse(self)
        return self._inv

    def _unfused(self, x, inverse):
        original = self.__nfkernels_original__
        if not inverse:
            if original.call_and_ladj is not Transform.call_and_ladj:
                return original.call_and_ladj(self, x)
            made = original._call(self, x)  # that one would call what stands in front of the original
            return made, original.log_abs_det_jacobian(self, x, made)
        made = original._inverse(self, x)
        return made, -original.log_abs_det_jacobian(self, made, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the original's."""
        return self.__nfkernels_original__, self._arguments()

    def _arguments(self) -> tuple:
        """What the original class is built from."""
        raise NotImplementedError


class Inverse(Step, _InverseTransform):
    """torch's own inverse of a transform, which also finds its log-determinant in the same pass."""

    def __init__(self, transform: Fused) -> None:
        super().__init__(transform)
        self._features = transform._features
        self._context = transform._context

    def call_and_ladj(self, y):
        return self._inv._run(y, True)

    def _fits(self, x):
        return self._inv._fits(x)

    def _flat(self, x, context, logdet, inverse):
        return self._inv._flat(x, context, logdet, not inverse)

    def _unfused(self, x, inverse):
        return self._inv._unfused(x, not inverse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _InverseTransform, (self._inv,)


def zukos(name: str) -> type:
    """A class of ``zuko.transforms`` or ``zuko.distributions``, which are loaded where a layer of zuko is."""
    home, _, cls = name.rpartition(".")
    return getattr(sys.modules[f"zuko.{home}"], cls)


@functools.cache
def fused_transform(mixin: type, original: type, **constants: Any) -> type:
    """``original`` with the methods of ``mixin`` in front, and what is known of one layer; printed as the original."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "__nfkernels_original__": original, **constants})


def making(layer: type, made: type) -> type:
    """A class of methods whose ``_made`` is the class of what they return."""
    return specialised(layer, _made=made)


def plain(transform: Transform) -> None:
    """What the constructor of every transform does, for those whose own would compute what may not be needed."""
    Transform.__init__(transform)
