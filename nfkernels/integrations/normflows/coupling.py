"""normflows' affine couplings: ``normflows.flows.affine.coupling``. Its ``forward`` goes from z to x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling
from ..adapter import Adapter
from ..channels import shared
from ..constants import Constant, specialised
from ..registry import class_of, register

_FLOWS = "normflows.flows"
_MAPS = {
    "exp": ScaleMap.exp(),
    "sigmoid": ScaleMap("sigmoid", offset=2.0, reciprocal=True),  # divides when sampling
    "sigmoid_inv": ScaleMap("sigmoid", offset=2.0),
}
_ADDITIVE = ScaleMap.additive()
_LAYOUT = "shift_scale_interleaved"
ON_TABLES = 2**17  # numbers, for a training step; log_prob and sampling gain on any


def _map_of(coupling: nn.Module) -> ScaleMap | None:
    return _MAPS.get(coupling.scale_map) if coupling.scale else _ADDITIVE


@register(f"{_FLOWS}.affine.coupling.AffineCoupling")
class AffineCoupling(Adapter):
    """``[z1, z2] -> [z1, z2 s + t]``, params interleaved ``[t, s]``."""

    def pays_from(self, module: nn.Module) -> float:
        return ON_TABLES

    def refuse(self, module: nn.Module) -> str | None:
        if not module.scale:
            return "a shift alone: one addition, nothing to fuse"
        return None if _map_of(module) is not None else f"scale_map={module.scale_map!r}"

    def layer(self, module: nn.Module) -> type:
        return specialised(self.Layer, _map=_map_of(module))

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.param_map]

    class Layer:
        def forward(self, z):
            z1, z2 = z
            z2, log_det = affine_coupling(z2, self.param_map(z1), scale_map=self._map, layout=_LAYOUT)
            return [z1, z2], log_det

        def inverse(self, z):
            z1, z2 = z
            z2, log_det = affine_coupling(z2, self.param_map(z1), scale_map=self._map, layout=_LAYOUT, inverse=True)
            return [z1, z2], log_det


_BLOCK = [f"{_FLOWS}.reshape.Split", f"{_FLOWS}.affine.coupling.AffineCoupling", f"{_FLOWS}.reshape.Merge"]
_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")


@register(f"{_FLOWS}.affine.coupling.AffineCouplingBlock")
class AffineCouplingBlock(Adapter):
    """Split, coupling and merge in one pass: nothing is cut and nothing put together."""

    def pays_from(self, module: nn.Module) -> float:
        return ON_TABLES

    def refuse(self, module: nn.Module) -> str | None:
        if [class_of(f) for f in module.flows] != _BLOCK:
            return "its flows are not split, affine coupling and merge"
        split, coupling, merge = module.flows
        if split.mode != merge.mode or split.mode not in _MODES:
            return f"it splits by {split.mode!r} and merges by {merge.mode!r}"
        return None if _map_of(coupling) is not None else f"scale_map={coupling.scale_map!r}"

    def layer(self, module: nn.Module) -> type:
        split, coupling, _ = module.flows
        if "checkerboard" in split.mode:
            return specialised(self.Board, _map=_map_of(coupling), _colours=_COLOURS[split.mode == "checkerboard_inv"])
        return specialised(self.Layer, _map=_map_of(coupling), _first=split.mode == "channel")

    def parts(self, module: nn.Module) -> list[nn.Module]:
        return list(module.flows)

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [module.flows[1].param_map]

    class Layer:
        def forward(self, z):
            return _halves(self, z, False) if z.shape[1] > 1 else super().forward(z)

        def inverse(self, z):
            return _halves(self, z, True) if z.shape[1] > 1 else super().inverse(z)

    class Board:
        def forward(self, z):
            return _board(self, z, False) if _even(z) else super().forward(z)

        def inverse(self, z):
            return _board(self, z, True) if _even(z) else super().inverse(z)


def _halves(self: nn.Module, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    half = (z.shape[1] + 1) // 2
    z, kept = shared(z, 0, half) if self._first else shared(z, half, z.shape[1] - half)
    return affine_coupling(
        z, self.flows[1].param_map(kept), scale_map=self._map, layout=_LAYOUT,
        identity="first" if self._first else "second", inverse=inverse,
    )  # fmt: skip


def _even(z: Tensor) -> bool:
    return z.dim() > 1 and z.shape[-1] % 2 == 0 and z.numel() > 0


def _board(self: nn.Module, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Neighbours along the last axis are of different colour: each pair shares the params that the network gives the
    half that is kept."""
    pairs = z.reshape(*z.shape[:-1], z.shape[-1] // 2, 2)
    colours = self._colours.of(z)
    kept = torch.where(colours[..., 0], pairs[..., 1], pairs[..., 0])
    params = self.flows[1].param_map(kept)[..., None]
    y, log_det = affine_coupling(
        pairs, params.expand(*params.shape[:-1], 2), scale_map=self._map, layout=_LAYOUT, mask=colours, inverse=inverse
    )
    return y.view(z.shape), log_det


class Colours:
    """The checkerboards of one colouring, by the data's shape: bool ``[1, ..., W / 2, 2]``, the elements that are
    transformed, by the parity of their indices' sum."""

    def __init__(self, odd: bool) -> None:
        self._odd = odd
        self._made: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def of(self, z: Tensor) -> Tensor:
        key = z.shape[1:], z.device
        if key not in self._made:
            with torch.inference_mode(False):
                total = torch.zeros((), dtype=torch.int64, device=z.device)
                for size in reversed(z.shape[1:]):
                    total = torch.arange(size, device=z.device).view(-1, *[1] * total.dim()) + total
                colours = (total % 2 == int(self._odd)).view(1, *z.shape[1:-1], z.shape[-1] // 2, 2)
                self._made[key] = colours
        return self._made[key]


_COLOURS = {False: Colours(False), True: Colours(True)}


@register(f"{_FLOWS}.affine.coupling.MaskedAffineFlow")
class MaskedAffineFlow(Adapter):
    """``b z + (1 - b) (z exp(s(b z)) + t(b z))``; what is not finite in s or t gives NaN."""

    def pays_from(self, module: nn.Module) -> float:
        return 2**14

    def refuse(self, module: nn.Module) -> str | None:
        if module.b.dim() < 2 or not bool(((module.b == 0) | (module.b == 1)).all()):
            return "a mask that is not of zeros and ones, an entry for each feature"
        if not isinstance(module.s, nn.Module) and module.s is not torch.zeros_like:
            return "a scale that is a function of the user's"
        if not isinstance(module.t, nn.Module):
            return "no shift" if module.t is torch.zeros_like else "a shift that is a function of the user's"
        return None

    def layer(self, module: nn.Module) -> type:
        scaled = isinstance(module.s, nn.Module)
        moved = (1 - module.b).to("cpu", torch.float64)
        moved = torch.cat((moved, moved), 1) if scaled else moved
        return specialised(self.Layer, _scaled=scaled, _moved=Constant(moved, torch.float32, moved.shape))

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [m for m in (module.s, module.t) if isinstance(m, nn.Module)]

    class Layer:
        def forward(self, z):
            return _masked(self, z, False) if z.dim() == self.b.dim() else super().forward(z)

        def inverse(self, z):
            return _masked(self, z, True) if z.dim() == self.b.dim() else super().inverse(z)


def _masked(self: nn.Module, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Zero params leave an element as it is, to the last bit; zero times NaN is the NaN that the original gives."""
    seen = self.b * z
    if self._scaled:
        scale = self.s(seen)  # in this order: either network may draw random numbers
        params = torch.cat((self.t(seen), scale), 1)
    else:
        params = self.t(seen)
    with torch.no_grad():
        nothing = params - params  # 0, and NaN where params are not finite
    params = torch.addcmul(nothing, params, self._moved.on(params.device, params.dtype))
    return affine_coupling(z, params, scale_map=_MAPS["exp"] if self._scaled else _ADDITIVE, inverse=inverse)
