"""A small forward and backward of every op: what runs under compute-sanitizer."""

import pytest
from bodies import OPS, SERVED, check_exact, directions

from benchmarks.case import Case


@pytest.mark.parametrize(("device", "backend"), SERVED)
@pytest.mark.parametrize("name", OPS)
def test_every_op_runs(name, device, backend):
    op = OPS[name]
    for shape in ((3, 12, 5, 7), (40, 6)):
        for direction in directions(op):
            check_exact(op, Case(name, direction, shape), device, backend)
