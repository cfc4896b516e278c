"""Every launcher compiled to machine code for NVIDIA and AMD without a GPU.

Its arguments fit its kernel, nothing spills, and memory moves 16 bytes at a time where the sizes allow it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import zlib

import pytest
import torch

pytest.importorskip("triton.language", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on in this process", allow_module_level=True)

import fake_driver
from fake_driver import TARGETS, compiling_for

from nfkernels import Degrees
from nfkernels.reference.affine_coupling import Form, Identity, Layout, Order
from nfkernels.reference.rational_quadratic_spline import Form as SplineForm
from nfkernels.reference.scale_map import ScaleMap
from nfkernels.reference.spline import PRESETS, Spline
from nfkernels.triton import (
    affine_coupling,
    autoregressive_conv,
    autoregressive_inverse,
    channel_mix,
    coupling_mix,
    dequantize,
    gaussian_log_density,
    lu_compose,
    lu_linear,
    philox_uniform,
    rational_quadratic_spline,
)

NVIDIA = [t for t in TARGETS if t.startswith("sm_")]
# The newest two take as long again and differ in little: when asked for.
ASKED_FOR = ("sm_100", "sm_120")


def on_targets(*size):
    """Every target, with a size of the kernel where one is given."""
    marks = {t: [pytest.mark.exhaustive] if t in ASKED_FOR else [] for t in TARGETS}
    return [pytest.param(t, *size, marks=marks[t]) for t in TARGETS]


TO_COMPILE = on_targets()
GENERATION = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "sm_120": 12, "gfx942": 0}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

MAPS = {
    "additive": ScaleMap.additive(),
    "exp": ScaleMap("exp", clamp=5.0),
    "glow": ScaleMap.glow(),
    "nflows": ScaleMap.nflows(),
    "tanh": ScaleMap.realnvp(),
    "atan": ScaleMap.freia(),
    "softplus": ScaleMap("softplus"),
    "nflows_softplus": ScaleMap.nflows_softplus(),
    "softclip": ScaleMap.zuko(),
}


# ptxas sometimes parks up to three addresses outside the loops to stay at 64, 128 or 168 registers; a spill is more.
MOST_STACK = 24


def compiled(target, call):
    """The kernels that a call launches on ``target``; none may spill."""
    with compiling_for(target) as driver:
        call()
    assert driver.launched
    for binary in driver.launched:
        if target not in NVIDIA:
            scratch = fake_driver.amd_scratch(binary)
            assert scratch["vgpr_spill_count"] == 0, f"{target} {binary.name}: {scratch}"
        else:
            stack, registers = fake_driver.resources(binary)
            assert stack <= MOST_STACK, f"{target} {binary.name}: {stack} bytes of stack, {registers} registers"
    return driver.launched


def coupling(target, shape, *, m="glow", count=None, layout="shift_scale", order="scale_first", identity="none",
             inverse=False, dtype=F32, params_dtype=None, last=(False, False), mask=None, channel_map=None,
             gain=False, running=False, rebuild=False):  # fmt: skip
    scale_map = MAPS[m]
    count = shape[1] if count is None else count
    x = torch.zeros(shape, dtype=dtype)
    params = torch.zeros(shape[0], count * (2 if scale_map.has_scale else 1), *shape[2:], dtype=params_dtype or dtype)
    x, params = (
        t.contiguous(memory_format=torch.channels_last) if is_last else t
        for t, is_last in zip((x, params), last, strict=True)
    )
    form = Form(scale_map, Layout[layout], Order[order], Identity[identity], inverse).pack()
    compute = F64 if dtype == F64 else F32
    gain = torch.ones(count, dtype=compute) if gain else None
    logdet = torch.zeros(shape[0], dtype=compute)
    binaries = compiled(
        target,
        lambda: affine_coupling.forward(x, params, channel_map, mask, gain, logdet if running else None, *form),
    )
    return binaries + compiled(
        target, lambda: affine_coupling.backward(x, params, x, logdet, channel_map, mask, gain, *form, rebuild)
    )


def wide(binaries, *names, target="sm_90"):
    """Loads and stores by width, of the kernels of these names (of all), each the first of its name."""
    chosen = {b.name: b for b in reversed(binaries)}
    return fake_driver.accesses(target, [chosen[name] for name in names] if names else binaries)


# --- the affine coupling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", ["glow", "exp", "softplus"])
def test_backward_that_rebuilds_the_input(m):
    for shape, order in [((64, 48), "shift_first"), ((8, 12, 16, 16), "scale_first")]:
        coupling("sm_90", shape, m=m, count=shape[1] // 2, identity="first", order=order, rebuild=True)


@pytest.mark.parametrize("m", MAPS)
def test_scale_maps(m):
    coupling("sm_90", (64, 48), m=m, count=24, identity="first", gain=m not in ("additive", "glow"), running=True)


@pytest.mark.parametrize("target", TO_COMPILE)
def test_targets(target):
    coupling(
        target, (8, 12, 16, 16), m="tanh", count=6, identity="first", params_dtype=BF16, last=(False, True), gain=True
    )


ALIGNED = {
    "images": {"shape": (8, 12, 16, 16), "count": 6, "identity": "first"},
    "split samples": {"shape": (2, 12, 64, 64), "count": 6, "identity": "first"},
    "channels last": {"shape": (8, 64, 8, 16), "last": (True, True)},
    "rows": {"shape": (64, 64)},
    "samples of one tile": {"shape": (64, 8, 4, 4), "count": 4, "identity": "second"},
}


@pytest.mark.parametrize("name", ALIGNED)
def test_wide_memory_accesses(name):
    """16-byte loads and stores alone, but for one log-determinant out and its gradient in."""
    binaries = coupling("sm_90", **ALIGNED[name])
    for counts, loads, stores in zip(wide(binaries, "forward_kernel", "backward_kernel"), (0, 2), (1, 0)):
        narrow = {k: n for k, n in counts.items() if not k.endswith(".128")}
        assert counts["LDG.128"] > 0, counts
        assert counts["STG.128"] > 0, counts
        assert sum(n for k, n in narrow.items() if k.startswith("LDG")) <= loads, counts
        assert sum(n for k, n in narrow.items() if k.startswith("STG")) <= stores, counts


def test_mixed_layouts_still_move_the_data_wide():
    """bf16 channels-last params with contiguous fp32 data: x, y, dy and dx go by 16 bytes."""
    binaries = coupling("sm_90", (8, 32, 16, 32), count=16, identity="first", params_dtype=BF16, last=(False, True))
    for counts in wide(binaries, "forward_kernel", "backward_kernel"):
        assert counts["LDG.128"] > 0, counts
        assert counts["STG.128"] > 0, counts
        assert counts.get("STG.32", 0) <= 1, counts


def test_every_option_fits_its_kernel():
    """Masks, channel maps, sizes that nothing divides, one position, one channel, several dtypes."""
    checkerboard = torch.ones(1, 1, 7, 9, dtype=torch.bool)
    coupling("sm_90", (3, 20, 7, 9), mask=checkerboard, gain=True, inverse=True, m="nflows", dtype=F64)
    coupling(
        "sm_90", (3, 4, 5), count=2, channel_map=torch.tensor([0, -1, 1, -1]), order="shift_first", gain=True, m="exp"
    )
    coupling("sm_90", (1, 1), m="softplus", layout="scale_shift_interleaved", dtype=BF16)
    coupling("sm_90", (1, 70000), running=True, inverse=True, m="atan")


def test_64_bit_offsets():
    """A stride so large that offsets inside one sample need 64 bits; its memory is never touched."""
    x = torch.empty(2**30 + 1024, dtype=BF16).as_strided((1, 2, 1024), (0, 2**30, 1))
    params = torch.zeros(1, 4, 1024)
    assert affine_coupling.tiles.is_wide(params, x)
    assert not affine_coupling.tiles.is_wide(params)
    form = Form(ScaleMap.glow()).pack()
    compiled("sm_90", lambda: affine_coupling.forward(x, params, None, None, None, None, *form))
    compiled("sm_90", lambda: affine_coupling.backward(x, params, x, None, None, None, None, *form, False))
    compiled("sm_90", lambda: channel_mix.forward(x, torch.eye(2), None))


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("m", MAPS)
@pytest.mark.parametrize("shape", [(64, 63), (8, 12, 16, 16), (2, 14, 33, 37)], ids=str)
def test_everything(target, m, shape):
    """All scale maps on all targets; which other options ride along depends on the case."""
    bits = zlib.crc32(repr((target, m, shape)).encode())
    choices = list(itertools.product(Layout, Order, ("first", "second"), (False, True)))
    layout, order, identity, inverse = choices[bits % len(choices)]
    dtype, params_dtype = [(F32, F32), (F32, BF16), (F64, F32), (BF16, BF16)][bits // 64 % 4]
    last = (False, False) if len(shape) == 2 else (bool(bits >> 9 & 1), bool(bits >> 10 & 1))
    coupling(
        target, shape, m=m, count=shape[1] // 2, identity=identity,
        layout=layout.name, order=order.name, inverse=inverse,
        dtype=dtype, params_dtype=params_dtype, last=last, gain=m != "additive", running=bool(bits >> 11 & 1),
    )  # fmt: skip


# --- the channel mix -------------------------------------------------------------------------------------------------


def mix(target, monkeypatch, shape, *, dtype=F32, last=False):
    monkeypatch.setattr(channel_mix, "generation_of", lambda x: GENERATION[target])
    x = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    compute = F64 if dtype == F64 else F32
    weight = torch.zeros(shape[1], shape[1], dtype=compute)
    binaries = compiled(target, lambda: channel_mix.forward(x, weight, weight[0]))
    return binaries + compiled(target, lambda: channel_mix.backward(x, weight, x, None, None, True, True, True))


@pytest.mark.parametrize(("target", "channels"), [*on_targets(48), ("sm_90", 12), ("sm_90", 24), ("sm_90", 200)])
def test_channel_mix(target, channels, monkeypatch):
    """No spills, shared memory within the limit everywhere, 16-byte loads and stores."""
    binaries = mix(target, monkeypatch, (4, channels, 16, 16))
    for binary, counts in zip(binaries, wide(binaries, target=target) if target in NVIDIA else ()):
        if not (channels == 200 and binary.name == "backward_kernel"):  # that one writes dW alone
            assert counts.get("LDG.128", 0) + counts.get("LDGSTS.128", 0) > 0, counts
            assert counts["STG.128"] > 0, counts


def test_precision_of_dots():
    """3xTF32 where there are tensor cores and 32 channels, else IEEE; plain TF32 nowhere."""
    for channels, dtype, generation, precision in (
        (24, F32, 9, "ieee"), (64, F32, 9, "tf32x3"), (64, F32, 7, "ieee"), (64, F32, 0, "ieee"), (64, F64, 9, "ieee"),
    ):  # fmt: skip
        assert channel_mix.plan(channels, dtype, generation).precision == precision


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 17, 32, 63, 64, 65, 96, 128, 144, 192])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_channel_mix_everything(target, channels, dtype, monkeypatch):
    mix(target, monkeypatch, (4, channels, 16, 16), dtype=dtype)
    mix(target, monkeypatch, (3, channels, 7, 7), dtype=dtype, last=True)


# --- the Gaussian log-density ----------------------------------------------------------------------------------------


def density(target, shape, *, learned=True, layout=0, dtype=F32, params_dtype=None, last=(False, False)):
    x = torch.zeros(shape, dtype=dtype)
    params = torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=params_dtype or dtype)
    x, params = (
        t.contiguous(memory_format=torch.channels_last) if is_last else t
        for t, is_last in zip((x, params), last, strict=True)
    )
    params = params if learned else None
    total = torch.zeros(shape[0], dtype=F64 if dtype == F64 else F32)
    binaries = compiled(target, lambda: gaussian_log_density.forward(x, params, total, layout))
    return binaries + compiled(target, lambda: gaussian_log_density.backward(x, params, total, layout, True, learned))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", TO_COMPILE)
def test_gaussian_log_density(target, learned):
    density(target, (8, 12, 16, 16), learned=learned, params_dtype=BF16, last=(False, True))


DENSITIES = {
    "images": {"shape": (8, 12, 16, 16)},
    "split samples": {"shape": (2, 12, 64, 64)},
    "channels last": {"shape": (8, 64, 8, 16), "last": (True, True)},
    "flat": {"shape": (64, 3072)},
    "rows": {"shape": (64, 64)},
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", DENSITIES)
def test_gaussian_log_density_moves_16_bytes_at_a_time(name, learned):
    """But for what there is one of for each sample: the totals in and out, and the gradient."""
    binaries = density("sm_90", **DENSITIES[name], learned=learned)
    forward, backward = wide(binaries, "forward_kernel", "backward_kernel")
    for counts, wide_stores, loads, stores in ((forward, 0, 2, 1), (backward, 1, 2, 0)):
        assert counts["LDG.128"] > 0, counts
        assert counts.get("STG.128", 0) >= wide_stores, counts
        narrow = {k: n for k, n in counts.items() if not k.endswith(".128")}
        assert sum(n for k, n in narrow.items() if k.startswith("LDG")) <= loads, counts
        assert sum(n for k, n in narrow.items() if k.startswith("STG")) <= stores, counts


def test_every_form_of_gaussian_log_density_fits_its_kernel():
    for layout, (dtype, params_dtype) in enumerate([(F64, BF16), (BF16, BF16), (F32, F32), (F64, F64)]):
        density("sm_90", (3, 7, 5, 9), layout=layout, dtype=dtype, params_dtype=params_dtype)
        density("sm_90", (3, 1), layout=layout, dtype=dtype, params_dtype=params_dtype)
    density("sm_90", (1, 70001))


# --- dequantisation and the generator --------------------------------------------------------------------------------

KEY = torch.tensor([1, 2])


def dequantized(target, shape, *, alpha=0.05, dtype=F32, out=0, last=False, running=False):
    x = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = torch.empty_like(x, dtype=[F32, F64, BF16][out])
    logdet = torch.zeros(shape[0], dtype=F64 if out == 1 else F32)
    forward = compiled(target, lambda: dequantize.forward(x, KEY, logdet if running else None, 256.0, alpha, out))
    return forward + compiled(target, lambda: dequantize.backward(y, y, logdet, 256.0, alpha))


@pytest.mark.parametrize("target", TO_COMPILE)
def test_dequantize(target):
    for alpha in (-1.0, 0.05):
        dequantized(target, (64, 3, 32, 32), dtype=torch.uint8, alpha=alpha, running=True)
        dequantized(target, (64, 3, 7, 9), dtype=torch.uint8, alpha=alpha, out=2)
        dequantized(target, (2, 63), dtype=F64, alpha=alpha, out=1)
        dequantized(target, (8, 48, 16, 16), dtype=BF16, alpha=alpha, out=2, last=True)
    for dtype in (F32, F64):
        for like in (torch.zeros(4, 1000, dtype=dtype), torch.zeros(9, 7, 5, dtype=dtype).transpose(1, 2)):
            compiled(target, lambda like=like: philox_uniform.forward(like, KEY))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (64, 64), (2, 1, 512, 512)], ids=str)
def test_dequantize_moves_memory_wide(shape):
    """Eight bytes of images at once (a thread's elements), 16 of everything floating."""
    for alpha in (-1.0, 0.05):
        binaries = dequantized("sm_90", shape, dtype=torch.uint8, alpha=alpha)
        forward, backward = wide(binaries, "forward_kernel", "backward_kernel")
        assert forward.get("LDG.8", 0) == 0, forward  # the two LDG.64 more are the key
        assert forward["LDG.64"] == 3, forward
        assert forward["STG.128"] > 0, forward
        assert forward.get("STG.32", 0) == (alpha > 0), forward
        assert backward["LDG.128"] > 0, backward
        assert backward["STG.128"] > 0, backward
        assert backward.get("STG.32", 0) == 0, backward
    (counts,) = wide(compiled("sm_90", lambda: philox_uniform.forward(torch.zeros(shape), KEY)))
    assert counts.keys() == {"LDG.64", "STG.128"}


# --- the coupling mix ------------------------------------------------------------------------------------------------


def coupled_mix(target, monkeypatch, shape, *, m="glow", order="scale_first", identity="first", dtype=F32,
                params_dtype=None, last=(False, False), everything=False):  # fmt: skip
    """Forward and backward; ``everything`` adds all that is optional, the rebuilt input among it."""
    monkeypatch.setattr(coupling_mix, "generation_of", lambda x: GENERATION[target])
    batch, channels, *spatial = shape
    x, weight = torch.zeros(shape, dtype=dtype), torch.zeros(channels, channels, dtype=F64 if dtype == F64 else F32)
    count = channels // 2
    params = torch.zeros(batch, count * (2 if MAPS[m].has_scale else 1), *spatial, dtype=params_dtype or dtype)
    part = torch.zeros(batch, *spatial, max(count, 1), dtype=BF16).movedim(-1, 1)
    x, params = (
        t.movedim(1, -1).contiguous().movedim(-1, 1) if is_last else t
        for t, is_last in zip((x, params), last, strict=True)
    )
    form = Form(MAPS[m], order=Order[order], identity=Identity[identity]).pack()
    logdet = weight.new_zeros(batch)
    gain = weight.new_ones(count) if everything and MAPS[m].has_scale else None
    extra = (0, part.shape[1] if everything else 0, 2, True)
    binaries = compiled(target, lambda: coupling_mix.forward(x, params, weight, weight[0], gain, logdet, *form, *extra))
    args = (x, params, weight, weight, weight[0], x, logdet, part if everything else None, gain, *form, 0)
    return binaries + compiled(target, lambda: coupling_mix.backward(*args, True, True, everything))


@pytest.mark.parametrize(("target", "channels"), [*on_targets(48), *(("sm_90", c) for c in (4, 12, 24, 32, 64))])
def test_coupling_mix(target, channels, monkeypatch):
    """Whether little or everything is asked for: no spills, and 16-byte loads and stores in wide tiles."""
    moved_wide = ["forward_kernel"] * (channels <= 8) + ["forward_kernel", "backward_kernel"] * (channels > 16)
    binaries = [b for b in coupled_mix(target, monkeypatch, (4, channels, 16, 16)) if b.name in moved_wide]
    if target in NVIDIA and binaries:
        for counts in wide(binaries, target=target):
            assert counts["LDG.128"] > 0, counts
            assert counts["STG.128"] > 0, counts
    coupled_mix(
        target, monkeypatch, (4, channels, 16, 16), m="nflows_softplus", params_dtype=BF16, last=(False, True),
        everything=True,
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 17, 24, 32, 33, 48, 63, 64])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_coupling_mix_everything(target, channels, dtype, monkeypatch):
    """Which map, order and shape ride along depends on the case."""
    bits = zlib.crc32(repr((target, channels, dtype)).encode())
    m, order = list(MAPS)[bits % len(MAPS)], ("scale_first", "shift_first")[bits >> 8 & 1]
    everything = {"m": m, "order": order, "params_dtype": BF16, "everything": True}
    coupled_mix(target, monkeypatch, (4, channels, 16, 16), m=m, order=order, dtype=dtype)
    coupled_mix(target, monkeypatch, (4, channels, 16, 16), dtype=dtype, last=(False, True), **everything)
    coupled_mix(
        target, monkeypatch, (30, channels, 7, 7), dtype=dtype, last=(True, True), identity="second", **everything
    )
    coupled_mix(target, monkeypatch, (300, channels), dtype=dtype, **everything)


