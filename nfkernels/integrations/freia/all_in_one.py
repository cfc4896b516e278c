"""FrEIA's AllInOneBlock: ``FrEIA.modules.all_in_one_block``, and the copy of it that anomalib keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...ops import ScaleMap, affine_coupling, channel_affine, channel_mix
from ...ops._library import under_transform
from ...ops.channel_affine import permute_channels
from ...reference.affine_coupling import compute_dtype
from ..channels import Order, shared
from ..constants import specialised
from ..registry import register
from .layer import FreiaAdapter, as_original

# Up to this many channels of an image the scale is multiplied into the matrix; above, its gradient by way of the
# matrix's costs more than a pass of its own.
NARROW = 32


@register("FrEIA.modules.all_in_one_block.AllInOneBlock")
class AllInOne(FreiaAdapter):
    """Coupling, global scale and offset, permutation. ``y = R (scale * coupling(x) + offset)``.

    A hard permutation, which the original multiplies by as a dense matrix, is an index here.
    """

    def pays_from(self, module: nn.Module) -> float:
        return 2**16

    def refuse(self, module: nn.Module) -> str | None:
        if not module.splits[1]:
            return "a single channel: nothing is transformed"
        if _divided(module) is None:
            return f"its scale is not exp(c tanh(a)) with c = {module.clamp}"
        return None

    def layer(self, module: nn.Module) -> type:
        return _for(self.Layer, float(module.clamp), _divided(module), _hard(module))

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.subnet]

    class Layer:
        def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006 (the original's signature)
            data = x[0]
            fits = data.dim() == self.input_rank + 2 and data.shape[1] == self.in_channels
            if not fits or self.clamp != self._made_for:
                return super().forward(x, c, rev, jac)
            if data.dtype != self.global_offset.dtype:  # features from a network under autocast: as the original's
                data = data.to(torch.promote_types(data.dtype, self.global_offset.dtype))
            return _reverse(self, data, c) if rev else _forward(self, data, c)


@register()
class AnomalibAllInOne(AllInOne):
    """The same block under anomalib's name."""

    def recognise(self, module: nn.Module) -> bool:
        names = ("splits", "clamp", "GIN", "householder", "reverse_pre_permute", "input_rank", "in_channels")
        return (
            type(module).__name__ == "AllInOneBlock"
            and all(hasattr(module, name) for name in names)
            and all(isinstance(getattr(module, n, None), nn.Parameter) for n in ("global_scale", "global_offset"))
            and callable(getattr(module, "global_scale_activation", None))
            and isinstance(getattr(module, "subnet", None), nn.Module)
        )


def _for(layer: type, c: float, divided: bool, order: Order | None) -> type:
    scale_map = ScaleMap("tanh", prescale=1 / c, clamp=c) if divided else ScaleMap.freia_all_in_one(c)
    return specialised(layer, _made_for=c, _map=scale_map, _divided=divided, _order=order)


def _divided(module: nn.Module) -> bool | None:
    """Whether the log-scale is ``c tanh(a / c)`` (releases differ) instead of ``c tanh(a)``; None if neither. The
    layer is asked for two channels whose log-scales differ by it, whatever their mean (a GIN block takes it off)."""
    c = float(module.clamp)
    if not (math.isfinite(c) and c > 0 and hasattr(module, "_affine")):
        return None
    ones, a = [1] * module.input_rank, min(1.0, 1 / c)
    raw = torch.tensor([10 * a, 0, 0, 0], dtype=torch.float64).reshape(1, 4, *ones)
    with torch.no_grad():
        y, _ = module._affine(torch.ones(1, 2, *ones, dtype=torch.float64), raw)
    found = float(y.flatten()[0].log() - y.flatten()[1].log())
    for divided, expected in ((False, c * math.tanh(a)), (True, c * math.tanh(a / c))):
        if abs(found - expected) <= 1e-9 * (1 + abs(expected)):
            return divided
    return None


def _hard(module: nn.Module) -> Order | None:
    """The block's permutation where it is one, frozen, and its inverse is its inverse."""
    if module.householder or module.w_perm.requires_grad or module.w_perm_inv.requires_grad:
        return None
    if not torch.equal(module.w_perm.transpose(0, 1), module.w_perm_inv):
        return None
    return Order.of(module.w_perm.flatten(1))


# --- both directions -------------------------------------------------------------------------------------------------


