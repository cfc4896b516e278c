"""Inputs for op tests: shapes, memory formats, dtypes and options, drawn reproducibly from their whole product."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nfkernels import ScaleMap
from nfkernels.reference.scale_map import PRESETS

MAPS = [
    *(ScaleMap.parse(name) for name in PRESETS),
    ScaleMap("softplus"),
    ScaleMap("softplus", gain=0.5, offset=0.3, reciprocal=True),
    ScaleMap("sigmoid", gain=2.0, prescale=0.5),
    ScaleMap("exp", clamp=1.0, prescale=0.7, offset=0.1),
    ScaleMap("exp", reciprocal=True),
    ScaleMap.freia_all_in_one(1.5),
    ScaleMap("additive", prescale=-0.3, scaled_shift=True),
    ScaleMap("sigmoid", prescale=-0.7, offset=1.0, eps=1e-3, scaled_shift=True),
]
LAYOUTS = ["shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved"]
ORDERS = ["scale_first", "shift_first"]
IDENTITIES = ["none", "first", "second"]
SHAPES = [
    (3, 5, 7, 11),
    (4, 6, 4, 4),
    (2, 8, 16, 16),
    (70, 5),
    (3, 4, 13),
    (0, 4, 3),
    (2, 4, 0),
    (1, 1, 1, 1),
    (2, 7),
    (1, 2, 160, 130),
]
FORMATS = ["contiguous", "channels_last", "mixed", "sliced"]
# (data, params)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


all_traced = pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=str)


def opcheck(op, args, *, traced: bool = True) -> None:
    """PyTorch's own checks of an op. The slowest traces it with sizes that are not known: by default for some only."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, args, test_utils=checks if traced else checks[:3])


def tensor(batch: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype, fmt: str) -> Tensor:
    """Normal values; ``sliced`` is the middle of a wider tensor whose rest is NaN."""
    if fmt == "sliced":
        wide = torch.full((batch, channels + 3, *spatial), float("nan"), dtype=dtype)
        wide[:, 1 : 1 + channels] = torch.randn(batch, channels, *spatial).to(dtype)
        return wide[:, 1 : 1 + channels]
    x = torch.randn(batch, channels, *spatial).to(dtype)
    if fmt == "channels_last" and len(spatial) == 2:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@dataclass
class CouplingCase:
    x: Tensor
    params: Tensor
    gain: Tensor | None
    logdet: Tensor | None
    options: dict

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.params, self.gain, self.logdet) if t is not None]


def coupling_options(count: int, seed: int = 0) -> list[tuple]:
    """``count`` distinct points of the whole product, every value of every option among them."""
    product = list(
        itertools.product(range(len(MAPS)), LAYOUTS, ORDERS, IDENTITIES, [False, True], SHAPES, FORMATS, DTYPES)
    )
    return random.Random(seed).sample(product, count)


def coupling_case(point: tuple, seed: int = 0) -> CouplingCase:
    which, layout, order, identity, inverse, shape, fmt, (data, raw) = point
    generator = random.Random(repr((point, seed)))
    torch.manual_seed(generator.randrange(2**31))
    scale_map = MAPS[which]
    batch, channels, *spatial = shape
    spatial = tuple(spatial)
    count = channels if identity == "none" else channels // 2
    x = tensor(batch, channels, spatial, data, "contiguous" if fmt == "mixed" else fmt)
    width = count * (2 if scale_map.has_scale else 1)
    params = tensor(batch, width, spatial, raw, "channels_last" if fmt == "mixed" else fmt)
    compute = torch.float64 if data == torch.float64 else torch.float32
    gain = torch.rand(count, dtype=compute) + 0.5 if scale_map.has_scale and generator.random() < 0.3 else None
    logdet = torch.randn(batch, dtype=compute) if generator.random() < 0.5 else None
    mask = channel_map = None
    if generator.random() < 0.3:
        rows = batch if generator.random() < 0.5 else 1
        planes = channels if generator.random() < 0.5 else 1
        mask = torch.rand(rows, planes, *spatial) > 0.4
    if identity == "none" and generator.random() < 0.3:
        channel_map = torch.full((channels,), -1)
        channel_map[torch.randperm(channels)[:count]] = torch.arange(count)
    options = {
        "scale_map": scale_map,
        "layout": layout,
        "order": order,
        "identity": identity,
        "inverse": inverse,
        "mask": mask,
        "channel_map": channel_map,
    }
    return CouplingCase(x, params, gain, logdet, options)
