"""normflows' Glow: ``GlowBlock`` is actnorm, 1x1 convolution and coupling, its list from the latent to the data."""

from __future__ import annotations

import torch
from torch import nn

from ...nn.fold import Scaling
from ...ops import ScaleMap
from .chain import chain, part
from .parts import AffineCoupling, Elementwise, Mix, NotUnderstood, dense, ends_of, lu

# The scales of ``inverse``, data to latent, and whether the shift comes first there.
_MAPS = {
    "exp": ScaleMap.exp(),
    "sigmoid": ScaleMap("sigmoid", offset=2.0, reciprocal=True),
    "sigmoid_inv": ScaleMap.glow(),
}


@chain("normflows.flows.affine.glow.GlowBlock")
def glow_block(module: nn.Module):
    return [("flows", str(i)) for i in reversed(range(len(module.flows)))]


@part("normflows.flows.affine.coupling.AffineCouplingBlock")
def coupling_block(module: nn.Module) -> AffineCoupling:
    split, coupling, merge = module.flows
    if split.mode != merge.mode or split.mode not in ("channel", "channel_inv"):
        raise NotUnderstood(f"split_mode={split.mode!r}")
    if coupling.scale and coupling.scale_map not in _MAPS:
        raise NotUnderstood(f"scale_map={coupling.scale_map!r}")
    channels, kept = _channels(module, coupling, split.mode == "channel")
    return AffineCoupling(
        channels, kept, _MAPS[coupling.scale_map] if coupling.scale else ScaleMap.additive(), "scale_first",
        "shift_scale_interleaved", "first" if split.mode == "channel" else "second",
        ("flows", "1", "param_map"), to_data=True,
    )  # fmt: skip


def _channels(module: nn.Module, coupling: nn.Module, first: bool) -> tuple[int, int]:
    """C, and how many pass through; by the network's first and last convolution, or linear layer."""
    sizes = ends_of(coupling.param_map)
    if sizes is None:
        raise NotUnderstood("a conditioner without convolutions")
    kept, moved = sizes[0], sizes[1] // (2 if coupling.scale else 1)
    if kept - moved not in ((0, 1) if first else (0, -1)):
        raise NotUnderstood("a conditioner whose number of channels does not tell how the data is split")
    return kept + moved, kept


@part("normflows.flows.mixing.Invertible1x1Conv")
def mix(module: nn.Module) -> Mix:
    if module.use_lu:
        return Mix(module.num_channels, ("L", "U", "log_S", "sign_S", "P"), lu)
    return Mix(module.num_channels, ("W",), dense)


@part("normflows.flows.normalization.ActNorm")
def actnorm(module: nn.Module) -> Elementwise:
    return _constant(module, "data_dep_init_done")


@part("normflows.flows.affine.coupling.AffineConstFlow")
def _constant(module: nn.Module, flag: str | None = None) -> Elementwise:
    shape = tuple(module.s.shape)
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (1, 1) or module.t.shape != module.s.shape:
        raise NotUnderstood(f"scales of shape {shape}")
    return Elementwise(shape[1], ("s", "t"), _formula, flag)


def _formula(s: torch.Tensor, t: torch.Tensor):
    """``(x - t) e^-s``."""
    s, t = s.flatten(1), t.flatten(1)
    scale = torch.exp(-s)
    return Scaling(scale, -t * scale, torch.exp(s)), -s
