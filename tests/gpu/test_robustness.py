"""The same bits every run, and values that are not finite."""

import pytest
from bodies import OPS, SERVED, check_non_finite, check_repeats, directions

from benchmarks.case import FORWARD, Case


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("shape", [(4, 12, 64, 64), (3000, 16), (2, 64, 40, 40)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_same_bits_in_five_runs(name, shape, device, backend):
    for direction in directions(OPS[name]):
        check_repeats(OPS[name], Case(name, direction, shape), device, backend)


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("shape", [(6, 12, 8, 8), (70, 6)], ids=str)
@pytest.mark.parametrize("name", [n for n in OPS if "x" in OPS[n].differentiable])
def test_non_finite_values_stay_in_their_samples(name, shape, device, backend):
    check_non_finite(OPS[name], Case(name, FORWARD, shape), device, backend)