# --- the autoregressive convolution ----------------------------------------------------------------------------------


def convolved(target, shape, *, size=3, raster=False, dtype=F32, last=False):
    """Forward and inverse, with a bias."""
    x = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    form = autoregressive_conv.Form(size, size, raster, raster)
    weight = torch.zeros(len(form.offsets()), shape[1], shape[1], dtype=F64 if dtype == F64 else F32)
    forward = compiled(target, lambda: autoregressive_conv.forward(x, weight, weight[0, 0], *form, False))
    return forward + compiled(target, lambda: autoregressive_conv.forward(x, weight, weight[0, 0], *form, True))


@pytest.mark.parametrize("target", TO_COMPILE)
def test_autoregressive_conv(target):
    """The inverse waits once to a wavefront, and reads nothing through the cache that writes do not reach."""
    solves = [
        convolved(target, shape, raster=raster, dtype=dtype, last=raster)[1]
        for raster, dtype, shape in (
            (False, F32, (8, 12, 32, 32)),
            (True, BF16, (3, 48, 7, 9)),
            (True, F64, (2, 5, 1, 40)),
        )
    ]
    if target in NVIDIA:
        for code in fake_driver.disassembly(target, solves):
            assert "BAR.SYNC" in code
            assert "LDG.E.CONSTANT" not in code
            assert ".NC" not in code


