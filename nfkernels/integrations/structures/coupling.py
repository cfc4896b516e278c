"""Affine couplings by their submodules: Glow ports, Glow-TTS, VITS, RAD-TTS. Numbers tell half, order, layout and
scale map."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...ops import ScaleMap, affine_coupling
from ...reference.affine_coupling import compute_dtype
from ...reference.scale_map import log_scale
from ..channels import shared
from ..registry import register
from .family import Core, Family, Seen

# --- the networks: (module, the half that passes through, the call's arguments, the mask) -> params ------------------


def _child(core: Coupling, module: nn.Module, x: Tensor, given: dict, mask: Tensor | None) -> Tensor:
    """One submodule; a context stands beside its input."""
    context = given.get("context")
    return getattr(module, core.source)(x if context is None else torch.cat([x, context], 1))


def _start_wn_end(core: Coupling, module: nn.Module, x: Tensor, given: dict, mask: Tensor | None) -> Tensor:
    """Glow-TTS."""
    masked = 1 if mask is None else mask
    return module.end(module.wn(module.start(x) * masked, masked, given["g"]))


def _pre_enc_post(core: Coupling, module: nn.Module, x: Tensor, given: dict, mask: Tensor | None) -> Tensor:
    """VITS."""
    return module.post(module.enc(module.pre(x) * mask, mask, g=given["g"])) * mask


def _wavenet(core: Coupling, module: nn.Module, x: Tensor, given: dict, mask: Tensor | None) -> Tensor:
    """RAD-TTS, whose WN takes a pair."""
    return module.affine_param_predictor((x, given["context"]), seq_lens=given["seq_lens"])


def _simple_conv(core: Coupling, module: nn.Module, x: Tensor, given: dict, mask: Tensor | None) -> Tensor:
    """RAD-TTS."""
    return module.affine_param_predictor(torch.cat([x, given["context"]], 1), seq_lens=given["seq_lens"])


NETWORKS: dict[str, Callable] = {
    "child": _child,
    "start_wn_end": _start_wn_end,
    "pre_enc_post": _pre_enc_post,
    "wavenet": _wavenet,
    "simple_conv": _simple_conv,
}
CHILDREN = ("net", "nn", "coupling_net", "NN", "network", "f", "st_net")

LAYOUTS = ("shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved")
ORDERS = ("scale_first", "shift_first")


def _sigmoid(offset: float, eps: float = 0.0) -> ScaleMap:
    return ScaleMap("sigmoid", offset=offset, eps=eps)


# With a learned factor for each channel, and without.
LEARNED = (ScaleMap.realnvp(), ScaleMap.exp())
MAPS = (
    _sigmoid(2.0), ScaleMap.exp(), ScaleMap("tanh", prescale=0.5, clamp=2.0), ScaleMap.realnvp(), _sigmoid(2.0, 1e-3),
    _sigmoid(2.0, 1e-4), _sigmoid(2.0, 1e-6), ScaleMap("sigmoid", gain=2.0), _sigmoid(0.0), ScaleMap.realnvp(2.0),
    ScaleMap("sigmoid", prescale=2.0, gain=2.0, eps=1e-6), _sigmoid(10.0, 1e-6), ScaleMap("exp", gain=0.0),
    ScaleMap("exp", clamp=15.0), ScaleMap("exp", clamp=5.0), ScaleMap.freia(2.0), ScaleMap.nflows_softplus(),
    ScaleMap("softplus"), ScaleMap("softplus", eps=1e-3), ScaleMap("tanh", gain=2.0, clamp=0.5, prescale=0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Coupling(Core):
    """``x s + t`` or ``(x + t) s`` on the half that does not pass through. ``masking``: ``"before"`` (VITS: the data is
    masked, and so are the params), ``"after"`` (Glow-TTS: the result is) or ``"none"``; masks are of zeros and ones."""

    factors: ClassVar[tuple[str, ...]] = ("batch", "elements")

    network: str
    source: str
    channels: int
    kept: int
    first: bool
    layout: str = "shift_scale"
    order: str = "scale_first"
    map: ScaleMap = ScaleMap.additive()  # noqa: RUF009
    gain: str | None = None
    flipped: bool = False
    masking: str = "none"

    def fits(self, x):
        return x.dim() > 1 and x.shape[1] == self.channels

    def apply(self, module, x, undo, mask, given, wanted):
        moved = self.channels - self.kept
        half = 0 if self.first else moved, self.kept
        whole = self.masking == "none" or mask is None
        x, same = shared(x, *half) if whole else (x, x.narrow(1, *half))
        params, layout = NETWORKS[self.network](self, module, same, given, mask), self.layout
        if params.dim() > x.dim():
            params, layout = _flat(params, layout)
        inverse = undo != self.flipped
        if whole:
            y, logdet = self._couple(module, x, params, layout, inverse, "first" if self.first else "second", None)
        else:
            changed = x.narrow(1, self.kept if self.first else 0, moved)
            changed, logdet = self._masked(module, changed, params, layout, inverse, mask)
            y = torch.cat([same, changed] if self.first else [changed, same], 1)
        if wanted == "elements":
            logdet = self._elements(params, x, inverse)
        return y, logdet

    def _couple(self, module, x, params, layout, inverse, identity, mask):
        gain = None if self.gain is None else getattr(module, self.gain).view(-1).to(compute_dtype(x))
        return affine_coupling(
            x, params, scale_map=self.map, layout=layout, order=self.order, identity=identity, inverse=inverse,
            mask=mask, gain=gain,
        )  # fmt: skip

    def _masked(self, module, x, params, layout, inverse, mask):
        if self.masking == "after":
            y, logdet = self._couple(module, x, params, layout, inverse, "none", mask != 0)
            return y * mask, logdet
        if self.map.kind == "additive":
            y = (x - params) * mask if inverse else torch.addcmul(params, x, mask)
            return y, y.new_zeros(x.shape[0], dtype=compute_dtype(x))
        if inverse:
            y, logdet = self._couple(module, x, params, layout, True, "none", None)
            return y * mask, logdet
        return self._couple(module, x * mask, params, layout, False, "none", None)

    def _elements(self, params: Tensor, x: Tensor, inverse: bool) -> Tensor:
        if not self.layout.startswith("scale_shift") or self.layout.endswith("interleaved"):
            raise NotImplementedError(self.layout)
        raw = params.narrow(1, 0, params.shape[1] // 2).to(compute_dtype(x))
        log_s = log_scale(self.map, raw)
        return -log_s if inverse else log_s


def _flat(params: Tensor, layout: str) -> tuple[Tensor, str]:
    """SurVAE's ``[B, C, *spatial, 2]``, a view of what its network returned: back to that, whichever it was."""
    if layout.endswith("interleaved"):
        raise NotImplementedError(layout)
    if params.stride(-1) < params.stride(1):
        return params.movedim(-1, 2).flatten(1, 2), f"{layout}_interleaved"
    return params.movedim(-1, 1).flatten(1, 2), layout


