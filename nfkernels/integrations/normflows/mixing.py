"""normflows' mixes of channels: ``normflows.flows.mixing``. Data goes through ``inverse`` with W, samples with W^-1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...ops import channel_mix, lu_compose, lu_layer
from ...ops.lu_linear import WIDEST
from ...reference.lu_compose import exact_dtype
from ..adapter import Adapter
from ..registry import class_of, register

_MIXING = "normflows.flows.mixing"


class _Mix(Adapter):
    """W whole, or ``P (L + I) (U + diag(sign exp(log_S)))``: one op makes W or its inverse, by substitution."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.use_lu and not _is_permutation(module.P):
            return "a P that is not a permutation"
        return None


def _is_permutation(p: Tensor) -> bool:
    ones = torch.ones(p.shape[0], dtype=p.dtype, device=p.device)
    whole = ((p == 0) | (p == 1)).all() & (p.sum(0) == ones).all() & (p.sum(1) == ones).all()
    return bool(whole)


def _matrix(self: nn.Module, inverse: bool) -> tuple[Tensor, Tensor]:
    """``(W, log|det W|)``, or with ``inverse`` W^-1 and the log-determinant of W all the same."""
    if self.use_lu:
        made = lu_compose(
            self.L, self.U, self.log_S, sign=self.sign_S, permutation=self.P.argmax(1),
            inverse=inverse, weight=not inverse,
        )  # fmt: skip
        return made.inverse if inverse else made.weight, made.logdet
    w = self.W
    log_det = torch.linalg.slogdet(w)[1]
    return torch.linalg.inv(w.to(exact_dtype(w))).to(w.dtype) if inverse else w, log_det


@register(f"{_MIXING}.Invertible1x1Conv")
class Invertible1x1Conv(_Mix):
    """``W z`` at every position; the log-determinant is 0-dimensional."""

    class Layer:
        def forward(self, z):
            if z.dim() != 4:
                return super().forward(z)
            matrix, log_det = _matrix(self, inverse=True)
            return channel_mix(z, matrix), log_det * -(z.shape[2] * z.shape[3])

        def inverse(self, z):
            if z.dim() != 4:
                return super().inverse(z)
            matrix, log_det = _matrix(self, inverse=False)
            return channel_mix(z, matrix), log_det * (z.shape[2] * z.shape[3])


@register(f"{_MIXING}.InvertibleAffine")
class InvertibleAffine(_Mix):
    """``z W``: rows times the matrix."""

    class Layer:
        def forward(self, z, context=None):
            if z.dim() != 2:
                return super().forward(z, context)
            matrix, log_det = _matrix(self, inverse=True)
            return channel_mix(z, matrix.t()), -log_det

        def inverse(self, z, context=None):
            if z.dim() != 2:
                return super().inverse(z, context)
            matrix, log_det = _matrix(self, inverse=False)
            return channel_mix(z, matrix.t()), log_det


# --- the LU-factored linear map ---------------------------------------------------------------------------------------


def _lu(linear: nn.Module, x: Tensor, columns: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """``L U x[:, columns] + bias`` or back, and the log-determinant, [B]."""
    return lu_layer(
        x, linear.lower_entries, linear.upper_entries, linear.unconstrained_upper_diag, linear.bias, columns=columns,
        diagonal="softplus", eps=linear.eps, inverse=inverse,
    )  # fmt: skip


def _takes(linear: nn.Module, x: Tensor) -> bool:
    """Other types are the original's to promote or to refuse; no triangular solve is for half precision."""
    own = x.dtype == linear.bias.dtype and x.dtype.itemsize > 2
    return x.dim() == 2 and x.shape[1] == linear.features and (own or torch.is_autocast_enabled(x.device.type))


def _cached(linear: nn.Module) -> bool:
    return linear.using_cache and not linear.training


class _Cached(Adapter):
    """A copy that is moved off its start, and to float64, has no use for a cached matrix."""

    def linear(self, module: nn.Module) -> nn.Module:
        return module

    def pays_from(self, module: nn.Module) -> float:
        return 0 if self.linear(module).features <= WIDEST else math.inf

    def disturb(self, module: nn.Module, generator: torch.Generator) -> None:
        super().disturb(module, generator)
        self.linear(module).cache.invalidate()


@register(f"{_MIXING}._LULinear")
class LULinear(_Cached):
    """``L U x + bias``, triangles packed. With a cache the original's inverse dies on today's torch, ours solves."""

    class Layer:
        def forward(self, inputs, context=None):
            if _cached(self) or not _takes(self, inputs):
                return super().forward(inputs, context)
            return _lu(self, inputs, None, False)

        def inverse(self, inputs, context=None):
            if not _takes(self, inputs):
                return super().inverse(inputs, context)
            return _lu(self, inputs, None, True)


@register(f"{_MIXING}.LULinearPermute")
class LULinearPermute(_Cached):
    """A fixed permutation, then the LU-factored map."""

    def linear(self, module: nn.Module) -> nn.Module:
        return module.linear

    def refuse(self, module: nn.Module) -> str | None:
        inside = [class_of(m) for m in (module.permutation, module.linear)]
        if inside != [f"{_MIXING}._RandomPermutation", f"{_MIXING}._LULinear"] or module.permutation._dim != 1:
            return "its parts are not a permutation of features and an LU-factored map"
        return None

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.permutation, module.linear]

    class Layer:
        def forward(self, z, context=None):
            if not _takes(self.linear, z):
                return super().forward(z, context)
            return _lu(self.linear, z, self.permutation._permutation, True)

        def inverse(self, z, context=None):
            if _cached(self.linear) or not _takes(self.linear, z):
                return super().inverse(z, context)
            return _lu(self.linear, z, self.permutation._permutation, False)