# --- the inverse of a masked autoregressive layer --------------------------------------------------------------------


def undone(target, batch, features, widths, *, m="exp", activation=0, dtype=F32, everything=False):
    """``everything`` adds contexts, layers added to later ones, and no biases."""
    layers = [tuple(range(features)) for _ in widths]
    degrees = Degrees(range(features), [tuple(sorted(d[i % features] for i in range(w)))
                                        for d, w in zip(layers, widths, strict=True)])  # fmt: skip
    z = torch.zeros(batch, features, dtype=dtype)
    per = 2 if MAPS[m].has_scale else 1
    weights = [z.new_zeros(mask.shape) for mask in degrees.masks(per)]
    biases = [None if everything else w[:, 0] for w in weights]
    contexts = [z.new_zeros(batch, w) if everything else None for w in widths]
    residual = [i - 2 if everything and i % 2 == 0 and i else -1 for i in range(len(widths))]
    form, *constants = Form(MAPS[m], Layout.scale_shift_interleaved, Order.scale_first, Identity.none, True).pack()
    given = (z, weights, biases, contexts, degrees.table(z), degrees.passes, activation, residual, not everything)
    return compiled(target, lambda: autoregressive_inverse.forward(*given, [0, form], constants))


@pytest.mark.parametrize("target", TO_COMPILE)
def test_autoregressive_inverse(target):
    """It waits after every layer, and reads nothing through the cache that writes do not reach."""
    binaries = []
    for batch, features, widths, options in (
        (512, 20, (64, 64), {}),
        (3, 2, (128, 128, 128), {"m": "nflows", "activation": 4, "dtype": F64, "everything": True}),
        (65536, 6, (64,), {"m": "glow", "activation": 2}),
    ):
        binaries += undone(target, batch, features, widths, **options)
    assert len(binaries) == 3
    if target in NVIDIA:
        for code in fake_driver.disassembly(target, binaries):
            assert "BAR.SYNC" in code
            assert "LDG.E.CONSTANT" not in code
            assert ".NC" not in code