@dataclass(frozen=True)
class Structure:
    """A coupling's submodules: which they are, what calls them, and which gives the params."""

    children: frozenset[str]
    network: str
    last: str
    masking: str = "none"


STRUCTURES = (
    *(Structure(frozenset({n}), "child", n) for n in CHILDREN),
    Structure(frozenset({"start", "wn", "end"}), "start_wn_end", "end", "after"),
    Structure(frozenset({"pre", "enc", "post"}), "pre_enc_post", "post", "before"),
    Structure(frozenset({"affine_param_predictor"}), "affine", "affine_param_predictor"),
)


@register()
class Couplings(Family):
    """rosinality, chrischute, SurVAE, FInCFlow, Glow-TTS' CouplingBlock, VITS' ResidualCouplingLayer, RAD-TTS' and
    NeMo's AffineTransformationLayer, and who writes alike."""

    unknown = "looks like a coupling by its submodules, but computes no known form of one"

    def looks_like(self, module):
        found = self._structure(module)
        if found is None or any(b is not None for b in module._buffers.values()):
            return False
        own = [p for p in module._parameters.values() if p is not None]
        net = module._modules[found.last]
        return len(own) <= 1 and not isinstance(net, (nn.ModuleList, nn.ModuleDict))

    def _structure(self, module: nn.Module) -> Structure | None:
        children = frozenset(n for n, m in module._modules.items() if m is not None)
        return next((s for s in STRUCTURES if s.children == children), None)

    def conditioners(self, module):
        return [module._modules[self._structure(module).last]]

    def cores(self, module, seen):
        found = self._structure(module)
        network = found.network
        if network == "affine":
            network = str(vars(module).get("affine_model"))
        halves = _halves(seen[0])
        if network not in NETWORKS or halves is None:
            return
        first, kept, channels = halves
        gains = [n for n, p in module._parameters.items() if p is not None]
        gain = next((n for n in gains if module._parameters[n].numel() == channels - kept), None)
        if gains and gain is None:
            return
        masked = any(s.mask is not None for s in seen)
        for masking in dict.fromkeys((found.masking, "after", "before", "none")) if masked else (found.masking,):
            start = Coupling(network, found.last, channels, kept, first, gain=gain, masking=masking)
            yield from _formulas(start)


def _formulas(start: Coupling) -> Iterator[Coupling]:
    base = (start.network, start.source, start.channels, start.kept, start.first)
    for flipped in (False, True):
        for m in MAPS if start.gain is None else LEARNED:
            for layout, order in itertools.product(LAYOUTS, ORDERS):
                yield Coupling(*base, layout, order, m, start.gain, flipped, start.masking)
        if start.gain is None:
            yield Coupling(*base, flipped=flipped, masking=start.masking)


def _halves(seen: Seen) -> tuple[bool, int, int] | None:
    """Whether the leading channels pass through, how many, and of how many: None unless they are one run."""
    if seen.x.dim() < 2 or seen.x.shape != seen.y.shape:
        return None
    same = (seen.x == seen.y).transpose(0, 1).flatten(1).all(1).tolist()
    kept, channels = sum(same), len(same)
    if not 0 < kept < channels or same not in ([True] * kept + [False] * (channels - kept),
                                               [False] * (channels - kept) + [True] * kept):  # fmt: skip
        return None
    return same[0], kept, channels
