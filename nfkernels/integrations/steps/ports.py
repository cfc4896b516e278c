"""Steps of Glow ports that are known by their structure: ``actnorm``, ``invconv`` and ``coupling`` in one module."""

from __future__ import annotations

import torch
from torch import nn

from ...nn.fold import Scaling
from ...ops import ScaleMap
from .chain import shape
from .parts import AffineCoupling, Elementwise, Mix, dense, ends_of, lu


def _tensors(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


@shape
def scaled_after_shift(module: nn.Module) -> Elementwise | None:
    """``scale (x + loc)``, the scale raw; a flag ``initialized``."""
    if _tensors(module) != {"loc", "scale", "initialized"} or module._modules:
        return None
    size = tuple(module.loc.shape)
    if module.scale.shape != module.loc.shape or len(size) != 4 or size[0] != 1 or size[2:] != (1, 1):
        return None
    return Elementwise(size[1], ("loc", "scale"), _raw_scale, "initialized")


def _raw_scale(loc: torch.Tensor, scale: torch.Tensor):
    loc, scale = loc.flatten(1), scale.flatten(1)
    return Scaling(scale, scale * loc, 1 / scale), torch.log(scale.abs())


@shape
def whole_matrix(module: nn.Module) -> Mix | None:
    """A weight ``(C, C, 1, 1)`` and nothing else."""
    if _tensors(module) != {"weight"} or module._modules or module.weight.dim() != 4:
        return None
    size = tuple(module.weight.shape)
    return Mix(size[0], ("weight",), _flat) if size == (size[0], size[0], 1, 1) else None


def _flat(weight: bool, inverse: bool, matrices: torch.Tensor):
    return dense(weight, inverse, matrices[..., 0, 0])


@shape
def lu_factors(module: nn.Module) -> Mix | None:
    """``w_p (w_l strict + I) (w_u strict + diag(s_sign e^w_s))``."""
    names = {"w_p", "u_mask", "l_mask", "s_sign", "l_eye", "w_l", "w_s", "w_u"}
    if _tensors(module) != names or module._modules or module.w_s.dim() != 1:
        return None
    return Mix(module.w_s.shape[0], ("w_l", "w_u", "w_s", "s_sign", "w_p"), lu)


@shape
def shifted_then_scaled(module: nn.Module) -> AffineCoupling | None:
    """``(x_b + t) sigmoid(s + 2)`` of ``s, t = net(x_a)``, or ``x_b + net(x_a)``; an ``affine`` flag and a ``net``."""
    if _tensors(module) or set(module._modules) != {"net"} or not isinstance(getattr(module, "affine", None), bool):
        return None
    sizes = ends_of(module.net)
    if sizes is None:
        return None
    kept, moved = sizes[0], sizes[1] // (2 if module.affine else 1)
    return AffineCoupling(
        kept + moved, kept, ScaleMap.glow() if module.affine else ScaleMap.additive(), "shift_first", "scale_shift",
        "first", ("net",),
    )  # fmt: skip
