"""Kernels against the reference in float64: every op and backend, over shapes, layouts, dtypes and options, on a stream
that is not the default one."""

import pytest
import torch
from bodies import (  # fmt: skip
    DTYPES,
    FORMATS,
    ON_GPU,
    OPS,
    SERVED,
    SHAPES,
    check_by_slices,
    check_exact,
    directions,
    other_stream,
    variants,
)

from benchmarks.case import FORWARD, Case

PAIRS = {"cpu": DTYPES[:2], "native": DTYPES, "triton": DTYPES[:3]}  # Triton compiles for each pair


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("name", OPS)
def test_shapes_and_layouts(name, device, backend):
    op = OPS[name]
    with other_stream(device):
        for shape in SHAPES if backend == "native" else SHAPES[:3]:  # Triton compiles for many of them
            for fmt in FORMATS:
                for direction in directions(op):
                    check_exact(op, Case(name, direction, shape), device, backend, fmt)


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("name", OPS)
def test_dtypes_and_options(name, device, backend):
    op = OPS[name]
    with other_stream(device):
        for data, params in PAIRS["cpu" if device == "cpu" else backend]:
            for variant in variants(op):
                for channels_last in (False, True):  # of the params alone: what a bf16 convolution gives
                    options = {"variant": variant, "dtype": data, "params": params, "channels_last": channels_last}
                    for direction in directions(op):
                        check_exact(op, Case(name, direction, (3, 24, 12, 20), **options), device, backend)


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("name", [n for n in OPS if n.endswith("mix")])
@pytest.mark.parametrize("channels", [2, 31, 32, 40, 64, 96, 130])
def test_widths_of_mixes(name, channels, device, backend):
    op = OPS[name]
    with other_stream(device):
        for direction in directions(op):
            check_exact(op, Case(name, direction, (3, channels, 9, 15)), device, backend)


# Noise depends on an element's place in the whole, a convolution on the rows before it; matrices and tables have no
# positions; a spline's params are 23 times its data.
WHOLE = (
    "dequantize",
    "autoregressive_conv",
    "autoregressive_inverse",
    "dense_net",
    "lu_compose",
    "rational_quadratic_spline",
)
SLICED = [n for n in OPS if n not in WHOLE]


@pytest.mark.parametrize("name", SLICED)
def test_slices_add_up_on_a_cpu(name):
    check_by_slices(OPS[name], Case(name, FORWARD, (2, 4, 9, 8)), "cpu", "native", chunks=4)


@pytest.mark.parametrize(("device", "backend"), ON_GPU)
@pytest.mark.parametrize("shape", [(9, 16, 4096, 4096), (1, 4, 32768, 17000)], ids=["samples", "one sample"])
@pytest.mark.parametrize("name", SLICED)
def test_more_than_two_to_the_31_elements(name, shape, device, backend):
    case = Case(name, FORWARD, shape, dtype=torch.bfloat16, params=torch.bfloat16)
    need, free = 8 * case.data_bytes, torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    check_by_slices(OPS[name], case, device, backend, chunks=128)