def _forward(self: nn.Module, x: Tensor, c: Sequence[Tensor]):
    turn = _turn(self)
    if self.reverse_pre_permute:
        x = _turned(self, x, turn, True)
    scale = None if self.GIN else self.global_scale_activation(self.global_scale).flatten()
    x, logdet = _coupled(self, x, c, scale, False)
    offset = self.global_offset.flatten()
    if scale is None:
        x = _turned(self, x + self.global_offset, turn, False)
    elif turn is None:
        there, back = _places(self)
        if x.dim() == 2:  # two vectors' orders would cost as much as the table's
            x = permute_channels(channel_affine(x, scale, offset), there, back)
        else:
            x = channel_affine(x, scale.index_select(0, there), offset.index_select(0, there), there, back)
    elif _folds(x):
        x = channel_mix(x, turn[0] * scale, turn[0] @ offset)
    else:
        x = channel_mix(channel_affine(x, scale, offset), turn[0])
    return (x,), as_original(logdet, x)


def _reverse(self: nn.Module, x: Tensor, c: Sequence[Tensor]):
    turn = _turn(self)
    scale = None if self.GIN else self.global_scale_activation(self.global_scale).flatten()
    if scale is None:
        x = _turned(self, x, turn, True) - self.global_offset
    elif x.dim() == 2:
        x = (_turned(self, x, turn, True) - self.global_offset) / scale
    else:
        over = scale.reciprocal()
        offset = -self.global_offset.flatten() * over
        if turn is None:
            there, back = _places(self)
            x = channel_affine(x, over, offset, back, there)
        elif _folds(x):
            x = channel_mix(x, turn[1] * over[:, None], offset)
        else:
            x = channel_affine(channel_mix(x, turn[1]), over, offset)
    x, logdet = _coupled(self, x, c, scale, True)
    if self.reverse_pre_permute:
        x = _turned(self, x, turn, False)
    return (x,), as_original(logdet, x)


def _folds(x: Tensor) -> bool:
    return x.dim() > 2 and x.shape[1] <= NARROW


def _turn(self: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The matrix ``[C, C]`` of a soft permutation and its inverse; None for a hard one."""
    if self._order is not None:
        return None
    if not self.householder:
        return self.w_perm.flatten(1), self.w_perm_inv.flatten(1)
    matrix, vectors = self.w_0, self.vk_householder
    # Each reflection I - 2 v v' / v'v as a change of rank one.
    for v in (vectors * (2 / vectors.square().sum(1, keepdim=True)).sqrt()).unbind():
        matrix = torch.addr(matrix, matrix.mv(v), v, alpha=-1)
    return matrix, matrix.t()


# Of permutations that were looked at: the tensor's version and place in memory, the order and its inverse. DDP copies
# the first rank's over the others', after they were fused.
_ORDERS = WeakIdKeyDictionary()


def _places(self: nn.Module) -> tuple[Tensor, Tensor]:
    """The order of a hard permutation and its inverse, int64 ``[C]``."""
    matrix = self.w_perm
    if torch.compiler.is_compiling() or under_transform() or matrix.is_inference():
        return matrix.flatten(1).argmax(1), self.w_perm_inv.flatten(1).argmax(1)
    state, known = (matrix._version, matrix.data_ptr()), _ORDERS.get(matrix)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # a later call may save them for a backward
            there = matrix.detach().flatten(1).argmax(1)
            known = _ORDERS[matrix] = state, (there, there.argsort())
    return known[1]


def _turned(self: nn.Module, x: Tensor, turn: tuple[Tensor, Tensor] | None, back: bool) -> Tensor:
    if turn is not None:
        return channel_mix(x, turn[back])
    there, inverse = _places(self)
    return permute_channels(x, inverse, there) if back else permute_channels(x, there, inverse)


def _coupled(self: nn.Module, x: Tensor, c: Sequence[Tensor], scale: Tensor | None, rev: bool):
    """The coupling, and the log-determinant of it and of the global scale."""
    x, kept = shared(x, 0, self.splits[0])
    params = self.subnet(torch.cat([kept, *c], 1) if self.conditional else kept)
    if self.GIN:
        return _volume_preserving(self, x, params, rev)
    pixels = x.shape[2:].numel()
    logdet = torch.log(scale).sum().to(compute_dtype(x)) * (-pixels if rev else pixels)
    if self._divided:
        params = params * 0.1
    return affine_coupling(
        x, params, scale_map=self._map, layout="scale_shift", identity="first", inverse=rev,
        logdet=logdet.expand(x.shape[0]),
    )  # fmt: skip


def _volume_preserving(self: nn.Module, x: Tensor, params: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
    """Log-scales less their mean over the sample: no kernel does that."""
    first, rest = x.split(self.splits, 1)
    raw, shift = (0.1 * params).to(x.dtype).split(self.splits[1], 1)
    log_s = self.clamp * torch.tanh(raw / self.clamp if self._divided else raw)
    log_s = log_s - log_s.mean(self.sum_dims, keepdim=True)
    rest = (rest - shift) * torch.exp(-log_s) if rev else rest * torch.exp(log_s) + shift
    return torch.cat([first, rest], 1), log_s.sum(self.sum_dims) * (-1 if rev else 1)
