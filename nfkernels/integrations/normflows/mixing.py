"""normflows' mixes of channels: ``normflows.flows.mixing``. Data goes through ``inverse`` with W, samples with W^-1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import channel_mix, lu_compose, lu_linear
from ...reference.lu_compose import exact_dtype
from ..adapter import Adapter
from ..registry import register
from .constants import Constant, class_of, specialised

_MIXING = "normflows.flows.mixing"


class _Mix(Adapter):
    """W whole, or ``P (L + I) (U + diag(sign exp(log_S)))``: one op makes W or its inverse, by substitution."""

    def refuse(self, module: nn.Module) -> str | None:
        if module.use_lu and not _is_permutation(module.P):
            return "a P that is not a permutation"
        return None

    def layer(self, module: nn.Module) -> type:
        rows = Constant(module.P.argmax(1), torch.int64) if module.use_lu else None
        return specialised(self.Layer, _rows=rows)


def _is_permutation(p: Tensor) -> bool:
    ones = torch.ones(p.shape[0], dtype=p.dtype, device=p.device)
    whole = ((p == 0) | (p == 1)).all() & (p.sum(0) == ones).all() & (p.sum(1) == ones).all()
    return bool(whole)


def _matrix(self: nn.Module, inverse: bool) -> tuple[Tensor, Tensor]:
    """``(W, log|det W|)``, or with ``inverse`` W^-1 and the log-determinant of W all the same."""
    if self.use_lu:
        made = lu_compose(
            self.L, self.U, self.log_S, sign=self.sign_S, permutation=self._rows.on(self.L.device),
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


class Triangles:
    """Where the entries of packed strict triangles, row by row, lie in ``[D, D]``. The other places, which the op does
    not read, repeat the mirror image's entry: no one entry is the source of many."""

    def __init__(self, features: int) -> None:
        i, j = torch.tril_indices(features, features, -1)
        lower, upper = (torch.zeros(features, features, dtype=torch.int64) for _ in range(2))
        lower[i, j] = lower[j, i] = torch.arange(len(i))
        i, j = torch.triu_indices(features, features, 1)
        upper[i, j] = upper[j, i] = torch.arange(len(i))
        self.features = features
        self._lower, self._upper = Constant(lower, torch.int64), Constant(upper, torch.int64)

    def dense(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.features, self.features
        lower = lower.index_select(0, self._lower.on(lower.device)).view(shape)
        return lower, upper.index_select(0, self._upper.on(upper.device)).view(shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Triangles) and self.features == other.features

    def __hash__(self) -> int:
        return hash(self.features)


def _too_small(linear: nn.Module) -> str | None:
    return "a single feature" if linear.features < 2 else None


def _lu(linear: nn.Module, triangles: Triangles, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """``L U x + bias`` or back, and the log-determinant, [B]."""
    raw = linear.unconstrained_upper_diag
    y = lu_linear(
        x, *triangles.dense(linear.lower_entries, linear.upper_entries), raw, linear.bias, diagonal="softplus",
        eps=linear.eps, inverse=inverse,
    )  # fmt: skip
    log_det = torch.log(nn.functional.softplus(raw) + linear.eps).sum()
    return y, (-log_det if inverse else log_det).repeat(x.shape[0])


def _takes(linear: nn.Module, x: Tensor) -> bool:
    return x.dim() == 2 and x.shape[1] == linear.features


def _cached(linear: nn.Module) -> bool:
    return linear.using_cache and not linear.training


@register(f"{_MIXING}._LULinear")
class LULinear(Adapter):
    """``L U x + bias``, triangles packed. With a cache the original's inverse dies on today's torch, ours solves."""

    def refuse(self, module: nn.Module) -> str | None:
        return _too_small(module)

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _triangles=Triangles(module.features))

    class Layer:
        def forward(self, inputs, context=None):
            if _cached(self) or not _takes(self, inputs):
                return super().forward(inputs, context)
            return _lu(self, self._triangles, inputs, False)

        def inverse(self, inputs, context=None):
            if not _takes(self, inputs):
                return super().inverse(inputs, context)
            return _lu(self, self._triangles, inputs, True)


@register(f"{_MIXING}.LULinearPermute")
class LULinearPermute(Adapter):
    """A fixed permutation, then the LU-factored map."""

    def refuse(self, module: nn.Module) -> str | None:
        inside = [class_of(m) for m in (module.permutation, module.linear)]
        if inside != [f"{_MIXING}._RandomPermutation", f"{_MIXING}._LULinear"] or module.permutation._dim != 1:
            return "its parts are not a permutation of features and an LU-factored map"
        return _too_small(module.linear)

    def layer(self, module: nn.Module) -> type:
        order = module.permutation._permutation
        return specialised(
            self.Layer, _triangles=Triangles(module.linear.features), _order=Constant(order, torch.int64),
            _back=Constant(torch.argsort(order), torch.int64),
        )  # fmt: skip

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return [module.permutation, module.linear]

    class Layer:
        def forward(self, z, context=None):
            if not _takes(self.linear, z):
                return super().forward(z, context)
            z, log_det = _lu(self.linear, self._triangles, z, True)
            return z.index_select(1, self._back.on(z.device)), log_det

        def inverse(self, z, context=None):
            if _cached(self.linear) or not _takes(self.linear, z):
                return super().inverse(z, context)
            return _lu(self.linear, self._triangles, z.index_select(1, self._order.on(z.device)), False)