def test_every_form_of_autoregressive_inverse_fits_its_kernel():
    for activation, m in enumerate(("additive", "glow", "tanh", "softplus", "softclip")):
        undone("sm_90", 100, 3, (7, 5, 5), m=m, activation=activation, everything=True)


# --- the LU composition ----------------------------------------------------------------------------------------------


def composed(target, count, channels, *, dtype=F32, softplus=False, permuted=True, need=(True, True)):
    lower, log_s = torch.zeros(count, channels, channels, dtype=dtype), torch.zeros(count, channels, dtype=dtype)
    sign = None if softplus else log_s
    permutation = torch.zeros(count, channels, dtype=torch.int64) if permuted else None
    given, kind = (lower, lower, log_s, sign, permutation), (int(softplus), 1e-3)
    forward = compiled(target, lambda: lu_compose.forward(*given, *kind, *need))
    grads = (lower if need[1] else None, lower if need[0] else None, lower if need[1] else None, log_s.sum())
    return forward + compiled(target, lambda: lu_compose.backward(*given, *grads, *kind))


@pytest.mark.parametrize("target", TO_COMPILE)
def test_lu_compose(target):
    composed(target, 32, 48)
    composed(target, 1, 128, dtype=F64, softplus=True)


def test_every_form_of_lu_compose_fits_its_kernel():
    for channels in (1, 2, 12, 64):
        composed("sm_90", 4, channels)
    composed("sm_90", 3, 7, permuted=False, need=(True, False))
    composed("sm_90", 3, 7, permuted=False, softplus=True, need=(False, True))


