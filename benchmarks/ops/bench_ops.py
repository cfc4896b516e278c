"""The tables' CPU cases under pytest-benchmark, for its comparisons and histograms.

python -m pytest benchmarks/ops --benchmark-columns=min,median,rounds --benchmark-sort=name
"""

import pytest
import torch

from benchmarks.case import draw, exact, needs_grad, prepare
from benchmarks.gate import compare
from benchmarks.ops import tables
from benchmarks.run import contenders

CPU = torch.device("cpu")
CASES = [(op, case, c) for op in tables() for case in op.cases("cpu") for c in contenders(op, case, CPU)]


@pytest.mark.parametrize(("op", "case", "contender"), CASES, ids=[f"{case.id}-{c.name}" for _, case, c in CASES])
def bench_op(benchmark, op, case, contender):
    benchmark.group = case.id
    sample = draw(op, case, CPU)
    reference = next(c for c in contenders(op, case, CPU) if c.name == "reference")
    with reference.context(needs_grad(case)):
        plain, target = (prepare(op, case, reference.run, s)() for s in (sample, exact(op, sample)))
    run = torch.compile(contender.run) if contender.compiled else contender.run
    with contender.context(needs_grad(case)):
        call = prepare(op, case, run, sample)
        verdict = compare(call(), plain, target, ours=contender.ours)
        assert verdict.ok, verdict.reason
        benchmark(call)
