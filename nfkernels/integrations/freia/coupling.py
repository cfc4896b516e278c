"""FrEIA's coupling blocks: ``FrEIA.modules.coupling_layers``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling
from ..channels import shared
from ..constants import specialised
from ..registry import register
from .layer import FreiaAdapter, as_original

# The clamps that have a name: log s = c * f(raw), and the map that computes it.
_CLAMPS = {
    "ATAN": (lambda u: 0.636 * torch.atan(u), lambda c: ScaleMap.freia(c)),
    "TANH": (torch.tanh, lambda c: ScaleMap("tanh", clamp=c)),
    "SIGMOID": (lambda u: torch.tanh(u / 2), lambda c: ScaleMap("tanh", prescale=0.5, clamp=c)),
}


class _Coupling(FreiaAdapter):
    """What the blocks share: the split, the clamp, the networks that are left alone."""

    networks: tuple[str, ...]
    whole = False  # whether all channels are transformed at once, by the condition alone

    def pays_from(self, module: nn.Module) -> float:
        return 2**12

    def refuse(self, module: nn.Module) -> str | None:
        if _clamp_of(module) is None:
            return "a clamp_activation of the user's own"
        if not float(module.clamp) > 0:
            return f"clamp={module.clamp}"
        if not self.whole and not (module.split_len1 and module.split_len2):
            return "its split leaves one side empty"
        return None

    def layer(self, module: nn.Module) -> type:
        c = float(module.clamp)
        return specialised(self.Layer, _made_for=c, _map=_CLAMPS[_clamp_of(module)][1](c))

    def conditioners(self, module: nn.Module) -> list[nn.Module]:
        return [getattr(module, name) for name in self.networks]


def _clamp_of(module: nn.Module) -> str | None:
    """The name of the block's clamp, which it keeps as a function only: asked at a few places."""
    f = module.f_clamp
    if f is not torch.tanh and not (getattr(f, "__module__", None) or "").startswith("FrEIA."):
        return None
    u = torch.linspace(-6, 6, 25, dtype=torch.float64)
    return next((name for name, (g, _) in _CLAMPS.items() if torch.allclose(f(u), g(u), rtol=0, atol=1e-12)), None)


def _fits(module: nn.Module, x: Sequence[Tensor]) -> bool:
    same = x[0].dim() == module.ndims + 1 and x[0].shape[1] == module.channels
    return same and module.clamp == module._made_for


def _with_condition(module: nn.Module, kept: Tensor, c: Sequence[Tensor]) -> Tensor:
    return torch.cat([kept, *c], 1) if module.conditional else kept


def _couple(module: nn.Module, x: Tensor, params: Tensor, identity: str, rev: bool, logdet: Tensor | None = None):
    return affine_coupling(
        x, params, scale_map=module._map, layout="scale_shift", identity=identity, inverse=rev,
        logdet=logdet,
    )  # fmt: skip


def _two_sided(module: nn.Module, x: Tensor, c: Sequence[Tensor], rev: bool):
    """First the leading channels, given the others, then the others; the other way round in reverse."""
    logdet = None
    for identity in ("first", "second") if rev else ("second", "first"):
        first, second = module.split_len1, module.split_len2
        x, kept = shared(x, 0, first) if identity == "first" else shared(x, first, second)
        params = module._params(_with_condition(module, kept, c), identity)
        x, logdet = _couple(module, x, params, identity, rev, logdet)
    return (x,), as_original(logdet, x)


@register("FrEIA.modules.coupling_layers.GLOWCouplingBlock")
class Glow(_Coupling):
    """``x exp(c f(s)) + t`` on each half in turn, one network for each: two passes, no half is cut out or joined."""

    networks = ("subnet1", "subnet2")

    class Layer:
        def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006 (the original's signature)
            return _two_sided(self, x[0], c, rev) if _fits(self, x) else super().forward(x, c, rev, jac)

        def _params(self, kept, identity):
            return self.subnet1(kept) if identity == "first" else self.subnet2(kept)


@register("FrEIA.modules.coupling_layers.RNVPCouplingBlock")
class RealNVP(_Coupling):
    """As :class:`Glow`, with a network for the scales and one for the shifts."""

    networks = ("subnet_s1", "subnet_t1", "subnet_s2", "subnet_t2")

    def pays_from(self, module: nn.Module) -> float:
        return 2**20  # the outputs of two networks have to be joined

    class Layer:
        def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
            return _two_sided(self, x[0], c, rev) if _fits(self, x) else super().forward(x, c, rev, jac)

        def _params(self, kept, identity):
            s, t = (self.subnet_s1, self.subnet_t1) if identity == "first" else (self.subnet_s2, self.subnet_t2)
            return torch.cat([s(kept), t(kept)], 1)


@register("FrEIA.modules.coupling_layers.AffineCouplingOneSided")
class OneSided(_Coupling):
    """The trailing channels, given the leading ones."""

    networks = ("subnet",)

    class Layer:
        def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
            if not _fits(self, x):
                return super().forward(x, c, rev, jac)
            data, kept = shared(x[0], 0, self.split_len1)
            y, logdet = _couple(self, data, self.subnet(_with_condition(self, kept, c)), "first", rev)
            return (y,), as_original(logdet, y)


@register("FrEIA.modules.coupling_layers.ConditionalAffineTransform")
class Conditional(_Coupling):
    """All channels, given the condition alone."""

    networks = ("subnet",)
    whole = True

    class Layer:
        def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
            if not _fits(self, x):
                return super().forward(x, c, rev, jac)
            y, logdet = _couple(self, x[0], self.subnet(torch.cat(c, 1) if len(c) > 1 else c[0]), "none", rev)
            return (y,), as_original(logdet, y)