# --- the LU linear map -----------------------------------------------------------------------------------------------


def lu(target, monkeypatch, shape, *, inverse=False, dtype=F32, last=False, permuted=True):
    """Forward and backward, with everything that is optional where ``permuted``."""
    monkeypatch.setattr(channel_mix, "generation_of", lambda x: GENERATION[target])
    x = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    matrix = torch.zeros(shape[1], shape[1], dtype=F64 if dtype == F64 else F32)
    options = (matrix[0], torch.arange(shape[1])) if permuted else (None, None)
    factors = (matrix, matrix, matrix[0], *options)
    bias = matrix[0] if permuted else None
    binaries = compiled(target, lambda: lu_linear.forward(x, *factors, bias, 0, 0.0, inverse))
    return binaries + compiled(
        target, lambda: lu_linear.backward(x, x, *factors, 0, 0.0, inverse, True, True, permuted)
    )


@pytest.mark.parametrize(("target", "width"), [*on_targets(64), *(("sm_90", c) for c in (1, 12, 24, 48, 128))])
def test_lu_linear(target, width, monkeypatch):
    both = [b for inverse in (False, True) for b in lu(target, monkeypatch, (4, width, 16, 16), inverse=inverse)]
    if target in NVIDIA and width >= 12:
        for counts in wide([b for b in both if b.name == "sweep_kernel"], target=target):
            assert counts["LDG.128"] > 0, counts
            assert counts["STG.128"] > 0, counts
    lu(target, monkeypatch, (300, width), permuted=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("width", [1, 2, 3, 8, 17, 32, 64, 100, 128])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_lu_linear_everything(target, width, dtype, monkeypatch):
    for inverse in (False, True):
        lu(target, monkeypatch, (3, width, 7, 7), inverse=inverse, dtype=dtype, last=True)
        lu(target, monkeypatch, (300, width), inverse=inverse, dtype=dtype)


# --- the rational-quadratic spline -----------------------------------------------------------------------------------


def splined(target, shape, *, spline="linear", inverse=False, elementwise=False, dtype=F32, params_dtype=None,
            last=(False, False), everything=False):  # fmt: skip
    """Forward and backward; ``everything`` adds a mask, a channel map and a running log-determinant."""
    spline = Spline.parse(spline)
    x = torch.zeros(shape, dtype=dtype)
    params = torch.zeros(shape[0], shape[1] * spline.params_per_element, *shape[2:], dtype=params_dtype or dtype)
    x, params = (
        t.contiguous(memory_format=torch.channels_last) if is_last else t
        for t, is_last in zip((x, params), last, strict=True)
    )
    form = SplineForm.pack(spline, inverse, elementwise)
    total = torch.zeros(shape if elementwise else shape[:1], dtype=F64 if dtype == F64 else F32)
    options = (torch.arange(shape[1]), x != 0) if everything else (None, None)
    running = total if everything and not elementwise else None
    launch = rational_quadratic_spline
    forward = compiled(target, lambda: launch.forward(x, params, *options, running, *form))
    return forward + compiled(target, lambda: launch.backward(x, params, x, total, *options, *form, True, True))


@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("inverse", [False, True])
def test_rational_quadratic_spline(target, inverse):
    splined(target, (8, 12, 16, 16), inverse=inverse)
    splined(target, (512, 10), spline="zuko_circular", inverse=inverse, everything=True)
    splined(target, (3, 7, 5, 9), spline=Spline(64), inverse=inverse, dtype=F64, last=(False, True), everything=True)


@pytest.mark.parametrize("name", PRESETS)
def test_splines(name):
    for inverse in (False, True):
        splined("sm_90", (64, 63), spline=name, inverse=inverse, params_dtype=BF16)
        splined("sm_90", (2, 14, 33, 37), spline=name, inverse=inverse, elementwise=True)


SPLINED = {
    "images": {"shape": (8, 12, 16, 16)},
    "split samples": {"shape": (2, 12, 64, 64)},
    "rows": {"shape": (64, 3, 8, 16)},
}


@pytest.mark.parametrize("name", SPLINED)
def test_rational_quadratic_spline_moves_memory_wide(name):
    """But for the chosen slopes, which lie anywhere, and one log-determinant out and its gradient in."""
    binaries = splined("sm_90", **SPLINED[name])
    for counts, stores in zip(wide(binaries, "forward_kernel", "backward_kernel"), (1, 0)):
        narrow = {k: n for k, n in counts.items() if not k.endswith(".128")}
        assert counts["LDG.128"] > 0, counts
        assert counts["STG.128"] > 0, counts
        assert sum(n for k, n in narrow.items() if k.startswith("LDG")) <= 2 * 4 + 4, counts
        assert sum(n for k, n in narrow.items() if k.startswith("STG")) <= stores, counts


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TO_COMPILE)
@pytest.mark.parametrize("bins", [2, 3, 8, 16, 33, 64])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_rational_quadratic_spline_everything(target, bins, dtype):
    """Which form and layout ride along depends on the case."""
    bits = zlib.crc32(repr((target, bins, dtype)).encode())
    tails, sizes = ("linear", "circular", "none")[bits % 3], ("softmax", "softclip")[bits >> 8 & 1]
    spline = Spline(bins, tails, sizes=sizes, half_turn=bool(bits >> 9 & 1))
    for inverse in (False, True):
        options = {"spline": spline, "inverse": inverse, "dtype": dtype}
        splined(target, (300, 5), **options, everything=bool(bits >> 10 & 1))
        splined(target, (4, 12, 16, 16), **options, last=(False, bool(bits >> 11 & 1)))
        splined(target, (2, 700), **options, elementwise=True, everything=True)


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_the_package_leaves_triton_alone():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import nfkernels; "
        "assert before or 'triton' not in sys.modules; "
        "assert not [m for m in sys.modules if m.startswith('nfkernels.triton')]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
