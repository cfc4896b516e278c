"""FrEIA's layers."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn

from . import Case

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its docstrings' escapes
    import FrEIA.modules as Fm
    from FrEIA.framework import SequenceINN


def _linear(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inside, 8), nn.Tanh(), nn.Linear(8, outside))


def _conv(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, outside, 1))


def _conv1(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(inside, 6, 1), nn.Tanh(), nn.Conv1d(6, outside, 1))


def _conv3(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(inside, 6, 1), nn.Tanh(), nn.Conv3d(6, outside, 1))


_NETS = {0: _linear, 1: _conv1, 2: _conv, 3: _conv3}


def _call(module, x, *c):
    out = module((x,), list(c)) if c else module((x,))
    if getattr(module, "householder", 0):  # the original keeps the matrix and its graph, with which nothing is copied
        module.w_perm = module.w_perm_inv = None
    return out


def _back(module, out, x, *c):
    found = module(out[0], list(c), rev=True) if c else module(out[0], rev=True)
    if getattr(module, "householder", 0):
        module.w_perm = module.w_perm_inv = None
    return found


def _made(cls, dims, *, condition=0, **options):
    def make():
        np.random.seed(0)
        given = {"dims_c": [(condition, *dims[1:])]} if condition else {}
        return cls([dims], **given, **options)

    return make


def _case(name, cls, dims, *, condition=0, net=True, batch=5, **options):
    if net:
        options["subnet_constructor"] = _NETS[len(dims) - 1]
    skip = options.pop("skip", {})

    def inputs():
        x = torch.randn(batch, *dims)
        return (x, torch.randn(batch, condition, *dims[1:])) if condition else (x,)

    return Case(
        f"FrEIA.{name}", _made(cls, dims, condition=condition, **options), inputs, _call, _back, skip=skip
    )  # fmt: skip


_BLOCK = Fm.AllInOneBlock
_COUPLINGS = [
    ("GLOWCouplingBlock", Fm.GLOWCouplingBlock),
    ("RNVPCouplingBlock", Fm.RNVPCouplingBlock),
    ("AffineCouplingOneSided", Fm.AffineCouplingOneSided),
]

CASES = [
    _case("AllInOneBlock table", _BLOCK, (5,)),
    _case("AllInOneBlock table soft conditional", _BLOCK, (6,), permute_soft=True, condition=3),
    _case("AllInOneBlock sequence sigmoid", _BLOCK, (4, 7), global_affine_type="SIGMOID", global_affine_init=0.8),
    _case("AllInOneBlock image", _BLOCK, (5, 4, 3)),
    _case("AllInOneBlock image exp conditional", _BLOCK, (4, 3, 4), global_affine_type="EXP", condition=2),
    _case("AllInOneBlock image soft", _BLOCK, (6, 3, 4), permute_soft=True, affine_clamping=0.7),
    _case("AllInOneBlock image soft wide", _BLOCK, (34, 2, 2), permute_soft=True, reverse_permutation=True),
    _case("AllInOneBlock image reverse", _BLOCK, (4, 4, 3), reverse_permutation=True),
    _case("AllInOneBlock volume", _BLOCK, (4, 2, 3, 2), affine_clamping=3),
    _case("AllInOneBlock GIN", _BLOCK, (5, 4, 3), gin_block=True),
    _case("AllInOneBlock GIN soft", _BLOCK, (4, 3, 3), gin_block=True, permute_soft=True),
    _case("AllInOneBlock householder", _BLOCK, (5, 3, 3), learned_householder_permutation=3, reverse_permutation=True),
    _case("AllInOneBlock table householder", _BLOCK, (4,), learned_householder_permutation=2),
    *(_case(name, cls, (5,)) for name, cls in _COUPLINGS),
    *(_case(f"{name} image tanh", cls, (5, 3, 4), clamp_activation="TANH", split_len=2) for name, cls in _COUPLINGS),
    *(
        _case(f"{name} conditional sigmoid", cls, (4, 3, 4), clamp_activation="SIGMOID", condition=2, clamp=1.3)
        for name, cls in _COUPLINGS
    ),
    _case("ConditionalAffineTransform", Fm.ConditionalAffineTransform, (4, 3, 3), condition=3),
    _case("ActNorm", Fm.ActNorm, (5,), net=False, batch=9),
    _case("ActNorm image", Fm.ActNorm, (3, 4, 2), net=False),
    _case("PermuteRandom", Fm.PermuteRandom, (5,), net=False, seed=1),
    _case("PermuteRandom image", Fm.PermuteRandom, (6, 3, 2), net=False, seed=1),
    _case("Fixed1x1Conv", Fm.Fixed1x1Conv, (3, 4, 2), net=False, M=torch.eye(3) + 0.3 * torch.ones(3, 3).triu(1)),
    _case("IRevNetDownsampling", Fm.IRevNetDownsampling, (3, 4, 6), net=False),
    _case("IRevNetUpsampling", Fm.IRevNetUpsampling, (8, 2, 3), net=False),
]


def _sequence():
    np.random.seed(0)
    flow = SequenceINN(4, 4, 4)
    for k in range(4):
        flow.append(_BLOCK, subnet_constructor=_conv, permute_soft=k % 2 == 1)
    return flow


CASES.append(
    Case(
        "FrEIA.SequenceINN",
        _sequence,
        lambda: (torch.randn(3, 4, 4, 4),),
        inverse=lambda m, out, x: m(out[0], rev=True),
        layers=tuple(f"module_list.{k}" for k in range(4)),
    )
)
